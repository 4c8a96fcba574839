"""Round to nearest: by hand, then what must hold for any weight, then real weights against the documented figures."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.checkpoint import open_checkpoint
from compiler.errors import FormatError, UnsupportedError
from compiler.quant.formats import open_source
from compiler.quant.ir import DenseWeight, WeightType
from compiler.quant.reference import dequantize
from compiler.quantize.rtn import F16_TINY, default_group_size, quantize
from tests.quant import samples


def dense(values: object) -> DenseWeight:
    return DenseWeight(np.array(values, np.float32), "float32")


def test_symmetric_by_hand() -> None:  # the value of largest size is -4: scale -4 / -8 = 0.5, all are on the grid
    w = quantize(dense([[-4, 3.5, 0, 0.5]]), 4, 4)
    assert (w.scale.tolist(), w.zero.tolist(), w.codes.tolist()) == ([[0.5]], [[8]], [[0, 15, 8, 9]])
    assert quantize(dense([[4, -3.5, 0, -0.5]]), 4, 4).scale.tolist() == [[-0.5]]  # the longer side decides the sign


def test_eight_bits_by_hand() -> None:  # scale 127 / 127; 0.6 rounds to 1 above the zero
    w = quantize(dense([[127, -127, 0, 0.6]]), 8, 4)
    assert (w.scale.tolist(), w.zero.tolist(), w.codes.tolist()) == ([[1]], [[128]], [[255, 1, 128, 129]])


def test_asymmetric_by_hand() -> None:  # 0..15 in steps of 1
    w = quantize(dense([[15, 1, 0, 7]]), 4, 4, symmetric=False)
    assert (w.scale.tolist(), w.zero.tolist(), w.codes.tolist()) == ([[1]], [[0]], [[15, 1, 0, 7]])


def test_a_short_last_group_and_float16_input() -> None:
    w = quantize(DenseWeight(np.array([[-8, 7, 1, -0.5, 0.25]], np.float16), "float16"), 4, 2)
    assert w.type == WeightType(1, 5, "int4", 2, symmetric=True)
    assert dequantize(w)[0, 4] == 0.25


def test_default_group_size() -> None:
    assert [default_group_size(k) for k in (4096, 192, 96, 172, 50)] == [128, 64, 32, 32, 32]


@given(bits=st.sampled_from([4, 8]), symmetric=st.booleans(), k=st.integers(1, 70),
       group_size=st.sampled_from([1, 7, 32, 64]), seed=st.integers(0, 999), magnitude=st.integers(-20, 15))
def test_no_weight_is_further_off_than_the_plain_scale_allows(
        bits: int, symmetric: bool, k: int, group_size: int, seed: int, magnitude: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, k)) * 2.0**magnitude).astype(np.float32)
    w = quantize(dense(x), bits, group_size, symmetric)
    again = quantize(dense(x), bits, group_size, symmetric)
    assert np.array_equal(w.codes, again.codes)
    assert np.array_equal(w.scale, again.scale)
    group = np.arange(k) // w.group_size
    peak = np.stack([np.abs(x[:, group == g]).max(axis=1) for g in range(w.type.groups)], axis=1)[:, group]
    # Each group's squared error is at most what the first scale gives: one step a weight, where a step is at most
    # 2 * peak / 15 (4 bits, asymmetric) or peak / 8 or peak / 127, plus the float16 rounding of the step, for 8 codes.
    step = peak * {4: 2 / 15, 8: 2 / 255}[bits] * (1 + 8 * 2**-11) + 16 * float(F16_TINY) * 2**bits
    assert (np.abs(dequantize(w) - x) <= step * np.sqrt(w.group_size)).all()


def test_rows_do_not_depend_on_their_neighbours() -> None:  # nor on how the rows are cut into blocks
    x = np.random.default_rng(0).standard_normal((600, 512)).astype(np.float32)
    whole = quantize(dense(x), 4, 128)
    part = quantize(dense(x[511:514]), 4, 128)
    assert np.array_equal(whole.codes[511:514], part.codes)
    assert np.array_equal(whole.scale[511:514], part.scale)


def test_zeros_and_the_ends_of_float16() -> None:
    zero = quantize(dense(np.zeros((1, 4))), 4, 4)
    assert not dequantize(zero).any()
    tiny = quantize(dense([[-1e-8, 5e-8, 0, 0]]), 4, 4)  # amax / 8 rounds to 0 in float16: the smallest scale is taken
    assert abs(float(tiny.scale[0, 0])) == float(F16_TINY)
    assert np.abs(dequantize(tiny) - [[-1e-8, 5e-8, 0, 0]]).max() <= float(F16_TINY) / 2
    with pytest.raises(FormatError) as error:
        quantize(dense([[1e6, 0]]), 4, 2, where="m")
    assert str(error.value) == ("m has values up to 1e+06, too large for float16 scales. Weights of a working model "
                                "are far smaller: fetch the checkpoint again.")


def test_refusals() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(FormatError) as error:
            quantize(dense([[bad, 0]]), 4, 2, where="m")
        assert str(error.value) == "m has values that are not finite. The checkpoint is damaged: fetch it again."
    with pytest.raises(UnsupportedError) as unsupported:
        quantize(dense([[1, 0]]), 3, 2)
    assert str(unsupported.value) == "Round-to-nearest has 4 and 8 bits, not 3."


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "percent"), [
    (4, 128, True, 9.73), (4, 32, True, 8.20), (4, 128, False, 9.57), (4, 32, False, 7.76), (8, 128, True, 0.65),
])
def test_the_figures_in_the_docstring(bits: int, group_size: int, symmetric: bool, percent: float) -> None:
    source = open_source(open_checkpoint(samples.folder("models", "storyteller-5m")))
    wrong = total = 0.0
    for module in source.modules():
        if module == "model.embed_tokens":
            continue
        w = source.load(module)
        assert isinstance(w, DenseWeight)
        real = dequantize(w).astype(np.float64)
        wrong += float(np.square(dequantize(quantize(w, bits, group_size, symmetric)) - real).sum())
        total += float(np.square(real).sum())
    assert round(100 * (wrong / total) ** 0.5, 2) == percent

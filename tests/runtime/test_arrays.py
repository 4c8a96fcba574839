"""The runtime without numpy: plain arrays do what numpy's do, plain sampling chooses what numpy's chooses."""
from __future__ import annotations

import mmap
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import arrays, plain_sampling
from runtime.arrays import Plain
from runtime.errors import VmError
from runtime.sampler import Sampler, Sampling, distribution

ROUNDING = 1e-12  # float64: 2000 terms of 2^-53 each, and exp within an ulp
DTYPES = ("float32", "float16", "bfloat16", "uint16", "int8", "uint8", "int16", "int32")


def plain_logits(values: Any) -> Plain:
    """float32[n] as a board without numpy has them."""
    made = arrays.plain_zeros((len(values),), "float32")
    made[:] = [float(value) for value in values]
    return made


@pytest.fixture
def without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "NUMPY", False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_kinds_lie_alike(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TVM is told the same about both, but for the address."""
    shape = (3, 1, 5)
    numpys = arrays.zeros(shape, dtype)
    monkeypatch.setattr(arrays, "NUMPY", False)
    plain: Any = arrays.zeros(shape, dtype)
    assert isinstance(plain, Plain)
    assert arrays.layout(plain)[1:] == arrays.layout(numpys)[1:]
    assert plain.nbytes == numpys.nbytes and not any(plain.flat.cast("B"))


def test_rows_are_views_and_assignments_go_through() -> None:
    table = arrays.plain_zeros((4, 3), "int32")
    table[1:3] = [1, 2, 3, 4, 5, 6]
    table[3][0] = 9
    table[0:1] = table[2:3]
    table[1:1] = []
    assert np.frombuffer(table.flat, np.int32).reshape(4, 3).tolist() == [[4, 5, 6], [1, 2, 3], [4, 5, 6], [9, 0, 0]]
    assert (len(table), len(table[1:]), len(table[4:]), table[-1][0]) == (4, 3, 0, 9)
    table[:2] = 0
    assert list(table[:3].flat) == [0, 0, 0, 0, 0, 0, 4, 5, 6]
    with pytest.raises(ValueError, match="different structures"):
        table[:1] = [1, 2]
    with pytest.raises(IndexError):
        table[4]
    kept = table[2].copy()
    table[2:3] = 0
    assert list(kept.flat) == [4, 5, 6]


def test_rows_are_no_place_for_tvm_unless_aligned() -> None:
    table = arrays.plain_zeros((2, 3), "float32")
    with pytest.raises(ValueError, match="a C-contiguous array on a 64-byte boundary is needed"):
        arrays.layout(table[1:])


def test_a_mapped_file_is_read_only_and_outlives_its_name(tmp_path: Path, without_numpy: None) -> None:
    content = np.arange(100, dtype=np.float32)
    (tmp_path / "weights").write_bytes(content.tobytes())
    with (tmp_path / "weights").open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    view: Any = arrays.mapped(mapping, 64, (7, 12), "float32")
    del mapping
    assert list(view.flat) == content[16:].tolist()
    with pytest.raises(TypeError, match="read-only"):
        view[0][0] = 1.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
        {"top_p": 0.01, "temperature": 3.0},
    ],
)
def test_probabilities_are_numpys(options: dict[str, Any]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})
    for seed, size in ((0, 1), (1, 2), (2, 333), (3, 2000)):
        logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
        logits[size // 2 :: 7] = logits[0]  # ties
        ids, probabilities = distribution(logits, sampling)
        plain_ids, plain_probabilities = plain_sampling.distribution(logits.tolist(), sampling)
        assert plain_ids == ids.tolist()
        np.testing.assert_allclose(plain_probabilities, probabilities, rtol=ROUNDING)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, {"temperature": 1.0}])
def test_the_same_tokens_are_chosen(options: dict[str, Any]) -> None:
    """A whole history, so that the penalty has something to act on."""
    sampling = Sampling(repetition_penalty=1.3, seed=11, **options)
    ours, numpys = Sampler(sampling, 500), Sampler(sampling, 500)
    generator = np.random.default_rng(5)
    for _ in range(100):
        logits = generator.normal(0, 2, 500).astype(np.float32)
        assert ours.sample(plain_logits(logits)) == numpys.sample(logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_logit_that_is_no_number_is_refused(bad: float, place: int) -> None:
    values = [1.0, -float("inf"), 3.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    assert Sampler(Sampling(), 8).sample(plain_logits(values)) == 2
    values[place] = bad
    with pytest.raises(VmError, match=f"the model gave the logit {bad}, so there is no next token"):
        Sampler(Sampling(), 8).sample(plain_logits(values))


def test_the_penalty_rounds_as_numpy_does() -> None:
    from runtime.sampler import _penalised

    values = [random.Random(3).gauss(0, 5) for _ in range(64)]
    logits = np.array(values, np.float32)
    got = plain_sampling.penalised(plain_sampling.floats(plain_logits(logits)), bytes([1, 0] * 32), 1.1)
    expected = np.where(np.arange(64) % 2 == 0, _penalised(logits, 1.1), logits)
    np.testing.assert_allclose(got, expected, rtol=2**-23)  # one more rounding: to float64 first


@pytest.mark.parametrize("shift", [-200.0, -20.0, -3.0, 0.0, 3.0, 20.0, 1e-3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 31, 4000])
def test_the_best_is_numpys(shift: float, size: int) -> None:
    """Few and many floats with the best first byte, all negative ones, ties, both zeros, denormals, minus infinity."""
    generator = np.random.default_rng(size)
    for scale in (0.0, 1e-40, 0.1, 3.0):
        logits = (shift + scale * generator.normal(0, 1, size)).astype(np.float32)
        logits[-(size // 3) :] = logits[0]
        for changed in (logits, np.where(logits < shift, np.float32(-0.0), logits), -np.abs(logits)):
            at = int(changed.argmax())
            assert plain_sampling.best(plain_sampling.floats(plain_logits(changed))) == (at, float(changed[at]))
            masked = np.append(changed, np.float32(-np.inf)).astype(np.float32)
            assert plain_sampling.best(plain_sampling.floats(plain_logits(masked)))[0] == at

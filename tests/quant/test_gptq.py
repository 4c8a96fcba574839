"""GPTQ: one word by hand, an independent loop over elements, the traps of real writers, and the refusals, whole."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.checkpoint import open_checkpoint
from compiler.errors import ConfigError, FormatError, UnsupportedError, UserError
from compiler.quant.formats import gptq, open_source
from compiler.quant.formats.gptq import GptqConfig, Raw
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from compiler.quant.packing import pack
from compiler.quant.reference import dequantize
from tests.checkpoint.files import write_checkpoint

CFG = GptqConfig(bits=4, group_size=-1, sym=False)


def words(values: Any) -> np.ndarray:
    return np.array(values, np.uint32).view(np.int32)


def raw(qweight: Any, qzeros: Any, scales: Any, g_idx: Any = None) -> Raw:
    return Raw(words(qweight), words(qzeros), np.array(scales, np.float16),
               None if g_idx is None else np.array(g_idx, np.int32))


def test_first_word_by_hand() -> None:  # nibbles 0..7, stored zero 7 -> zero 8, scale 0.5: (q - 8) / 2
    w = gptq.decode(raw(qweight=[[0x76543210] * 8], qzeros=[[0x77777777]], scales=[[0.5] * 8]), CFG, "m")
    assert dequantize(w)[0].tolist() == [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]
    assert w.type == WeightType(8, 8, "int4", 8)


def test_rows_columns_and_groups_by_hand() -> None:  # 16 inputs in groups of 8, 8 outputs, each output its own code
    qweight = [[0x11111111 * n for n in range(8)], [0x11111111 * (n + 8) for n in range(8)]]
    w = gptq.decode(raw(qweight, [[0x76543210], [0xFFFFFFFF]], [[1] * 8, [2] * 8]), GptqConfig(4, 8, False, 2), "m")
    assert w.codes[3].tolist() == [3] * 8 + [11] * 8
    assert w.zero.tolist() == [[n, 15] for n in range(8)]
    assert dequantize(w)[3].tolist() == [0] * 8 + [-8] * 8


def by_elements(qweight: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int) -> np.ndarray:
    """The definition, one element at a time: w[n, k] = scales[g_idx[k], n] * (q[k, n] - zeros[g_idx[k], n])."""
    n = qweight.shape[1]
    out = np.empty((n, len(g_idx)), np.float32)
    for column in range(n):
        stream = sum(int(word) << 32 * i for i, word in enumerate(qweight[:, column].view(np.uint32)))
        for k, group in enumerate(g_idx):
            q = stream >> bits * k & (1 << bits) - 1
            out[column, k] = np.float32(scales[group, column]) * (q - int(zeros[group, column]))
    return out


@given(bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([-1, 7, 32, 64, 500]), act_order=st.booleans(),
       version=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_agrees_with_the_definition(bits: int, group_size: int, act_order: bool, version: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, n = 96, 32
    size = k if group_size in (-1, 500) else group_size
    groups = -(-k // size)
    codes = rng.integers(0, 1 << bits, (k, n), dtype=np.uint8)
    zeros = rng.integers(0, 1 << bits, (groups, n), dtype=np.uint8)  # 0 included: it wraps to all ones in v1
    scales = rng.standard_normal((groups, n)).astype(np.float16)
    g_idx = (np.arange(k) // size).astype(np.int32)
    if act_order:
        g_idx = rng.permutation(g_idx)
    qweight = pack(codes, bits, 0)
    stored = zeros if version == 2 else (zeros - 1) & np.uint8((1 << bits) - 1)
    config = GptqConfig(bits, group_size, False, version)
    w = gptq.decode(Raw(qweight, pack(stored, bits, 1), scales, g_idx), config, "m")
    assert np.array_equal(dequantize(w), by_elements(qweight, zeros, scales, g_idx, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_0_borrows_from_its_neighbour_in_files_of_gptqmodel(bits: int) -> None:
    per_word = 32 // bits
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    zeros = np.random.default_rng(0).integers(0, 3, (1, per_word * 4), dtype=np.uint8)  # many zeros, some side by side
    stored = (pack(zeros, bits, 1).view(np.uint32) - ones).view(np.int32)  # what GPTQModel does to a v2 word
    data = Raw(np.zeros((bits, per_word * 4), np.int32), stored, np.ones((1, per_word * 4), np.float16))
    assert gptq.decode(data, GptqConfig(bits, -1, False, borrows=True), "m").zero[:, 0].tolist() == zeros[0].tolist()


def test_a_zero_of_0_by_hand() -> None:  # zeros 0, 8, 8, ... : GPTQModel stores 0x88888880 - 0x11111111 = 0x7777776F
    zeros = [0] + [8] * 7
    for borrows, word in ((True, 0x7777776F), (False, 0x7777777F)):
        data = raw([[0] * 8], [[word]], [[1] * 8])
        assert gptq.decode(data, GptqConfig(4, -1, False, 1, borrows), "m").zero[:, 0].tolist() == zeros


def test_act_order_becomes_a_permutation() -> None:
    w = gptq.decode(raw([[0x76543210] * 8], [[0]] * 2, [[1] * 8, [2] * 8], [1, 0, 1, 0, 1, 0, 1, 0]),
                    GptqConfig(4, 4, False, 2), "m")
    assert w.permutation is not None
    assert w.permutation.tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
    assert w.codes[0].tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
    assert dequantize(w)[0].tolist() == [0, 1, 4, 3, 8, 5, 12, 7]


def decode_error(data: Raw, config: GptqConfig) -> str:
    with pytest.raises(FormatError) as error:
        gptq.decode(data, config, "FILE: m")
    return str(error.value)


def test_refuses_values_that_cannot_be() -> None:
    w = [[0] * 8]
    assert decode_error(raw(w, [[0]], [[np.nan, np.inf, *[1] * 6]]), CFG) == (
        "FILE: m.scales: 2 of 8 are NaN or infinite. The file is damaged or the quantisation failed: fetch it again, "
        "or quantise again.")
    assert decode_error(raw(w, [[0x88888888]], [[1] * 8]), GptqConfig(4, -1, True)) == (
        "FILE: m.qzeros: a zero is 9, but sym = true needs 8 everywhere. If sym is right, checkpoint_format is wrong: "
        "'gptq' stores zero - 1, 'gptq_v2' stores zero.")
    for bad in (-1, 2, 2**31 - 1):
        assert decode_error(raw(w, [[0]] * 2, [[1] * 8] * 2, [0, 0, 0, bad, 1, 1, 1, 1]), GptqConfig(4, 4, False)) == (
            f"FILE: m.g_idx: input 3 is in group {bad}, but group_size 4 makes groups 0 to 1. The file is damaged, or "
            f"group_size is wrong.")
    assert decode_error(raw(w, [[0]] * 2, [[1] * 8] * 2, [0] * 8), GptqConfig(4, 4, False)) == (
        "FILE: m.g_idx: group 0 has 8 inputs, but group_size 4 needs 4. group_size is wrong, or the file is damaged.")


@pytest.mark.parametrize(("version", "message"), [
    (1, "read as 'gptq', weights are -1.00 steps on average, as 'gptq_v2' +0.00"),
    (2, "read as 'gptq_v2', weights are +1.00 steps on average, as 'gptq' +0.00"),
])
def test_refuses_zeros_that_only_the_other_version_stores(version: int, message: str) -> None:
    zero = np.tile(np.array([6, 7, 9, 10], np.uint8), 32)  # outputs differ: an asymmetric weight
    codes = zero + np.tile(np.array([[0], [1], [2], [3], [253], [254], [255], [0]], np.uint8), (16, 1))  # adds up to 0
    stored = zero if version == 1 else zero - 1  # what the other version writes
    scales = np.ones((1, 128), np.float16)
    data = Raw(pack(codes, 4, 0), pack(stored[None], 4, 1), scales)
    assert decode_error(data, GptqConfig(4, -1, False, version)) == (
        f"FILE: m.qzeros: {message}, and they should be near 0. checkpoint_format is wrong: 'gptq' stores zero - 1, "
        f"'gptq_v2' stores zero.")
    assert gptq.decode(data, GptqConfig(4, -1, False, 3 - version), "m").zero[:, 0].tolist() == zero.tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_made_up_weights_of_either_version_are_taken(tmp_path: Path, bits: int, group_size: int) -> None:
    """Random codes and zeros, as tests of other tools have them, say nothing about the version."""
    for seed in range(4):
        random, k, n = np.random.default_rng(seed), 256, 64
        group = np.arange(k) // (k if group_size == -1 else group_size)
        codes = random.integers(0, 1 << bits, (k, n)).astype(np.uint8)
        zero = random.integers(1, 1 << bits, (group[-1] + 1, n)).astype(np.uint8)
        order = random.permutation(group).astype(np.int32)
        scales = random.random(zero.shape).astype(np.float16)
        stored = {"m__qweight": pack(codes, bits, 0), "m__scales": scales, "m__g_idx": order}
        for version, qzeros in (("gptq", zero - 1), ("gptq_v2", zero)):
            made = settings(bits=bits, group_size=group_size, sym=False, desc_act=True, checkpoint_format=version)
            w = checkpoint(tmp_path, made, m__qzeros=pack(qzeros, bits, 1), **stored).load("m")
            want = scales[order].astype(np.float32) * (codes.astype(np.float32) - zero[order])
            assert np.array_equal(dequantize(w), want.T)


def tensors(**changed: Any) -> dict[str, np.ndarray]:
    """Module "m" of 64 inputs in groups of 32 and 16 outputs, a dense head and a norm, with some tensors changed."""
    parts: dict[str, Any] = {
        "m.qweight": np.full((8, 16), 0x76543210, np.int32), "m.qzeros": np.full((2, 2), 0x77777777, np.int32),
        "m.scales": np.ones((2, 16), np.float16), "m.g_idx": (np.arange(64) // 32).astype(np.int32),
        "lm_head.weight": np.ones((4, 64), np.uint16), "norm.weight": np.full(64, 0x3F80, np.uint16)}
    parts |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in parts.items() if value is not None}


def settings(**changed: Any) -> dict[str, Any]:
    config = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq", **changed}
    return {"quantization_config": {key: value for key, value in config.items() if value is not ...}}


def checkpoint(folder: Path, config: dict[str, Any], **changed: Any) -> Any:
    return open_source(open_checkpoint(write_checkpoint(folder, config, tensors(**changed))))


def test_a_checkpoint(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, settings())
    assert source.modules() == ["m", "lm_head"]
    assert (source.has("m"), source.has("lm_head"), source.has("n")) == (True, True, False)
    assert source.describe("m") == source.load("m").type == WeightType(16, 64, "int4", 32, symmetric=True)
    assert source.describe("lm_head") == source.load("lm_head").type == WeightType(4, 64, "bfloat16", 0)
    assert isinstance(source.load("lm_head"), DenseWeight)
    assert source.vector("norm").tolist() == source.vector("norm.weight").tolist() == [1.0] * 64


@pytest.mark.parametrize(("changed", "g_idx"), [
    ({"quant_method": ...}, True), ({}, False), ({"group_size": 64}, False), ({"checkpoint_format": "gptq"}, True),
])
def test_older_and_shorter_forms(tmp_path: Path, changed: dict[str, Any], g_idx: bool) -> None:
    parts: dict[str, Any] = {} if g_idx else {"m__g_idx": None}
    if changed.get("group_size") == 64:
        parts |= {"m__scales": np.ones((1, 16), np.float32), "m__qzeros": np.full((1, 2), 0x77777777, np.int32)}
    w = checkpoint(tmp_path, settings(**changed), **parts).load("m")
    assert isinstance(w, QuantWeight)
    assert dequantize(w)[0, :8].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1]


def test_bfloat16_scales_are_widened(tmp_path: Path) -> None:
    w = checkpoint(tmp_path, settings(), m__scales=np.full((2, 16), 0x4040, np.uint16)).load("m")
    assert w.scale.dtype == np.float32
    assert w.scale[0].tolist() == [3, 3]


def test_gptq_v2_is_never_read_as_v1(tmp_path: Path) -> None:
    v2 = settings(checkpoint_format="gptq_v2", format="gptq_v2")
    w = checkpoint(tmp_path, v2, m__qzeros=words([[0x88888888] * 2] * 2)).load("m")
    assert w.zero.tolist() == [[8, 8]] * 16
    message = refusal(tmp_path, settings(checkpoint_format="gptq_v2", format="gptq"), FormatError)
    place = f"{tmp_path / 'config.json'}: quantization_config"
    assert message == (f"{place}.checkpoint_format and {place}.format differ: one says gptq, the other gptq_v2. Set "
                       f"both to the form that the file has.")


def test_all_zero_biases_of_auto_gptq_are_no_biases(tmp_path: Path) -> None:
    assert checkpoint(tmp_path, settings(), m__bias=np.zeros(16, np.float32)).bias("m").tolist() == [0] * 16
    assert checkpoint(tmp_path, settings()).bias("m") is None
    given = checkpoint(tmp_path, settings(), m__bias=np.arange(16, dtype=np.float16)).bias("m")
    assert given is not None
    assert (given.dtype, given.tolist()) == (np.float32, list(range(16)))


def test_one_module_set_apart_by_gptqmodel(tmp_path: Path) -> None:
    config = settings(dynamic={"m": {"bits": 8, "group_size": 64, "sym": False, "mse": 2.4}, "-:.*head": {}})
    source = checkpoint(tmp_path, config, m__qweight=np.zeros((16, 16), np.int32), m__g_idx=None,
                        m__scales=np.ones((1, 16), np.float16), m__qzeros=np.zeros((1, 4), np.int32))
    assert source.load("m").type == WeightType(16, 64, "int8", 64)


EIGHT = {"m__qweight": np.zeros((16, 16), np.int32), "m__qzeros": np.zeros((2, 4), np.int32)}


@pytest.mark.parametrize(("dynamic", "bits"), [  # the first pattern that matches from the start of "m" on decides
    ({"+:m": {"bits": 8}}, 8), ({"m": {"bits": 8}}, 8), ({r"+:.*": {"bits": 8}}, 8), ({"^m$": {"bits": 8}}, 8),
    ({r"+:(a|b|m)": {"bits": 8}, "m": {"bits": 4}}, 8), ({"m": {"bits": 4}, ".*": {"bits": 8}}, 4),
    ({".m": {"bits": 8}}, 4), ({"m.": {"bits": 8}}, 4), ({"M": {"bits": 8}}, 4), ({"-:n": {}, "m": {"bits": 8}}, 8),
    ({"(m*)*$": {"bits": 8}}, 8), ({r"[^\W\d]": {"bits": 8}}, 8), ({"": {"bits": 8}}, 8),
])
def test_patterns_of_gptqmodel(tmp_path: Path, dynamic: dict[str, Any], bits: int) -> None:
    source = checkpoint(tmp_path, settings(sym=False, dynamic=dynamic), **(EIGHT if bits == 8 else {}))
    assert source.describe("m").bits == source.load("m").type.bits == bits


def test_a_module_that_dynamic_leaves_alone_must_not_be_quantised(tmp_path: Path) -> None:
    assert refusal(tmp_path, settings(dynamic={"-:m": {}}), FormatError) == (
        f"{tmp_path / 'model.safetensors'}: m is quantised, but config.json says that this module is not. The "
        f"configuration belongs to another checkpoint, or was edited.")


def refusal(folder: Path, config: dict[str, Any], kind: type[UserError], **changed: Any) -> str:
    with pytest.raises(kind) as error:
        checkpoint(folder, config, **changed).load("m")
    assert type(error.value) is kind
    return str(error.value)


OTHER = "If another tool packed it, config.json must name its quant_method."
AWQ = "These are the shapes of AWQ: if AutoAWQ packed it, config.json must say quant_method = 'awq'."
NEEDS = "but GPTQ with 4 bits and group_size 32 needs"
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "short qweight": ({"m__qweight": np.zeros((7, 16), np.int32)},
                      f"m.qweight is int32[7, 16], {NEEDS} int32[8, 16] for k = 64 and n = 16. {OTHER}"),
    "no matrix": ({"m__qweight": np.zeros(128, np.int32)},
                  f"m.qweight is int32[128], {NEEDS} two dimensions, neither of them 0. {OTHER}"),
    "dtype": ({"m__qweight": np.zeros((8, 16), np.float32)}, f"m.qweight is float32[8, 16], {NEEDS} int32. {OTHER}"),
    "n": ({"m__scales": np.ones((2, 24), np.float16)},
          f"m.qweight is int32[8, 16], {NEEDS} int32[8, 24] for k = 64 and n = 24. {OTHER}"),
    "odd n": ({"m__scales": np.ones((2, 9), np.float16)},
              f"m.scales is float16[2, 9], {NEEDS} k and n that fill whole words, not k = 64 and n = 9. {OTHER}"),
    "scales": ({"m__scales": np.ones((4, 16), np.float16)},
               f"m.scales is float16[4, 16], {NEEDS} 16- or 32-bit floats [2, 16]. {OTHER}"),
    "integer scales": ({"m__scales": np.ones((2, 16), np.int8)},
                       f"m.scales is int8[2, 16], {NEEDS} 16- or 32-bit floats [2, 16]. {OTHER}"),
    "qzeros": ({"m__qzeros": np.zeros((2, 16), np.int32)},
               f"m.qzeros is int32[2, 16], {NEEDS} int32[2, 2]. {OTHER}"),
    "g_idx": ({"m__g_idx": np.zeros(64, np.int64)}, f"m.g_idx is int64[64], {NEEDS} int32[k]. {OTHER}"),
    "AWQ": ({"m__qweight": np.zeros((64, 2), np.int32), "m__g_idx": None},
            f"m.qweight is int32[64, 2], {NEEDS} int32[64, 16] for k = 512 and n = 16. {AWQ}"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_refuses_shapes_that_lie(tmp_path: Path, case: str) -> None:
    changed, message = SHAPES[case]
    assert refusal(tmp_path, settings(), FormatError, **changed) == f"{tmp_path / 'model.safetensors'}: {message}"


def test_refuses_a_wrong_group_size(tmp_path: Path) -> None:
    assert refusal(tmp_path, settings(group_size=16), FormatError) == (
        f"{tmp_path / 'model.safetensors'}: m.scales is float16[2, 16], but GPTQ with 4 bits and group_size 16 needs "
        f"16- or 32-bit floats [4, 16]. {OTHER}")


def test_refuses_missing_and_double_tensors(tmp_path: Path) -> None:
    for part in ("scales", "qzeros"):
        assert refusal(tmp_path, settings(), FormatError, **{f"m__{part}": None}) == (
            f"{tmp_path}: m has .qweight but no .{part}. Fetch the checkpoint again.")
    assert refusal(tmp_path, settings(), FormatError, m__weight=np.zeros((16, 64), np.float16)) == (
        f"{tmp_path}: m has both .weight and .qweight. Remove the one that is not the model's.")


CONFIGS: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "bits": ({"bits": 5}, UnsupportedError,
             "bits is 5, but quern decodes GPTQ with 2, 3, 4, 8 bits. Take the model with one of these."),
    "no bits": ({"bits": None}, ConfigError, "bits is null, but it must be an integer from 1 to 32."),
    "group_size": ({"group_size": 0}, FormatError,
                   "group_size is 0, but it must be -1 (one group a row) or at least 1."),
    "layout": ({"checkpoint_format": "marlin"}, ConfigError,
               "checkpoint_format is 'marlin', but it must be one of 'gptq', 'gptq_v2'."),
    "marlin": ({"is_marlin_format": True}, UnsupportedError,
               "is_marlin_format is true: weights repacked for the Marlin kernel are not supported. Take the "
               "checkpoint in plain GPTQ form."),
    "pack_dtype": ({"pack_dtype": "int16"}, ConfigError, "pack_dtype is 'int16', but it must be one of 'int32'."),
    "unknown": ({"rotation": "hadamard"}, ConfigError,
                "rotation is 'hadamard': quern does not know this key and will not guess what it changes. If it "
                "changes nothing in the computation, remove it; otherwise the model is not supported."),
    "lookahead": ({"dynamic": {r"-:(?!model)": {}}}, UnsupportedError,
                  "dynamic.-:(?!model) is a pattern that quern does not match: invalid perl operator: (?!. Write it "
                  "without lookaround and back references, or name the modules."),
    "no pattern": ({"dynamic": {"+:(": {"bits": 8}}}, UnsupportedError,
                   "dynamic.+:( is a pattern that quern does not match: missing ): (. Write it without lookaround and "
                   "back references, or name the modules."),
    "endless": ({"dynamic": {"a" * 1001: {}}}, UnsupportedError,
                f"dynamic.{'a' * 80} is a pattern that quern does not match: longer than 1000 characters. Write it "
                f"without lookaround and back references, or name the modules."),
    "number": ({"dynamic": {"m": 4}}, ConfigError, "dynamic.m is 4, but it must be an object."),
    "unknown in dynamic": ({"dynamic": {"m": {"bits": 4, "adapter": {"rank": 8}}}}, ConfigError,
                           'dynamic.m.adapter is {"rank": 8}: quern does not know this key and will not guess what it '
                           "changes. If it changes nothing in the computation, remove it; otherwise the model is not "
                           "supported."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refuses_settings_it_does_not_know(tmp_path: Path, case: str) -> None:
    changed, kind, message = CONFIGS[case]
    assert refusal(tmp_path, settings(**changed), kind) == (
        f"{tmp_path / 'config.json'}: quantization_config.{message}")

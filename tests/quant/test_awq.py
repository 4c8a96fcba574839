"""AWQ: one word by hand, an independent loop over elements, and the refusals, whole."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.checkpoint import open_checkpoint
from compiler.errors import ConfigError, FormatError, UnsupportedError, UserError
from compiler.quant.formats import awq, open_source
from compiler.quant.formats.awq import AwqConfig, Raw
from compiler.quant.ir import DenseWeight, WeightType
from compiler.quant.reference import dequantize
from tests.checkpoint.files import write_checkpoint


def words(values: Any) -> np.ndarray:
    return np.array(values, np.uint32).view(np.int32)


def test_first_word_by_hand() -> None:  # nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]; zeros 8 as they are
    raw = Raw(words([[0x76543210]]), words([[0x88888888]]), np.full((1, 8), 0.5, np.float16))
    w = awq.decode(raw, AwqConfig(-1), "m")
    assert w.codes[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert dequantize(w)[:, 0].tolist() == [-4, -2, -3.5, -1.5, -3, -1, -2.5, -0.5]
    assert w.type == WeightType(8, 1, "int4", 1)


def test_groups_by_hand() -> None:  # three inputs in groups of two: codes 1, 2, 3, zeros 0 and 15, scales 1 and 2
    raw = Raw(words([[0x11111111], [0x22222222], [0x33333333]]), words([[0], [0xFFFFFFFF]]),
              np.repeat(np.array([[1], [2]], np.float16), 8, axis=1))
    assert dequantize(awq.decode(raw, AwqConfig(2), "m"))[5].tolist() == [1, 2, -24]


def test_a_corner_of_a_real_file() -> None:
    """Four inputs and eight outputs of a q_proj that AutoAWQ 0.2.9 wrote, and its own dequantize_gemm, in float16."""
    raw = Raw(words([[0x79F87887], [0x8E5A8A73], [0x49BB78B6], [0x57D694E7]]), words([[0x79888776]]), np.array([[
        0.029541015625, 0.0290679931640625, 0.0261077880859375, 0.0263214111328125, 0.023712158203125,
        0.023406982421875, 0.029541015625, 0.0251007080078125]], np.float16))
    theirs = [
        [0.029541015625, 0.0, 0.0261077880859375, 0.1842041015625, 0.023712158203125, 0.0, -0.029541015625, 0.0],
        [-0.088623046875, 0.058135986328125, 0.0, -0.0789794921875, 0.0711669921875, 0.1170654296875, 0.0,
         0.0251007080078125],
        [0.0, 0.08721923828125, 0.10443115234375, 0.0789794921875, 0.023712158203125, 0.0, -0.029541015625,
         -0.0753173828125],
        [0.029541015625, -0.058135986328125, 0.1827392578125, 0.131591796875, -0.0711669921875, -0.04681396484375,
         0.029541015625, -0.050201416015625]]
    w = awq.decode(raw, AwqConfig(-1), "m")
    assert np.array_equal(dequantize(w).astype(np.float16).T, np.array(theirs, np.float16))


@given(k=st.integers(1, 70), n=st.sampled_from([8, 24, 64]), group_size=st.sampled_from([-1, 7, 32, 500]),
       seed=st.integers(0, 99))
def test_agrees_with_the_definition(k: int, n: int, group_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = k if group_size in (-1, 500) else group_size
    groups = -(-k // size)
    qweight = rng.integers(-2**31, 2**31, (k, n // 8)).astype(np.int32)
    qzeros = rng.integers(-2**31, 2**31, (groups, n // 8)).astype(np.int32)
    scales = rng.standard_normal((groups, n)).astype(np.float16)

    def at(stored: np.ndarray, row: int, column: int) -> int:
        nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(column % 8)
        return int(stored[row, column // 8]) >> 4 * nibble & 15

    w = awq.decode(Raw(qweight, qzeros, scales), AwqConfig(group_size), "m")
    want = [[np.float32(scales[i // size, j]) * (at(qweight, i, j) - at(qzeros, i // size, j)) for i in range(k)]
            for j in range(n)]
    assert np.array_equal(dequantize(w), np.array(want, np.float32))
    assert np.array_equal(awq.pack(w.codes), qweight)
    assert np.array_equal(awq.pack(w.zero.astype(np.uint8)), qzeros)


def test_blocks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.random.default_rng(0).integers(-2**31, 2**31, (5, 7)).astype(np.int32)
    whole = awq.unpack(stored)
    monkeypatch.setattr(awq, "BLOCK_WORDS", 10)  # two words a block, the last one alone
    assert np.array_equal(awq.unpack(stored), whole)


def tensors(**changed: Any) -> dict[str, np.ndarray]:
    """Module "m" of 64 inputs in groups of 32 and 16 outputs, a dense head and a norm, with some tensors changed."""
    parts: dict[str, Any] = {
        "m.qweight": np.full((64, 2), 0x76543210, np.int32), "m.qzeros": np.full((2, 2), 0x55555555, np.int32),
        "m.scales": np.ones((2, 16), np.float16), "lm_head.weight": np.ones((4, 64), np.float16),
        "norm.weight": np.ones(64, np.float32)}
    parts |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in parts.items() if value is not None}


def settings(**changed: Any) -> dict[str, Any]:
    config = {"bits": 4, "group_size": 32, "quant_method": "awq", "version": "gemm", "zero_point": True, **changed}
    return {"quantization_config": {key: value for key, value in config.items() if value is not ...}}


def checkpoint(folder: Path, config: dict[str, Any], **changed: Any) -> Any:
    return open_source(open_checkpoint(write_checkpoint(folder, config, tensors(**changed))))


def test_a_checkpoint(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, settings(modules_to_not_convert=["lm_head"]), m__bias=np.ones(16, np.float16))
    assert source.modules() == ["m", "lm_head"]
    assert (source.has("m"), source.has("lm_head"), source.has("n")) == (True, True, False)
    assert source.describe("m") == source.load("m").type == WeightType(16, 64, "int4", 32)
    assert isinstance(source.load("lm_head"), DenseWeight)
    assert source.bias("m").tolist() == [1] * 16
    assert source.bias("lm_head") is None
    assert source.vector("norm").tolist() == [1.0] * 64


@pytest.mark.parametrize("changed", [
    {"version": "GEMM"}, {"version": ...}, {"quant_method": ..., "bits": ..., "group_size": ..., "w_bit": 4,
                                            "q_group_size": 32}, {"q_group_size": 32}, {"sym": False},
    {"modules_to_not_convert": None},
    {"version": ..., "checkpoint_format": "gemm", "format": "gemm", "method": "awq", "pack_dtype": "int32", "meta": {},
     "zero_point": ..., "sym": False, "desc_act": False, "lm_head": False},  # GPTQModel
])
def test_older_and_shorter_forms(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert checkpoint(tmp_path, settings(**changed)).load("m").zero.tolist() == [[5, 5]] * 16


def test_version_may_be_spelled_differently_in_the_two_files(tmp_path: Path) -> None:  # as AutoAWQ 0.1 wrote them
    (tmp_path / "quant_config.json").write_text('{"q_group_size": 32, "w_bit": 4, "version": "GEMM"}')
    assert checkpoint(tmp_path, settings()).load("m").type.group_size == 32


def test_symmetric_files_of_auto_round(tmp_path: Path) -> None:
    config = settings(zero_point=False, sym=True, provider="auto-round")
    w = checkpoint(tmp_path, config, m__qzeros=words([[0x88888888] * 2] * 2)).load("m")
    assert w.zero.tolist() == [[8, 8]] * 16
    assert refusal(tmp_path, config, FormatError) == (
        f"{tmp_path / 'model.safetensors'}: m.qzeros: a zero is 5, but zero_point = false needs 8 everywhere. If the "
        f"file has zero points, config.json must say zero_point = true.")


def refusal(folder: Path, config: dict[str, Any], kind: type[UserError], **changed: Any) -> str:
    with pytest.raises(kind) as error:
        checkpoint(folder, config, **changed).load("m")
    assert type(error.value) is kind
    return str(error.value)


OTHER = "If another tool packed it, config.json must name its quant_method."
GPTQ = "This looks like GPTQ: if it is, config.json must say quant_method = 'gptq'."
NEEDS = "but AWQ with group_size 32 needs"
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ": ({"m__qweight": np.zeros((8, 16), np.int32)},
             f"m.qweight is int32[8, 16], {NEEDS} int32[k, 2] for n = 16. {GPTQ}"),
    "GPTQ with g_idx": ({"m__qweight": np.zeros((8, 32), np.int32), "m__g_idx": np.zeros(64, np.int32)},
                        f"m.qweight is int32[8, 32], {NEEDS} int32[k, 2] for n = 16. {GPTQ}"),
    "no matrix": ({"m__qweight": np.zeros(128, np.int32)},
                  f"m.qweight is int32[128], {NEEDS} two dimensions, neither of them 0. {OTHER}"),
    "dtype": ({"m__qweight": np.zeros((64, 2), np.float32)},
              f"m.qweight is float32[64, 2], {NEEDS} int32[k, 2] for n = 16. {OTHER}"),
    "short": ({"m__qweight": np.zeros((30, 2), np.int32)},
              f"m.scales is float16[2, 16], {NEEDS} 16- or 32-bit floats [1, 16]. {OTHER}"),
    "odd n": ({"m__scales": np.ones((2, 9), np.float16)},
              f"m.scales is float16[2, 9], {NEEDS} n that fills whole words, not 9. {OTHER}"),
    "integer scales": ({"m__scales": np.ones((2, 16), np.int8)},
                       f"m.scales is int8[2, 16], {NEEDS} 16- or 32-bit floats [2, 16]. {OTHER}"),
    "qzeros": ({"m__qzeros": np.zeros((2, 16), np.int32)},
               f"m.qzeros is int32[2, 16], {NEEDS} int32[2, 2]. {OTHER}"),
    "NaN": ({"m__scales": np.full((2, 16), np.nan, np.float16)},
            "m.scales: 32 of 32 are NaN or infinite. The file is damaged or the quantisation failed: fetch it again, "
            "or quantise again."),
}


@pytest.mark.parametrize("case", SHAPES)
def test_refuses_tensors_that_lie(tmp_path: Path, case: str) -> None:
    changed, message = SHAPES[case]
    assert refusal(tmp_path, settings(), FormatError, **changed) == f"{tmp_path / 'model.safetensors'}: {message}"


def test_refuses_a_wrong_group_size(tmp_path: Path) -> None:
    assert refusal(tmp_path, settings(group_size=16), FormatError) == (
        f"{tmp_path / 'model.safetensors'}: m.scales is float16[2, 16], but AWQ with group_size 16 needs 16- or 32-bit "
        f"floats [4, 16]. {OTHER}")


def test_refuses_missing_and_double_tensors(tmp_path: Path) -> None:
    for part in ("scales", "qzeros"):
        assert refusal(tmp_path, settings(), FormatError, **{f"m__{part}": None}) == (
            f"{tmp_path}: m has .qweight but no .{part}. Fetch the checkpoint again.")
    assert refusal(tmp_path, settings(), FormatError, m__weight=np.zeros((16, 64), np.float16)) == (
        f"{tmp_path}: m has both .weight and .qweight. Remove the one that is not the model's.")


CONFIGS: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "version": ({"version": "gemv"}, UnsupportedError,
                "version is 'gemv', but quern decodes AWQ's gemm layout. Take the model in that form, which most are "
                "in."),
    "format": ({"checkpoint_format": "gemv_fast"}, UnsupportedError,
               "checkpoint_format is 'gemv_fast', but quern decodes AWQ's gemm layout. Take the model in that form, "
               "which most are in."),
    "desc_act": ({"desc_act": True}, UnsupportedError, "desc_act is true, but AWQ's gemm layout has no act-order."),
    "bits": ({"bits": 3}, UnsupportedError, "bits is 3, but AWQ's gemm layout has 4 bits. Take the model with those."),
    "group_size": ({"group_size": 0}, FormatError,
                   "group_size must be -1 (one group a row) or at least 1, and the same as q_group_size where both are "
                   "given."),
    "two sizes": ({"q_group_size": 64}, FormatError,
                  "group_size must be -1 (one group a row) or at least 1, and the same as q_group_size where both are "
                  "given."),
    "no size": ({"group_size": ...}, ConfigError,
                "group_size is missing, but it must be an integer from -1 to 1048576."),
    "data_type": ({"data_type": "mx_fp"}, ConfigError, "data_type is 'mx_fp', but it must be one of 'int'."),
    "unknown": ({"rotation_config": "x"}, ConfigError,
                "rotation_config is 'x': quern does not know this key and will not guess what it changes. If it "
                "changes nothing in the computation, remove it; otherwise the model is not supported."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refuses_settings_it_does_not_know(tmp_path: Path, case: str) -> None:
    changed, kind, message = CONFIGS[case]
    assert refusal(tmp_path, settings(**changed), kind) == (
        f"{tmp_path / 'config.json'}: quantization_config.{message}")


def test_refuses_a_contradiction(tmp_path: Path) -> None:
    place = f"{tmp_path / 'config.json'}: quantization_config"
    assert refusal(tmp_path, settings(sym=True), FormatError) == (
        f"{place}.sym and {place}.zero_point contradict each other: a symmetric weight has no zero points. Set both as "
        f"the file was made.")

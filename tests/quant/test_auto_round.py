"""auto-round: which packing means what, which module has which settings, and the refusals, whole."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.checkpoint import open_checkpoint
from compiler.errors import ConfigError, FormatError, UnsupportedError, UserError
from compiler.quant.formats import open_source
from compiler.quant.ir import WeightType
from compiler.quant.reference import dequantize
from tests.checkpoint.files import write_checkpoint

GPTQ: dict[str, Any] = {
    "m.qweight": np.full((8, 16), 0x76543210, np.int32), "m.qzeros": np.full((2, 2), 0x55555555, np.int32),
    "m.scales": np.ones((2, 16), np.float16)}
AWQ = GPTQ | {"m.qweight": np.full((64, 2), 0x76543210, np.int32)}
EIGHT: dict[str, Any] = {
    "m.qweight": np.zeros((16, 16), np.int32), "m.qzeros": np.zeros((2, 4), np.int32),
    "m.scales": np.ones((2, 16), np.float16)}


def settings(**changed: Any) -> dict[str, Any]:
    config = {"bits": 4, "group_size": 32, "quant_method": "auto-round", "sym": False, "iters": 200,
              "packing_format": "auto_round:auto_gptq", **changed}
    return {"quantization_config": {key: value for key, value in config.items() if value is not ...}}


def checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] = GPTQ) -> Any:
    return open_source(open_checkpoint(write_checkpoint(folder, config, {
        "x.weight": np.ones((1, 1), np.uint16), **tensors})))


@pytest.mark.parametrize(("packing", "tensors", "zero", "first"), [
    ("auto_round:auto_gptq", GPTQ, 6, [0, 1, 2]), ("auto_round:gptq", GPTQ, 6, [0, 1, 2]),
    ("auto_round", GPTQ, 5, [0, 1, 2]), ("auto_round:gptqmodel", GPTQ, 5, [0, 1, 2]),
    ("auto_round:auto_awq", AWQ, 5, [0, 0, 0]),
])
def test_packings(tmp_path: Path, packing: str, tensors: dict[str, np.ndarray], zero: int, first: list[int]) -> None:
    source = checkpoint(tmp_path, settings(packing_format=packing), tensors)
    w = source.load("m")
    assert source.describe("m") == w.type == WeightType(16, 64, "int4", 32)
    assert w.zero.tolist() == [[zero, zero]] * 16
    assert w.codes[0, :3].tolist() == first
    assert source.describe("x").grid == "bfloat16"


# The first inputs of the first rows of a q_proj in float16: what the two quantisers below were given.
ORIGINAL = np.array([
    [0.024383544921875, -0.0830078125, -0.0023212432861328125, 0.02117919921875],
    [0.013427734375, 0.0687255859375, 0.07623291015625, -0.04095458984375],
    [0.037261962890625, 0.010711669921875, 0.09686279296875, 0.177490234375],
    [0.195068359375, -0.0692138671875, 0.06634521484375, 0.10943603515625],
    [0.036712646484375, 0.06683349609375, 0.0207977294921875, -0.0736083984375],
    [-0.00565338134765625, 0.11981201171875, 0.00763702392578125, -0.04534912109375],
    [-0.044525146484375, 0.00548553466796875, -0.022430419921875, 0.022247314453125],
    [-0.004669189453125, 0.026397705078125, -0.06488037109375, -0.051177978515625]])


def test_a_corner_of_a_real_file(tmp_path: Path) -> None:
    """Eight inputs and outputs that auto-round 0.16.1 wrote: negative scales, and every weight near its original."""
    def words(*values: int) -> np.ndarray:
        return np.array([values], np.uint32).view(np.int32)

    scales = [-0.033203125, 0.028564453125, 0.0255126953125, 0.028564453125, -0.025390625, 0.0272216796875,
              -0.0303955078125, -0.02880859375]
    w = checkpoint(tmp_path, settings(sym=True, group_size=-1), {
        "m.qweight": words(0x669678A7, 0x4AA77BA8, 0x7CDCFC89, 0x79A3CA6F, 0x6763B757, 0x988568C8, 0x6A9D7989,
                           0x6676AA78),
        "m.qzeros": words(0x77777777), "m.scales": np.array([scales], np.float16)}).load("m")
    step = np.abs(scales)[:, None]
    assert (np.abs(dequantize(w)[:, :4] - ORIGINAL) < step).all()  # rounding is tuned by up to half a step


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round"])
def test_spellings(tmp_path: Path, method: str) -> None:
    assert checkpoint(tmp_path, settings(quant_method=method)).load("m").type.grid == "int4"


@pytest.mark.parametrize(("extra", "bits"), [
    ({"m": {"bits": 8}}, 8), ({"[a-m]$": {"bits": 8}}, 8),
    ({".*m.*": {"bits": 8, "data_type": "int", "act_bits": 16}}, 8),
    ({"other": {"bits": 8}}, 4), ({"x": {"bits": 8}}, 4), ({"x": {"bits": 16, "data_type": "float"}}, 4),
    ({".*": {"bits": 8}, "m": {"group_size": 32}}, 4),  # a name goes before any pattern
])
def test_modules_that_differ(tmp_path: Path, extra: dict[str, Any], bits: int) -> None:
    source = checkpoint(tmp_path, settings(extra_config=extra), EIGHT if bits == 8 else GPTQ)
    assert source.describe("m").bits == source.load("m").type.bits == bits


def refusal(folder: Path, config: dict[str, Any], kind: type[UserError]) -> str:
    with pytest.raises(kind) as error:
        checkpoint(folder, config).load("m")
    assert type(error.value) is kind
    return str(error.value)


UNKNOWN = ("quern does not know this key and will not guess what it changes. If it changes nothing in the computation, "
           "remove it; otherwise the model is not supported.")
CONFIGS: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "packing": ({"packing_format": "auto_round:fp8_static"}, ConfigError,
                "packing_format is 'auto_round:fp8_static', but it must be one of 'auto_round:auto_gptq', "
                "'auto_round:gptq', 'auto_round', 'auto_round:gptqmodel', 'auto_round:auto_awq', 'auto_round:awq'."),
    "no packing": ({"packing_format": ...}, ConfigError,
                   "packing_format is missing, but it must be one of 'auto_round:auto_gptq', 'auto_round:gptq', "
                   "'auto_round', 'auto_round:gptqmodel', 'auto_round:auto_awq', 'auto_round:awq'."),
    "bits": ({"bits": 7}, UnsupportedError,
             "bits is 7, but quern decodes auto-round with 2, 3, 4, 8 bits. Take the model with one of these."),
    "dense": ({"bits": 16}, FormatError,
              "bits is more than 8, so nothing is quantised. Remove quantization_config if the weights are dense."),
    "group_size": ({"group_size": 0}, FormatError,
                   "group_size is 0, but it must be -1 (one group a row) or at least 1."),
    "activations": ({"act_bits": 8}, UnsupportedError,
                    "act_bits is at most 8: weights packed for quantised activations are not supported. Take the model "
                    "with quantised weights only."),
    "data_type": ({"data_type": "mx_fp"}, ConfigError, "data_type is 'mx_fp', but it must be one of 'int'."),
    "AWQ bits": ({"packing_format": "auto_round:auto_awq", "bits": 8}, UnsupportedError,
                 "bits: 8 bits, but AWQ's gemm layout has 4. Take the model so."),
    "rotation": ({"rotation_config": {"block": 32}}, ConfigError, f'rotation_config is {{"block": 32}}: {UNKNOWN}'),
    "super": ({"extra_config": {"m": {"super_bits": 6}}}, ConfigError, f"extra_config.m.super_bits is 6: {UNKNOWN}"),
    "pattern": ({"extra_config": {"(?=m)": {"bits": 8}}}, UnsupportedError,
                "extra_config.(?=m) is a pattern that quern does not match: invalid perl operator: (?=. Write it "
                "without lookaround and back references, or name the modules."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refuses_settings_it_does_not_know(tmp_path: Path, case: str) -> None:
    changed, kind, message = CONFIGS[case]
    assert refusal(tmp_path, settings(**changed), kind) == (
        f"{tmp_path / 'config.json'}: quantization_config.{message}")


def test_refuses_tensors_of_another_packing(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    assert refusal(tmp_path, settings(packing_format="auto_round:auto_awq"), FormatError) == (
        f"{file}: m.qweight is int32[8, 16], but AWQ with group_size 32 needs int32[k, 2] for n = 16. This looks like "
        f"GPTQ: if it is, config.json must say quant_method = 'gptq'.")
    assert refusal(tmp_path, settings(sym=True), FormatError) == (
        f"{file}: m.qzeros: a zero is 6, but sym = true needs 8 everywhere. If sym is right, checkpoint_format is "
        f"wrong: 'gptq' stores zero - 1, 'gptq_v2' stores zero.")
    for packing in ("auto_round", "auto_round:auto_awq"):
        tensors = AWQ if "awq" in packing else GPTQ
        config = settings(packing_format=packing, extra_config={"m": {"bits": 16}})
        with pytest.raises(FormatError) as error:
            checkpoint(tmp_path, config, tensors).load("m")
        assert str(error.value) == (
            f"{file}: m is quantised, but config.json says that this module is not. The configuration belongs to "
            f"another checkpoint, or was edited.")

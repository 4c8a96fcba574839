"""bitsandbytes: a block by hand, the library's own dequantisation and logits, and what is refused."""
from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoint import open_checkpoint
from compiler.errors import FormatError, UnsupportedError, UserError
from compiler.quant.formats import open_source
from compiler.quant.grids import GRIDS
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from compiler.quant.reference import dequantize
from compiler.quant.source import Source
from tests.checkpoint.files import write_checkpoint
from tests.quant import samples

# float32 forwards of equal weights differ by the order of summation only: see tests/quant/test_real_checkpoints.py.
LOGITS_TOLERANCE = 5e-5
# The int8 samples record (q * SCB) / 127. The library's forward, and quern, take q * (SCB * (1 / 127)): three roundings
# of half a unit in the last place each may differ, so weights by 2 units, and logits by what those move.
INT8_RELATIVE = 2.0 ** -22
SAMPLES = ("bitsandbytes-nf4", "bitsandbytes-nf4-dq", "bitsandbytes-fp4", "bitsandbytes-int8")
NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
NF4 = GRIDS["nf4"].table


def as_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def four_bits(**changed: Any) -> dict[str, Any]:
    """One NF4 module of [2, 64]; a change of None leaves a tensor out."""
    parts: dict[str, Any] = {
        "weight": np.full((64, 1), 0x1F, np.uint8), "absmax": np.array([2, 3], np.float32), "quant_map": NF4,
        "state": as_bytes(STATE), **changed}
    spelled = {"weight": "m.weight", "state": "m.weight.quant_state.bitsandbytes__nf4"}
    return {spelled.get(part, f"m.weight.{part}"): array for part, array in parts.items() if array is not None}


def source(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Source:
    named = {"quantization_config": config or NF4_CONFIG}
    return open_source(open_checkpoint(write_checkpoint(folder, named, tensors)))


def refusal(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None,
            kind: type[UserError] = FormatError) -> str:
    with pytest.raises(kind) as error:
        source(folder, tensors, config).load("m")
    return str(error.value).replace(f"{folder}/model.safetensors", "FILE").replace(f"{folder}", "DIR")


def test_a_block_by_hand(tmp_path: Path) -> None:  # 0x1F: code 1 comes first, -0.696, then code 15, 1
    four = source(tmp_path, four_bits())
    assert four.describe("m") == WeightType(2, 64, "nf4", 64, "float32")
    w = four.load("m")
    assert isinstance(w, QuantWeight)
    assert w.type == four.describe("m")
    assert w.codes[0, :4].tolist() == [1, 15, 1, 15]
    assert dequantize(w)[1, :2].tolist() == [3 * NF4[1], 3.0]


def test_double_quantisation_by_hand(tmp_path: Path) -> None:  # absmax = map[code] * outer + offset
    table = np.zeros(256, np.float32)
    table[7], table[9] = 0.25, -0.5
    four = source(tmp_path, four_bits(
        absmax=np.array([7, 9], np.uint8), nested_absmax=np.array([8], np.float32), nested_quant_map=table,
        state=as_bytes({**STATE, **NESTED})))
    w = four.load("m")
    assert isinstance(w, QuantWeight)
    assert w.scale.tolist() == [[2.5], [-3.5]]


def test_int8_by_hand(tmp_path: Path) -> None:
    eight = source(tmp_path, {"m.weight": np.array([[-128, 0, 127]], np.int8), "m.SCB": np.array([254], np.float32),
                              "m.weight_format": np.array(0, np.uint8)}, INT8_CONFIG)
    assert eight.describe("m") == WeightType(1, 3, "int8", 3, "float32", symmetric=True)
    w = eight.load("m")
    assert isinstance(w, QuantWeight)
    assert w.codes.tolist() == [[0, 128, 255]]
    assert dequantize(w).tolist() == [[-256, 0, 254]]


def test_storage_of_any_dtype_holds_the_same_bytes(tmp_path: Path) -> None:
    bytes_ = np.arange(64, dtype=np.uint8)
    plain = source(tmp_path, four_bits(weight=bytes_.reshape(64, 1))).load("m")
    stored = source(tmp_path, four_bits(weight=bytes_.view(np.float16).reshape(32, 1)),
                    {**NF4_CONFIG, "bnb_4bit_quant_storage": "float16"}).load("m")
    assert isinstance(plain, QuantWeight)
    assert isinstance(stored, QuantWeight)
    assert np.array_equal(plain.codes, stored.codes)


@pytest.mark.parametrize("name", SAMPLES)
def test_weights_equal_the_library(name: str) -> None:
    folder = samples.folder("checkpoints", name)
    decoded, recorded = open_source(open_checkpoint(folder)), np.load(folder / "logits.npz")
    modules = [key.removeprefix("dequant:") for key in recorded if key.startswith("dequant:")]
    assert modules
    for module in modules:
        w = decoded.load(module)
        assert isinstance(w, QuantWeight)
        assert w.type == decoded.describe(module)
        mine, theirs = dequantize(w), recorded[f"dequant:{module}"]
        if name.endswith("int8"):
            assert (np.abs(mine - theirs) <= INT8_RELATIVE * np.abs(theirs)).all()
        else:
            assert np.array_equal(mine, theirs)


def test_int8_takes_the_order_of_the_library_forward() -> None:
    torch = pytest.importorskip("torch")
    folder = samples.folder("checkpoints", "bitsandbytes-int8")
    checkpoint = open_checkpoint(folder)
    decoded = open_source(checkpoint)
    for module in decoded.modules():
        if f"{module}.SCB" in checkpoint.tensors:
            q = torch.from_numpy(checkpoint.array(f"{module}.weight").copy()).float()
            row_max = torch.from_numpy(checkpoint.array(f"{module}.SCB").copy())
            forward = q.mul_(row_max.unsqueeze(1).mul(1.0 / 127.0))  # bitsandbytes 0.50.2, autograd/_functions.py:264
            assert np.array_equal(dequantize(decoded.load(module)), forward.numpy())


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_models_give_the_recorded_logits(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = samples.folder("checkpoints", name)
    decoded = open_source(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    model.load_state_dict({
        key: torch.from_numpy(dequantize(decoded.load(key.removesuffix(".weight"))) if value.ndim == 2
                              else decoded.vector(key))
        for key, value in model.state_dict().items()})
    recorded = np.load(folder / "logits.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(recorded["input_ids"])).logits.numpy()
    assert np.abs(logits - recorded["logits_dequant_fp32"]).max() < LOGITS_TOLERANCE


def test_codes_repack_to_the_same_bytes() -> None:
    for name in ("bitsandbytes-nf4", "bitsandbytes-fp4"):
        checkpoint = open_checkpoint(samples.folder("checkpoints", name))
        module = "model.layers.0.mlp.gate_proj"
        w = open_source(checkpoint).load(module)
        assert isinstance(w, QuantWeight)
        pairs = w.codes.reshape(-1, 2)
        assert np.array_equal(pairs[:, 0] << 4 | pairs[:, 1], checkpoint.array(f"{module}.weight")[:, 0])
        assert np.array_equal(w.scale.reshape(-1), checkpoint.array(f"{module}.weight.absmax"))


AGAIN = "Fetch the checkpoint again."
WHERE = "FILE: m.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(("changed", "message"), [
    ({"weight": np.zeros((63, 1), np.uint8)},
     f"FILE: m.weight is uint8[63, 1], but a nf4 weight of [2, 64] needs uint8[64, 1]. {AGAIN}"),
    ({"absmax": np.ones(3, np.float32)}, f"FILE: m.weight.absmax is float32[3], but must be float32[2]. {AGAIN}"),
    ({"absmax": None}, f"DIR has no tensor m.weight.absmax, which bitsandbytes writes. {AGAIN}"),
    ({"absmax": np.array([1, np.nan], np.float32)},
     "FILE: m.weight.absmax: 1 of 2 are NaN or infinite. The file is damaged or the quantisation failed: fetch it "
     "again, or quantise again."),
    ({"state": None}, "FILE: m.weight has 0 quant_states, but needs one of quant_state.bitsandbytes__nf4, "
                      f"quant_state.bitsandbytes__fp4. {AGAIN[:-1]}, or save it again with a current bitsandbytes."),
    ({"state": np.frombuffer(b"[" * 4000, np.uint8)}, f"{WHERE}: not JSON. {AGAIN}"),
    ({"state": np.zeros(5000, np.uint8)},
     f"{WHERE[:5]} {WHERE[6:]} is uint8[5000], but must be JSON in at most uint8[4096]. {AGAIN}"),
    ({"state": as_bytes([])}, f"{WHERE}: not a JSON object. {AGAIN}"),
    ({"state": as_bytes({**STATE, "new": 1})}, f"{WHERE}: has the key 'new', which quern does not know. {AGAIN}"),
    ({"state": as_bytes({**STATE, "quant_type": "fp4"})}, f"{WHERE} says quant_type 'fp4'. {AGAIN}"),
    ({"state": as_bytes({**STATE, "shape": [2, 1 << 60]})},
     f"{WHERE}: shape is [2, 1152921504606846976], but must be two positive integers. {AGAIN}"),
    ({"state": as_bytes({**STATE, "blocksize": 0})},
     f"{WHERE}: blocksize is '0', but must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096. {AGAIN}"),
    ({"state": as_bytes({**STATE, **NESTED, "nested_offset": 1e99}), "absmax": np.zeros(2, np.uint8)},
     f"{WHERE}: nested_offset is '1e+99', but must be a finite number. {AGAIN}"),
])
def test_refuses_tensors_that_disagree(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    assert refusal(tmp_path, four_bits(**changed)) == message


def test_refuses_what_it_cannot_mean(tmp_path: Path) -> None:
    straddling = four_bits(state=as_bytes({**STATE, "shape": [4, 32]}))
    assert refusal(tmp_path, straddling, kind=UnsupportedError) == (
        f"{WHERE}: rows of 32 are no multiple of blocksize 64, so that one scale reaches across rows. Quantise "
        f"with a blocksize that divides 32, or take the model unquantised and give --bits 4.")
    other = four_bits(quant_map=np.linspace(-1, 1, 16, dtype=np.float32))
    assert refusal(tmp_path, other, kind=UnsupportedError) == (
        "FILE: m.weight.quant_map is not the standard nf4 table. Quantise the model with an unchanged bitsandbytes.")
    turned = {"m.weight": np.ones((1, 4), np.int8), "m.SCB": np.ones(1, np.float32),
              "m.weight_format": np.array(2, np.uint8)}
    assert refusal(tmp_path, turned, INT8_CONFIG, UnsupportedError) == (
        "FILE: m.weight_format is not 0 (row-major): the weight lies as a GPU kernel wants it. Save the model again "
        "with a current bitsandbytes.")


def test_refuses_configurations_of_other_checkpoints(tmp_path: Path) -> None:
    edited = "The configuration belongs to another checkpoint, or was edited."
    eight = {"m.weight": np.ones((1, 4), np.int8), "m.SCB": np.ones(1, np.float32)}
    assert refusal(tmp_path, four_bits(), INT8_CONFIG) == (
        f"FILE: m has 4-bit tensors, but the quantisation configuration says load_in_8bit. {edited}")
    assert refusal(tmp_path, eight) == (
        f"FILE: m has 8-bit tensors, but the quantisation configuration says load_in_4bit. {edited}")
    assert refusal(tmp_path, four_bits(), {**NF4_CONFIG, "bnb_4bit_quant_type": "fp4"}) == (
        f"FILE: m.weight is nf4, but the quantisation configuration says bnb_4bit_quant_type = 'fp4'. {edited}")
    assert refusal(tmp_path, four_bits(), {"quant_method": "bitsandbytes"}) == (
        "DIR/config.json: quantization_config.load_in_4bit and load_in_8bit are neither true, but a checkpoint has one "
        "of the two. Set the one that the tensors have.")
    gptq = {"m.qweight": np.zeros((8, 8), np.int32), "m.weight": np.ones((2, 2), np.int8)}
    assert refusal(tmp_path, gptq) == (
        "FILE: m.weight is int8[2, 2], but a dense weight needs two dimensions and one of float16, bfloat16, float32. "
        "If it is quantised, config.json must say how.")


SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
           | st.sampled_from(["nf4", "fp4"]))


@settings(max_examples=120, deadline=2000, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from([*STATE, *NESTED, "other"]), value=SCALARS | st.lists(SCALARS, max_size=3),
       drop=st.sampled_from(["", *four_bits()]), raw=st.none() | st.binary(max_size=60), nested=st.booleans())
def test_any_state_ends_in_a_weight_or_one_error(
        tmp_path: Path, key: str, value: Any, drop: str, raw: bytes | None, nested: bool) -> None:
    state = {**STATE, **(NESTED if nested else {}), key: value}
    text = as_bytes(state) if raw is None else np.frombuffer(raw, np.uint8)
    tensors = {name: array for name, array in four_bits(state=text).items() if name != drop}
    with contextlib.suppress(UserError):
        opened = source(tmp_path, tensors)
        for module in opened.modules():
            loaded = opened.load(module)
            assert isinstance(loaded, QuantWeight | DenseWeight)
            assert loaded.type == opened.describe(module)

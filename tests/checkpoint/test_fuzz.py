"""Whatever stands in a file, reading it ends in a value or in one UserError, soon and without much memory."""
from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compiler.checkpoint import open_checkpoint
from compiler.errors import UserError
from compiler.quant.formats import open_source
from compiler.quant.ir import QuantWeight
from tests.checkpoint.files import header, write_raw

PEAK_BYTES = 4 << 20  # the whole folder has 3 KB; parsing, checking and decoding it must not multiply that by 1000
Sample = tuple[dict[str, Any], dict[str, np.ndarray]]  # config.json's quantization_config, tensors
NORM = {"norm.weight": np.ones(32, np.uint16)}
PACKED: dict[str, Any] = {
    "l.qweight": np.full((4, 8), 0x76543210, np.int32), "l.qzeros": np.full((1, 1), 0x77777777, np.int32),
    "l.scales": np.full((1, 8), 0.5, np.float16)}
SAMPLES: dict[str, Sample] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
              "dynamic": {"lm_head": {"bits": 8}, "-:.*x": {}}, "meta": {"quantizer": ["gptqmodel:7"]}},
             PACKED | {"l.g_idx": np.zeros(32, np.int32)}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
             "modules_to_not_convert": ["lm_head"]}, PACKED | {"l.qweight": np.full((32, 1), 0x76543210, np.int32)}),
    "auto_round": ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "iters": 2,
                    "packing_format": "auto_round:auto_gptq", "extra_config": {"l": {"sym": False}, "x": {"bits": 16}}},
                   PACKED),
    "compressed_packed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {
            "g": {"targets": ["Linear", "re:.*x"], "input_activations": None, "weights": {
                "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 16,
                "actorder": "group"}}}},
        {"l.weight_packed": np.full((8, 4), 0x76543210, np.int32), "l.weight_shape": np.array([8, 32], np.int64),
         "l.weight_scale": np.ones((8, 2), np.float32), "l.weight_zero_point": np.zeros((1, 2), np.int32),
         "l.weight_g_idx": np.array([0, 1] * 16, np.int32)}),
    "compressed_plain": (
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {
            "g": {"targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
                  "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}},
        {"l.weight": np.ones((8, 32), np.int8), "l.weight_scale": np.ones((8, 1), np.float16)}),
}
GPTQ = SAMPLES["gptq"]


def config_of(sample: Sample) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 32, "quantization_config": sample[0]}


def tensors_of(sample: Sample) -> tuple[dict[str, Any], bytes]:
    return header(sample[1] | NORM | {"l.bias": np.ones(8, np.float16)})


SETTINGS = settings(max_examples=150, deadline=2000, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = (st.none() | st.booleans() | st.integers() | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**19, 10**30])
           | st.floats() | st.text(max_size=8) | st.sampled_from(["F16", "I32", "BF16", "F8_E4M3", "gptq", "gptq_v2"]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, child in children for place in places(child, (*path, key))]


@st.composite
def mutated(draw: st.DrawFn, value: dict[str, Any]) -> dict[str, Any]:
    """A copy with one to three places replaced, removed or renamed."""
    copy: dict[str, Any] = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(copy) or [("x",)]))
        inner: Any = copy
        for key in path[:-1]:
            inner = inner[key]
        action = draw(st.sampled_from(["replace", "remove", "rename"]))
        if action == "replace" or path[-1] not in (inner if isinstance(inner, dict) else range(len(inner))):
            inner[path[-1]] = draw(VALUES)
        elif action == "remove":
            del inner[path[-1]]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=8))] = inner.pop(path[-1])
    return copy


def read_everything(folder: Path) -> None:
    """Open, describe and load all there is; only a UserError may come out."""
    message = ""
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.array(name)
        source = open_source(checkpoint)
        for module in source.modules():
            loaded = source.load(module)
            assert loaded.type == source.describe(module)
            assert not isinstance(loaded, QuantWeight) or loaded.codes.shape == loaded.stored.shape
            source.bias(module)
        source.vector("norm")
    except UserError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(message) < 2000
    assert message.isprintable()
    assert peak < PEAK_BYTES


def write(folder: Path, config: bytes, text: bytes, data: bytes, length: int | None = None) -> None:
    (folder / "config.json").write_bytes(config)
    write_raw(folder / "model.safetensors", text, data, length)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_sound(tmp_path: Path, name: str) -> None:
    entries, data = tensors_of(SAMPLES[name])
    write(tmp_path, json.dumps(config_of(SAMPLES[name])).encode(), json.dumps(entries).encode(), data)
    source = open_source(open_checkpoint(tmp_path))
    assert (source.describe("l").n, source.describe("l").k) == (8, 32)
    assert source.bias("l") is not None


@pytest.mark.parametrize("name", SAMPLES)
@SETTINGS
@given(data=st.data())
def test_mutated_headers(tmp_path: Path, name: str, data: st.DataObject) -> None:
    entries, content = tensors_of(SAMPLES[name])
    entries = data.draw(mutated(entries))
    write(tmp_path, json.dumps(config_of(SAMPLES[name])).encode(), json.dumps(entries).encode(), content)
    read_everything(tmp_path)


@pytest.mark.parametrize("name", SAMPLES)
@SETTINGS
@given(data=st.data())
def test_mutated_configs(tmp_path: Path, name: str, data: st.DataObject) -> None:
    entries, content = tensors_of(SAMPLES[name])
    config = data.draw(mutated(config_of(SAMPLES[name])))
    write(tmp_path, json.dumps(config).encode(), json.dumps(entries).encode(), content)
    read_everything(tmp_path)


@pytest.mark.parametrize("name", SAMPLES)
@SETTINGS
@given(place=st.integers(0, 3000), byte=st.integers(0, 255), cut=st.integers(0, 3000), which=st.booleans())
def test_flipped_bytes_and_cuts(tmp_path: Path, name: str, place: int, byte: int, cut: int, which: bool) -> None:
    entries, data = tensors_of(SAMPLES[name])
    write(tmp_path, json.dumps(config_of(SAMPLES[name])).encode(), json.dumps(entries).encode(), data)
    file = tmp_path / ("model.safetensors" if which else "config.json")
    content = bytearray(file.read_bytes())
    content[place % len(content)] = byte
    file.write_bytes(content if cut % 3 else content[:cut % len(content)])
    read_everything(tmp_path)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(.*)*" * 100, "(x{100}){10}" * 9, r"(\w+\s?)*$", ".*" * 500, "a" * 999])
def test_patterns_of_a_stranger_end_soon(tmp_path: Path, pattern: str) -> None:
    """Expressions that take a backtracking matcher years, against a module's long name."""
    module = "l." + "a" * 5000
    tensors = {f"{module}.{part.removeprefix('l.')}": value for part, value in GPTQ[1].items()}
    entries, data = header(tensors | NORM)
    config = {"quantization_config": GPTQ[0] | {"dynamic": {pattern: {"bits": 4}}}}
    write(tmp_path, json.dumps(config).encode(), json.dumps(entries).encode(), data)
    read_everything(tmp_path)


@SETTINGS
@given(text=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes(tmp_path: Path, text: bytes, length: int | None) -> None:
    write(tmp_path, json.dumps(config_of(GPTQ)).encode(), text, b"", length)
    read_everything(tmp_path)


@pytest.mark.parametrize("text", [
    b'{"t":' + b"[" * 2_000_000, b'{"t":' + b"9" * 2_000_000 + b"}", b'{"t":' + b'{"a":' * 200_000,
    b"{" + b",".join(b'"k%d":{}' % i for i in range(50_000)) + b"}",
])
def test_large_hostile_headers_end_soon(tmp_path: Path, text: bytes) -> None:
    write(tmp_path, b"{}", text, b"")
    with pytest.raises(UserError):
        open_checkpoint(tmp_path)

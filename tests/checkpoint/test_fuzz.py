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
from tests.checkpoint.files import header, write_raw

PEAK_BYTES = 4 << 20  # the whole folder has 3 KB; parsing, checking and decoding it must not multiply that by 1000
TENSORS: dict[str, np.ndarray] = {
    "l.qweight": np.full((4, 8), 0x76543210, np.int32),
    "l.qzeros": np.full((1, 1), 0x77777777, np.int32),
    "l.scales": np.full((1, 8), 0.5, np.float16),
    "l.g_idx": np.zeros(32, np.int32),
    "norm.weight": np.ones(32, np.uint16),
}
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32,
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
                            "dynamic": {"lm_head": {"bits": 8}}, "meta": {"quantizer": ["gptqmodel:7"]}},
}
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
            assert source.load(module).type == source.describe(module)
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


@SETTINGS
@given(entries=mutated(header(TENSORS)[0]))
def test_mutated_headers(tmp_path: Path, entries: dict[str, Any]) -> None:
    write(tmp_path, json.dumps(CONFIG).encode(), json.dumps(entries).encode(), header(TENSORS)[1])
    read_everything(tmp_path)


@SETTINGS
@given(config=mutated(CONFIG))
def test_mutated_configs(tmp_path: Path, config: dict[str, Any]) -> None:
    entries, data = header(TENSORS)
    write(tmp_path, json.dumps(config).encode(), json.dumps(entries).encode(), data)
    read_everything(tmp_path)


@SETTINGS
@given(place=st.integers(0, 3000), byte=st.integers(0, 255), cut=st.integers(0, 3000), which=st.booleans())
def test_flipped_bytes_and_cuts(tmp_path: Path, place: int, byte: int, cut: int, which: bool) -> None:
    entries, data = header(TENSORS)
    write(tmp_path, json.dumps(CONFIG).encode(), json.dumps(entries).encode(), data)
    file = tmp_path / ("model.safetensors" if which else "config.json")
    content = bytearray(file.read_bytes())
    content[place % len(content)] = byte
    file.write_bytes(content if cut % 3 else content[:cut % len(content)])
    read_everything(tmp_path)


@SETTINGS
@given(text=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes(tmp_path: Path, text: bytes, length: int | None) -> None:
    write(tmp_path, json.dumps(CONFIG).encode(), text, b"", length)
    read_everything(tmp_path)


@pytest.mark.parametrize("text", [
    b'{"t":' + b"[" * 2_000_000, b'{"t":' + b"9" * 2_000_000 + b"}", b'{"t":' + b'{"a":' * 200_000,
    b"{" + b",".join(b'"k%d":{}' % i for i in range(50_000)) + b"}",
])
def test_large_hostile_headers_end_soon(tmp_path: Path, text: bytes) -> None:
    write(tmp_path, b"{}", text, b"")
    with pytest.raises(UserError):
        open_checkpoint(tmp_path)

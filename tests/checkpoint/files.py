"""Checkpoint folders for tests, written byte by byte here, so that reader and writer share no code."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SPELLED = {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8", "int8": "I8",
           "uint16": "BF16"}


def header(tensors: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The header as a dictionary, and the data. uint16 arrays stand for bfloat16."""
    entries, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        entries[name] = {"dtype": SPELLED[str(array.dtype)], "shape": list(array.shape),
                         "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return entries, data


def write_raw(path: Path, text: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file from its parts, whatever they are."""
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A correct file."""
    entries, data = header(tensors)
    return write_raw(path, json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode(), data)


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder

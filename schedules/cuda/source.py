"""Kernel text: what lies in a .cu file beside this one, with the constants of a shape in front.

The text of a kernel stands in a namespace of its own name, so that several kernels may share a source. `KERNEL` in a
file stands for the kernel's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent


Constant = int | float | str | tuple[float, ...]


def source(name: str, constants: Mapping[str, Constant], *files: str, entry: str = "") -> str:
    """CUDA C++ of the files, then the text `entry`; a constant that is a text names a type."""
    lines = ['#include "quern.cuh"', f"namespace {name}_ {{", *(_constant(*pair) for pair in constants.items())]
    lines += [re.sub(r"\bKERNEL(?=_|\b)", name, text) for text in (*map(_text, files), entry)]
    return "\n".join([*lines, "}  // namespace", f"using namespace {name}_;", ""])


def _constant(name: str, value: Constant) -> str:
    if isinstance(value, str):
        return f"typedef {value} {name};"
    if isinstance(value, tuple):
        numbers = ", ".join(f"static_cast<float>({float(number)!r})" for number in value)
        return f"constexpr float {name}[] = {{{numbers}}};"
    if isinstance(value, float):
        return f"constexpr float {name} = static_cast<float>({value!r});"
    return f"constexpr int {name} = {value};"


@cache
def _text(file: str) -> str:
    return (FOLDER / file).read_text(encoding="utf-8")

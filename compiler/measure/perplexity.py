"""Perplexity of a bundle, beside its speed: that no speed is bought with accuracy unseen.

The text's ids are cut into windows; each is seen alone, and the second half of its tokens is scored, as
llama-perplexity does it. A peer gets the very same ids: where it takes text only, each id is written as one character
that its model file names so (gguf_model.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.errors import UnsupportedError, UserError
from compiler.measure.process import Process
from runtime.bundle import Bundle
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from compiler.measure.peers import Side

WINDOW = 256  # tokens
FEWEST_WINDOWS = 2  # llama-perplexity refuses less


def windows(bundle: Bundle, text: Path, most: int | None = None) -> list[list[int]]:
    """Whole windows of the text's ids, the tokenizer's start token once; the rest at the end is dropped."""
    size = min(WINDOW, bundle.manifest.model.context)
    try:
        ids = Tokenizer(bundle.tokenizer).encode(text.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: is no UTF-8 text: {error.reason} at byte {error.start}.") from None
    parts = [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
    if len(parts) < FEWEST_WINDOWS:
        raise UserError(
            f"{text}: has {len(ids)} tokens, but perplexity needs at least {FEWEST_WINDOWS} windows of {size}. "
            f"Take a longer text."
        )
    return parts[:most]


def beside(sides: Sequence[Side], parts: list[list[int]]) -> list[float | None]:
    """Of every engine; None where one cannot say, and its reason on stderr: the others' figures are worth having."""
    found: list[float | None] = []
    for side in sides:
        try:
            found.append(side.perplexity(parts))
        except UnsupportedError as error:  # noqa: PERF203 an engine takes seconds
            found.append(None)
            print(f"no perplexity of {error}", file=sys.stderr)  # noqa: T201
    return found


def perplexity(process: Process, parts: list[list[int]]) -> float:
    """exp of the mean negative log-likelihood of the second halves."""
    total, count = 0.0, 0
    for window in parts:
        first = len(window) // 2
        total += float(process.ask("losses", window=window, first=first)["sum"])
        count += len(window) - 1 - first
    return math.exp(total / count)

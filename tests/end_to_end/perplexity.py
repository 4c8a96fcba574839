"""Perplexity as the models' README measures it: non-overlapping windows, the first token of each unscored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

WINDOW = 256  # tokens

Logits = Callable[[list[int]], NDArray[np.float32]]


def windows(text: str, tokenizer: Path, size: int = WINDOW) -> list[list[int]]:
    """The text's ids, with the tokenizer's start token once, cut into whole windows; the rest at the end is dropped."""
    reader = Tokenizer.from_file(str(tokenizer))
    reader.no_truncation()  # GPTQModel leaves that of its calibration switched on
    ids = reader.encode(text).ids
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def perplexity(logits: Logits, parts: Sequence[list[int]]) -> float:
    """exp of the mean negative log-likelihood; `logits` gives f32[n, vocab] of a window seen alone."""
    losses = []
    for ids in parts:
        rows = logits(ids)[:-1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        losses.append(-rows[np.arange(len(ids) - 1), ids[1:]])
    return float(np.exp(np.concatenate(losses).mean()))

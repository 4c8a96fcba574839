"""Qwen2 against transformers: biases, tied embeddings, and a window in the upper layers where it is switched on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2Config

from tests.models import oracle


@pytest.mark.parametrize("window", [False, True])
def test_agrees_with_transformers(tmp_path: Path, window: bool) -> None:
    config = Qwen2Config(
        **oracle.SMALL, tie_word_embeddings=True, use_sliding_window=window, sliding_window=9, max_window_layers=1
    )
    oracle.check(tmp_path, config, int8=not window)

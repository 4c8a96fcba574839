"""Qwen2 against transformers: biases, tied embeddings, and a window in the upper layers where it is switched on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2Config

from tests.models import gguf_oracle, oracle


@pytest.mark.parametrize("window", [False, True])
def test_agrees_with_transformers(tmp_path: Path, window: bool) -> None:
    config = Qwen2Config(
        **oracle.SMALL, tie_word_embeddings=True, use_sliding_window=window, sliding_window=9, max_window_layers=1
    )
    oracle.check(tmp_path, config, int8=not window)


def test_the_same_from_gguf(tmp_path: Path) -> None:
    gguf_oracle.check(tmp_path, Qwen2Config(**oracle.SMALL, tie_word_embeddings=True), "qwen2")


def test_yarn_from_gguf(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
    own = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 24}
    gguf_oracle.check(tmp_path, Qwen2Config(**oracle.SMALL, rope_parameters=yarn), "qwen2", metadata=own)

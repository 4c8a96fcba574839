"""Mistral against transformers, over a prompt of several windows."""

from __future__ import annotations

from pathlib import Path

from transformers import MistralConfig

from tests.models import gguf_oracle, oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    oracle.check(tmp_path, MistralConfig(**oracle.SMALL, head_dim=20, sliding_window=9))


def test_the_same_from_gguf(tmp_path: Path) -> None:  # where it is a llama, and has no window
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = MistralConfig(**oracle.SMALL, head_dim=16, sliding_window=None, rope_parameters=rope)
    own = {"vocab_size": 131, "rope.dimension_count": 16}
    gguf_oracle.check(tmp_path, config, "llama", permuted=True, metadata=own)

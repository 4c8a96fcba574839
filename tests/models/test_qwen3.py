"""Qwen3 against transformers: QK norm a head, and heads wider than the hidden state."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3Config

from tests.models import gguf_oracle, oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    oracle.check(tmp_path, Qwen3Config(**oracle.SMALL, head_dim=24))


def test_the_same_from_gguf(tmp_path: Path) -> None:
    gguf_oracle.check(tmp_path, Qwen3Config(**oracle.SMALL, head_dim=20), "qwen3")

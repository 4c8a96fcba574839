"""Mistral against transformers, over a prompt of several windows."""

from __future__ import annotations

from pathlib import Path

from transformers import MistralConfig

from tests.models import oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    oracle.check(tmp_path, MistralConfig(**oracle.SMALL, head_dim=20, sliding_window=9))

"""OLMo 2 against transformers: post-norms, and QK norm over all heads together."""

from __future__ import annotations

from pathlib import Path

from transformers import Olmo2Config

from tests.models import gguf_oracle, oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    oracle.check(tmp_path, Olmo2Config(**oracle.SMALL, attention_bias=True))


def test_the_same_from_gguf(tmp_path: Path) -> None:
    gguf_oracle.check(tmp_path, Olmo2Config(**oracle.SMALL), "olmo2")

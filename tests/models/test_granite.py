"""Granite against transformers: four multipliers, folded."""

from __future__ import annotations

from pathlib import Path

from transformers import GraniteConfig

from tests.models import oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    config = GraniteConfig(
        **oracle.SMALL,
        embedding_multiplier=12.0,
        attention_multiplier=0.11,
        residual_multiplier=0.22,
        logits_scaling=3.0,
        attention_bias=True,
    )
    oracle.check(tmp_path, config)

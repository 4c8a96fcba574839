"""Granite against transformers: four multipliers, folded."""

from __future__ import annotations

from pathlib import Path

from transformers import GraniteConfig

from tests.models import gguf_oracle, oracle


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


def test_the_same_from_gguf(tmp_path: Path) -> None:
    four = {"embedding_multiplier": 12.0, "attention_multiplier": 0.11, "residual_multiplier": 0.22}
    config = GraniteConfig(**oracle.SMALL, **four, logits_scaling=3.0)
    own = {
        "embedding_scale": 12.0,
        "attention.scale": 0.11,
        "residual_scale": 0.22,
        "logit_scale": 3.0,
        "rope.scaling.factor": 0.0,
        "rope.dimension_count": 12,
        "vocab_size": 131,
    }
    gguf_oracle.check(tmp_path, config, "granite", permuted=True, metadata=own)

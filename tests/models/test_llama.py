"""Llama against transformers: plain, with biases, and with each scaling of its rotary embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.models import oracle

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "own",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3, "head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, "num_key_value_heads": 6},
    ],
    ids=["biases", "llama3", "linear"],
)
def test_agrees_with_transformers(tmp_path: Path, own: dict[str, Any]) -> None:
    oracle.check(tmp_path, LlamaConfig(**{**oracle.SMALL, **own}), int8="mlp_bias" in own)

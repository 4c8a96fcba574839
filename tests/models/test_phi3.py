"""Phi-3 against transformers: fused projections, sliding window, heads that rotate in part by divisors of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Phi3Config

from tests.models import gguf_oracle, oracle

LONG, SHORT = [float(f) for f in np.linspace(1, 9, 6)], [float(f) for f in np.linspace(1, 2, 6)]  # of 16 rotate 12


def partly(trained: int) -> Phi3Config:
    """As Phi-4-mini is built."""
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
    return Phi3Config(
        **{**oracle.SMALL, "hidden_size": 96},
        rope_parameters={**rope, "partial_rotary_factor": 0.75},
        original_max_position_embeddings=trained,
        sliding_window=9,
    )


def test_agrees_with_transformers(tmp_path: Path) -> None:
    oracle.check(tmp_path, Phi3Config(**oracle.SMALL, sliding_window=9))


def test_heads_that_rotate_in_part(tmp_path: Path) -> None:  # beyond the first context: prompts of 20 and more
    oracle.check(tmp_path, partly(16))


def test_the_same_from_gguf(tmp_path: Path) -> None:
    factors = {
        "rope_factors_long.weight": np.array(LONG, np.float32),
        "rope_factors_short.weight": np.array(SHORT, np.float32),
    }
    own = {
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(96 / 16) / math.log(16)),
        "attention.sliding_window": 9,
    }
    gguf_oracle.check(tmp_path, partly(16), "phi3", tensors=factors, metadata=own)


def test_a_short_one_from_gguf(tmp_path: Path) -> None:
    own = {"rope.dimension_count": 12, "rope.scaling.original_context_length": 96, "attention.sliding_window": 0}
    gguf_oracle.check(tmp_path, Phi3Config(**oracle.SMALL), "phi3", metadata=own)

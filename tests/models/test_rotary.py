"""Every kind of rotary scaling against transformers' own tables, over whole contexts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from compiler.checkpoint.config import Config
from compiler.models import Options
from compiler.models.decoder import KINDS, LONG, read_rotation, read_shape
from tests.models.oracle import SMALL

# A frequency may be rounded the other way in each of the few float32 steps that make it: 4 of 2^-24, at angles up to
# POSITIONS radians. Cosine and sine have slope 1, and are rounded themselves, then multiplied by a factor below 2.
POSITIONS = 96
TOLERANCE = 2 * (POSITIONS * 4 + 2) * 2.0**-24
DIVISORS = {"short_factor": [1.0, 1.1, 1.5, 1.7, 2.0, 2.5], "long_factor": [1.0, 2.0, 3.5, 5.0, 9.0, 30.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SCALED: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 4.0},
    LLAMA3,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "truncate": False, "beta_fast": 9.0,
     "beta_slow": 0.5, "attention_factor": 1.3},
]  # fmt: skip


def ours(config: Any, context: int | None = None, **how: Any) -> np.ndarray:
    """Our table, from what transformers would write."""
    values = Config.of(config.to_dict(), "config.json")
    shape = read_shape(values)
    options = Options(context, (), "float32", lambda weight: weight, lambda weight: weight)
    return read_rotation(values, shape, options, **how).table(POSITIONS, shape.head_dim)


def theirs(embedding: Any, positions: int) -> np.ndarray:
    """f32[positions, r]: cosines, then sines, of the r elements that rotate."""
    cos, sin = embedding(torch.zeros(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    return np.concatenate([cos[0, :, :half].numpy(), sin[0, :, :half].numpy()], axis=1)


@pytest.mark.parametrize("scaled", SCALED, ids=lambda scaled: scaled["rope_type"])
def test_whole_heads(scaled: dict[str, Any]) -> None:
    config = LlamaConfig(**SMALL, rope_parameters={**scaled, "rope_theta": 500.0})
    want = theirs(LlamaRotaryEmbedding(config), POSITIONS)
    np.testing.assert_allclose(ours(config, kinds=KINDS), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("context", [32, 33, 96])
def test_the_bundles_context_chooses_the_divisors(context: int) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 500.0, **DIVISORS, "partial_rotary_factor": 0.75}
    config = Phi3Config(
        **{**SMALL, "hidden_size": 96}, rope_parameters=rope, original_max_position_embeddings=32
    )  # of 16 elements 12 rotate
    got = ours(config, context, kinds=LONG, partial=True, trained=32)[:context].reshape(context, 2, 8)
    want = theirs(Phi3RotaryEmbedding(config), context).reshape(context, 2, 6)
    np.testing.assert_allclose(got[:, :, :6], want, rtol=0, atol=TOLERANCE)
    assert (got[:, 0, 6:] == 1).all()
    assert (got[:, 1, 6:] == 0).all()
    same = ours(config, 32, kinds=LONG, partial=True, trained=32)[:context].reshape(context, 2, 8)
    assert np.array_equal(got, same) == (context == 32)

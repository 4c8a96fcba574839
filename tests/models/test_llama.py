"""Llama against transformers: plain, with biases, and with each scaling of its rotary embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from compiler.checkpoint import gguf_model
from tests.models import gguf_oracle, oracle

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


def test_values_of_another_kind_than_queries(tmp_path: Path) -> None:  # as GGUF files often have them
    model = oracle.save(tmp_path, LlamaConfig(**oracle.SMALL))
    file = tmp_path / "model.safetensors"
    tensors = {n: t.bfloat16() if ".v_proj." in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    model.load_state_dict({n: t.float() for n, t in tensors.items()})
    ids = np.arange(3, 23)
    with torch.no_grad():
        want = model(torch.tensor(ids[None])).logits[0].numpy()
    got = oracle.logits(oracle.build(tmp_path, "exact"), ids)
    assert np.abs(got - want).max() <= oracle.TOLERANCE * np.abs(want).max()


def test_the_same_from_gguf(tmp_path: Path) -> None:
    own = {"vocab_size": 131, "rope.dimension_count": 12}
    gguf_oracle.check(tmp_path, LlamaConfig(**oracle.SMALL), "llama", permuted=True, metadata=own)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_from_gguf_with_biases_and_a_tied_head(tmp_path: Path, factor: float) -> None:
    rope = {**LLAMA3, "rope_theta": 5e5, "factor": factor, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        **{**oracle.SMALL, "max_position_embeddings": 16384, "head_dim": 64},
        rope_parameters=rope,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    )
    factors = {"rope_freqs.weight": gguf_model.llama3_divisors(rope, 32).astype(np.float32)}
    own = {"vocab_size": 131, "rope.dimension_count": 64}
    gguf_oracle.check(tmp_path, config, "llama", permuted=True, tensors=factors, metadata=own)

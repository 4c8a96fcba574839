"""SmolLM3 against transformers: a layer without rotation, and a window in it."""

from __future__ import annotations

from pathlib import Path

from transformers import SmolLM3Config

from tests.models import gguf_oracle, oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    config = SmolLM3Config(**oracle.SMALL, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9)
    oracle.check(tmp_path, config)


def test_the_same_from_gguf(tmp_path: Path) -> None:
    config = SmolLM3Config(**{**oracle.SMALL, "num_hidden_layers": 5})
    own = {"vocab_size": 131, "rope.dimension_count": 12}
    gguf_oracle.check(tmp_path, config, "smollm3", permuted=True, metadata=own)

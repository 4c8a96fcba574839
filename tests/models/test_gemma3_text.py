"""Gemma 3 (text) against transformers: a window and rotations so short that each would show, in both spellings."""

from __future__ import annotations

from pathlib import Path

from transformers import Gemma3TextConfig

import targets
from compiler import pipeline
from compiler.graph.weights import Constant
from tests.models import gguf_oracle, oracle

KINDS = ["sliding_attention", "full_attention"]


def test_agrees_with_transformers(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        **oracle.SMALL,
        head_dim=20,
        query_pre_attn_scalar=13,
        sliding_window=9,
        layer_types=KINDS,
        final_logit_softcapping=2.5,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0},
        },
    )
    oracle.check(tmp_path, config)
    written = described(tmp_path)
    four = {"rope_theta": 700.0, "rope_local_base_freq": 30.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}
    gone = dict.fromkeys(("rope_parameters", "layer_types", "_sliding_window_pattern"))
    oracle.edited(tmp_path, **gone, sliding_window_pattern=2, **four)
    assert described(tmp_path) == written


def described(folder: Path) -> tuple[str, list[tuple[str, bytes]]]:
    """The graph and the rotary tables."""
    inputs = pipeline.import_checkpoint(folder, pipeline.Request(folder / "bundle", targets.load("native")))
    tables = [(weight.name, weight.values.tobytes()) for weight in inputs.model.weights if isinstance(weight, Constant)]
    assert [name for name, _ in tables] == ["rope", "rope1"]  # as layers use them
    return inputs.model.graph.module().script(), tables


def test_the_same_from_gguf(tmp_path: Path) -> None:
    """Seven layers: the sixth sees everything, by llama.cpp's knowledge of the model and nobody's word."""
    config = Gemma3TextConfig(
        **{**oracle.SMALL, "num_hidden_layers": 7},
        head_dim=20,
        query_pre_attn_scalar=20,
        sliding_window=9,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    own = {"attention.sliding_window": 9, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    gguf_oracle.check(tmp_path, config, "gemma3", plus_one=True, metadata=own)

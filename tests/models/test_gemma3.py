"""Gemma 3 with an image tower: the same graph and weights as its text model alone, and nothing of the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Gemma3Config, Gemma3TextConfig

from tests.models import gguf_oracle, oracle

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip


def test_is_its_text_model(tmp_path: Path) -> None:
    own: dict[str, Any] = {"head_dim": 20, "sliding_window": 9, "query_pre_attn_scalar": 13}
    text = Gemma3TextConfig(**oracle.SMALL, **own)
    alone = oracle.save(tmp_path / "text", text)
    config = Gemma3Config(text_config=text.to_dict(), vision_config=VISION, image_token_index=9, eos_token_id=2)
    whole = transformers.Gemma3ForConditionalGeneration(config).float()
    whole.model.language_model.load_state_dict(alone.model.state_dict())
    whole.lm_head.weight = whole.model.language_model.embed_tokens.weight
    whole.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "tokenizer.json").write_bytes((tmp_path / "text" / "tokenizer.json").read_bytes())
    assert torch.equal(whole.lm_head.weight, alone.lm_head.weight)
    model = gguf_oracle.compare(tmp_path / "text", tmp_path / "whole")
    assert (model.type, model.left_out) == ("gemma3", ("vision_tower.", "multi_modal_projector."))

"""Gemma 3 with an image tower, of which the text model alone is compiled: the bundle reads no images.

config.json keeps the text model's keys in text_config, as far as they differ from transformers' Gemma3TextConfig; the
checkpoint keeps its modules below language_model. The tower and the projector are left out.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.checkpoint.config import Config
from compiler.graph.weights import Constant, Linear, Weight
from compiler.models import Describe, Model, Options, gemma3_text

TEXT = "language_model."
IMAGES = ("vision_tower.", "multi_modal_projector.")
# What an absent key of text_config means. transformers writes the differences only.
DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
}  # fmt: skip


def build(config: Config, describe: Describe, options: Options) -> Model:
    """As gemma3_text, from another place."""
    text = config.section("text_config")
    text.assume(**DEFAULTS)
    text.string("model_type", ("gemma3_text",), default="gemma3_text")
    config.accept("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    tied = config.boolean("tie_word_embeddings", default=True)
    text.assume(tie_word_embeddings=tied)
    model = gemma3_text.build(text, lambda module: describe(TEXT + module), options)
    eos = config.integers("eos_token_id", 0, model.vocab_size - 1, default=model.eos)
    config.accept("bos_token_id", "pad_token_id")
    return replace(model, type="gemma3", eos=eos, weights=tuple(map(_moved, model.weights)), left_out=IMAGES)


def _moved(weight: Weight) -> Weight:
    """The same weight, from below language_model."""
    if isinstance(weight, Constant):
        return weight
    if isinstance(weight, Linear):
        return replace(weight, sources=tuple(TEXT + source for source in weight.sources))
    return replace(weight, source=TEXT + weight.source)

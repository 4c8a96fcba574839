"""Models that exist as numbers only: published shapes with random weights, for timing without a checkpoint.

Heads are matrices of their own even where the published model ties them to its embedding: a token reads the same bytes.
Rotation is plain and there are no biases, whatever the published model has: neither shows in a time.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from compiler.checkpoint.config import Config
from compiler.errors import UserError
from compiler.quant.grids import integer_grid
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from compiler.quant.reference import F32

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama-0.1b": {
        **LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "llama-0.5b": {
        **LLAMA, "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 22, "num_attention_heads": 20,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "qwen2.5-0.5b": {
        **LLAMA, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
    "llama-3.2-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "llama-3.2-3b": {
        **LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "llama-2-7b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "qwen2.5-1.5b": {
        **LLAMA, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
    "a72-count": {
        **LLAMA, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def settings(shape: str, positions: int = 1) -> dict[str, Any]:
    """config.json's keys, with room for `positions` at least. Raises UserError.

    NAME:N is the shape cut to N layers, to try something quickly: whatever names the shape says so.
    """
    name, cut, layers = shape.partition(":")
    if name not in SHAPES:
        raise UserError(f"There is no shape {name!r}. Known shapes: {', '.join(SHAPES)}.")
    published = SHAPES[name]
    if cut:
        whole = published["num_hidden_layers"]
        if not (layers.isdecimal() and 1 <= int(layers) <= whole):
            raise UserError(f"The shape {shape!r} would have {layers or 'no'} layers, but {name} has 1 to {whole}.")
        published = {**published, "num_hidden_layers": int(layers)}
    return {**published, "max_position_embeddings": max(published["max_position_embeddings"], positions)}


def config(shape: str, positions: int = 1) -> Config:
    """config.json of a published shape, with room for `positions` at least. Raises UserError."""
    return Config.of(settings(shape, positions), shape)


def parameters(shape: str) -> int:
    """Weights of the matrices, embedding and head included."""
    source = RandomSource(shape, 4, 128, 4)
    return sum(kind.n * kind.k for kind in map(source.describe, source.modules()))


class RandomSource:
    """Weights of a shape: integer codes for linear layers and head, fp16 embeddings. Equal names give equal numbers."""

    def __init__(self, shape: str, bits: int, group_size: int, head_bits: int) -> None:
        self._config, self._bits, self._group, self._head_bits = settings(shape), bits, group_size, head_bits

    def modules(self) -> list[str]:
        """Every weight matrix."""
        layers = range(self._config["num_hidden_layers"])
        parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        return ["model.embed_tokens", *(f"model.layers.{i}.{part}" for i in layers for part in parts), "lm_head"]

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix."""
        return module in self.modules()

    def describe(self, module: str) -> WeightType:
        """Shape and kind."""
        c = self._config
        hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
        kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
        if module == "model.embed_tokens":
            return WeightType(vocab, hidden, "float16", 0)
        sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden),
                 "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn),
                 "lm_head": (vocab, hidden)}  # fmt: skip
        n, k = sizes[module.rpartition(".")[2]]
        bits = self._head_bits if module == "lm_head" else self._bits
        return WeightType(n, k, integer_grid(bits).name, min(self._group, k), symmetric=True)

    def load(self, module: str) -> QuantWeight | DenseWeight:
        """Random codes; scales so small that activations stay near one."""
        kind, random = self.describe(module), np.random.default_rng(zlib.crc32(module.encode()))
        if kind.dense:
            return DenseWeight(random.standard_normal((kind.n, kind.k), np.float32).astype(np.float16), "float16")
        middle = 1 << (kind.bits - 1)
        codes = random.integers(0, 2 * middle, (kind.n, kind.k), np.uint8)
        spread = 2 * middle / 12**0.5 * kind.k**0.5  # standard deviation of codes . x for x of size one
        scale = (random.uniform(0.5, 1.5, (kind.n, kind.groups)) / spread).astype(np.float16)
        zero = np.full(scale.shape, middle, np.int16)
        return QuantWeight(codes, scale, zero, kind.grid, kind.group_size, symmetric=True)

    def bias(self, module: str) -> F32 | None:
        """None: made models have no biases."""

    def vector(self, name: str) -> F32:
        """Norm weights of one."""
        return np.ones(self._config["hidden_size"], np.float32)

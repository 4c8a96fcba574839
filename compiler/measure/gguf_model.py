"""Write a GGUF file for llama.cpp: a llama with random blocks, or a checkpoint's own weights. Runs where `gguf` is.

python -m compiler.measure.gguf_model REQUEST.json OUT.gguf; the request has config (config.json's keys), type and head
(GGUF types of the linear layers and of the output), checkpoint (a folder, or null). Prints what became of the weights.

Its tokenizer has one character a token (llama_cpp.letter), so that any list of ids can be handed over as text.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from compiler.checkpoint import open_checkpoint
from compiler.errors import UnsupportedError, UserError
from compiler.quant.formats import open_source
from compiler.quant.ir import DenseWeight, QuantWeight
from compiler.quant.reference import dequantize
from compiler.quant.source import Source

Bytes = NDArray[np.uint8]
# Bytes at which a block has its fp16 scales, as ggml-common.h lays out block_q4_0 and the others.
SCALES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,),
}  # fmt: skip
LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
EXACT = {"Q4_0": ("int4", 8), "Q8_0": ("int8", 128)}  # type -> grid and zero that it holds without rounding


@dataclass(frozen=True)
class Shape:
    """The numbers of a llama's config.json."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    eps: float
    theta: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """UnsupportedError for what the file would not say truly: other architectures, scaled rotation."""
        if config["model_type"] not in ("llama", "mistral"):
            kind = config["model_type"]
            raise UnsupportedError(f"llama.cpp: the comparison writes llama and mistral models, not {kind}.")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UnsupportedError("llama.cpp: the comparison writes models with the default rotary embedding only.")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden, config["intermediate_size"], config["num_hidden_layers"], heads,
            config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads, config["vocab_size"],
            config["max_position_embeddings"], config["rms_norm_eps"],
            rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        )  # fmt: skip

    def linears(self) -> Iterator[tuple[str, str, int, int]]:
        """(GGUF name, module, n, k) of every linear layer but the head."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {"attn_q": (q, self.hidden), "attn_k": (kv, self.hidden), "attn_v": (kv, self.hidden),
                 "attn_output": (self.hidden, q), "ffn_gate": (self.ffn, self.hidden),
                 "ffn_up": (self.ffn, self.hidden), "ffn_down": (self.hidden, self.ffn)}  # fmt: skip
        for i in range(self.layers):
            for name, module in LINEARS.items():
                yield f"blk.{i}.{name}", f"model.layers.{i}.{module}", *sizes[name]


def random_blocks(name: str, kind: str, n: int, k: int) -> Bytes:
    """u8[n, bytes]: random codes, and block scales that keep activations near one. Equal names give equal bytes."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if k % block:
        raise UnsupportedError(
            f"llama.cpp: {name} has {k} inputs, but {kind} has blocks of {block}. "
            f"Take 4 or 8 bits: their blocks have 32."
        )
    random = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = np.frombuffer(random.bytes(n * (k // block) * size), np.uint8).reshape(-1, size).copy()
    _set_scales(blocks, kind, 1.0)
    sample = gguf.quants.dequantize(blocks[:256], gguf.GGMLQuantizationType[kind])
    _set_scales(blocks, kind, 1 / (float(np.sqrt(np.mean(np.square(sample)))) * k**0.5))
    return blocks.reshape(n, -1)


def _set_scales(blocks: Bytes, kind: str, value: float) -> None:
    for at in SCALES_AT[kind]:
        blocks[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)


def exact_blocks(weight: QuantWeight, kind: str) -> Bytes | None:
    """The same codes and scales as GGUF blocks of 32, or None where the type cannot hold them without rounding."""
    n, k = weight.codes.shape
    grid, zero = EXACT.get(kind, ("", 0))
    plain = weight.permutation is None and weight.offset is None and weight.scale.dtype == np.float16
    if weight.grid != grid or not plain or weight.group_size % 32 or k % 32 or (weight.zero != zero).any():
        return None
    scale = np.repeat(weight.scale, weight.group_size // 32, axis=1)[:, : k // 32]
    head = np.ascontiguousarray(scale).view(np.uint8).reshape(n, k // 32, 2)
    codes = weight.codes.reshape(n, k // 32, 32)
    body = codes[..., :16] | codes[..., 16:] << 4 if kind == "Q4_0" else codes ^ 0x80
    return np.concatenate([head, body], axis=2).reshape(n, -1)


def interleaved(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k from halves (as transformers rotate) to pairs (as llama.cpp does, for a llama)."""
    n = rows.shape[0]
    return rows.reshape(heads, 2, n // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


class Writer:
    """Fills a file tensor by tensor: one matrix in memory at a time."""

    def __init__(self, shape: Shape, kind: str, head: str, source: Source | None) -> None:
        self._shape, self._kind, self._head, self._source = shape, kind, head, source
        self.exact = self.rounded = 0

    def write(self, path: Path) -> None:
        """Header, then data; the order is the same in both."""
        writer = gguf.GGUFWriter(str(path), "llama")
        self._describe(writer)
        for name, kind, n, k in self._matrices():
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            row = -(-k // block) * size
            writer.add_tensor_info(
                f"{name}.weight", (n, row), np.dtype(np.uint8), n * row, gguf.GGMLQuantizationType[kind]
            )
        hidden = self._shape.hidden
        for name in self._norms():
            writer.add_tensor_info(f"{name}.weight", (hidden,), np.dtype(np.float32), 4 * hidden)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind, n, k in self._matrices():
            writer.write_tensor_data(self._matrix(name, kind, n, k))
        for module in self._norms().values():
            ones = np.ones(self._shape.hidden, np.float32)
            writer.write_tensor_data(ones if self._source is None else self._source.vector(module))
        writer.close()

    def _describe(self, writer: gguf.GGUFWriter) -> None:
        shape = self._shape
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.theta)
        writer.add_layer_norm_rms_eps(shape.eps)
        writer.add_vocab_size(shape.vocab)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([chr(0x20000 + i) for i in range(shape.vocab)])
        writer.add_token_scores([0.0] * shape.vocab)
        writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocab)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)

    def _matrices(self) -> Iterator[tuple[str, str, int, int]]:
        yield "token_embd", "F16", self._shape.vocab, self._shape.hidden
        for name, _, n, k in self._shape.linears():
            yield name, self._kind, n, k
        yield "output", self._head, self._shape.vocab, self._shape.hidden

    def _norms(self) -> dict[str, str]:
        """GGUF name -> module."""
        found = {}
        for i in range(self._shape.layers):
            found[f"blk.{i}.attn_norm"] = f"model.layers.{i}.input_layernorm"
            found[f"blk.{i}.ffn_norm"] = f"model.layers.{i}.post_attention_layernorm"
        return {**found, "output_norm": "model.norm"}

    def _matrix(self, name: str, kind: str, n: int, k: int) -> NDArray[Any]:
        if self._source is not None:
            return self._of_checkpoint(name, kind, self._source)
        if kind == "F16":
            random = np.random.default_rng(0)
            return random.standard_normal((n, k), np.float32).astype(np.float16).view(np.uint8)
        return random_blocks(name, kind, n, k)

    def _of_checkpoint(self, name: str, kind: str, source: Source) -> NDArray[Any]:
        modules = {gguf_name: module for gguf_name, module, _, _ in self._shape.linears()}
        modules |= {"token_embd": "model.embed_tokens", "output": "lm_head"}
        module = modules[name]
        weight = source.load(module if source.has(module) else "model.embed_tokens")
        heads = {"attn_q": self._shape.heads, "attn_k": self._shape.kv_heads}.get(name.rpartition(".")[2])
        if kind == "F16":
            return dequantize(weight).astype(np.float16).view(np.uint8)
        blocks = None if isinstance(weight, DenseWeight) else exact_blocks(weight, kind)
        if blocks is None:
            self.rounded += 1
            blocks = gguf.quants.quantize(dequantize(weight), gguf.GGMLQuantizationType[kind])
        else:
            self.exact += 1
        return blocks if heads is None else interleaved(blocks, heads)


def main() -> int:
    """The command. A refusal goes to stderr, with status 2."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        source = None if request["checkpoint"] is None else open_source(open_checkpoint(Path(request["checkpoint"])))
        writer = Writer(Shape.of(request["config"]), request["type"], request["head"], source)
        writer.write(Path(sys.argv[2]))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return UserError.exit_code
    sys.stdout.write(json.dumps({"exact": writer.exact, "rounded": writer.rounded}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

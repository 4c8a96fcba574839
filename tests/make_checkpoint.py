"""A random llama checkpoint in 4-bit GPTQ, sharded, of any size: python tests/make_checkpoint.py OUT [--layers N].

The defaults are the shape of a 7-billion-parameter llama: 3.9 GB. Tensors are written one at a time, so that memory
stays at one tensor. Equal arguments give equal bytes. It shares no code with the reader it tests.
"""
from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPELLED = {"int32": "I32", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json."""

    hidden: int = 4096
    ffn: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000
    group_size: int = 128
    context: int = 4096

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Quantised modules of one layer: name -> (n, k)."""
        kv = self.hidden // self.heads * self.kv_heads
        square, wide = (self.hidden, self.hidden), (self.ffn, self.hidden)
        return {"self_attn.q_proj": square, "self_attn.k_proj": (kv, self.hidden),
                "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": square, "mlp.gate_proj": wide,
                "mlp.up_proj": wide, "mlp.down_proj": (self.hidden, self.ffn)}

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of everything, in the order of use."""
        yield "model.embed_tokens.weight", "float16", (self.vocab, self.hidden)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", "float16", (self.hidden,)
            yield f"{layer}.post_attention_layernorm.weight", "float16", (self.hidden,)
            for name, (n, k) in self.linears.items():
                groups = math.ceil(k / self.group_size)
                yield f"{layer}.{name}.qweight", "int32", (k // 8, n)
                yield f"{layer}.{name}.qzeros", "int32", (groups, n // 8)
                yield f"{layer}.{name}.scales", "float16", (groups, n)
                yield f"{layer}.{name}.g_idx", "int32", (k,)
        yield "model.norm.weight", "float16", (self.hidden,)
        yield "lm_head.weight", "float16", (self.vocab, self.hidden)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def values(name: str, dtype: str, shape: tuple[int, ...], group_size: int, random: np.random.Generator) -> np.ndarray:
    """Random codes; scales so small that activations stay near one; zeros of 8, stored as 7; norms of one."""
    if name.endswith("norm.weight"):
        return np.ones(shape, dtype)
    if name.endswith("g_idx"):
        return (np.arange(shape[0]) // group_size).astype(np.int32)
    if name.endswith("qzeros"):
        return np.full(shape, 0x77777777, np.int32)
    if name.endswith("qweight"):
        return np.frombuffer(random.bytes(nbytes(dtype, shape)), np.int32).reshape(shape)
    if name.endswith("scales"):
        spread = 4.6 * (shape[0] * group_size) ** 0.5  # standard deviation of codes . x for x of size one
        return (random.uniform(0.5, 1.5, shape) / spread).astype(np.float16)
    return random.standard_normal(shape, np.float32).astype(np.float16)


def write(folder: Path, shape: Shape, shard_bytes: int) -> int:
    """The checkpoint in `folder`, which must not exist; gives its tensors' bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for entry in shape.tensors():
        if shards[-1] and filled + nbytes(*entry[1:]) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += nbytes(*entry[1:])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {name: file for name, _, _ in shard}
        _write_shard(folder / file, shard, shape.group_size, random)
    total = sum(nbytes(*entry[1:]) for entry in shape.tensors())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    _write_tokenizer(folder / "tokenizer.json", shape.vocab)
    return total


def config(shape: Shape) -> dict[str, object]:
    """config.json."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab, "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float16", "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": shape.group_size, "desc_act": False, "sym": True,
            "checkpoint_format": "gptq"},
    }


def _write_shard(path: Path, shard: list[tuple[str, str, tuple[int, ...]]], group_size: int,
                 random: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, dtype, shape in shard:
        end = offset + nbytes(dtype, shape)
        header[name] = {"dtype": SPELLED[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in shard:
            file.write(values(name, dtype, shape, group_size, random).tobytes())


def _write_tokenizer(path: Path, vocab: int) -> None:
    """Whole words "t0", "t1", ...: enough to be a tokenizer."""
    words = {f"t{i}": i for i in range(vocab)}
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}}))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--shard-mib", type=int, default=1024)
    options = vars(parser.parse_args())
    out, shard_mib = options.pop("out"), options.pop("shard_mib")
    print(f"{out}: {write(out, Shape(**options), shard_mib << 20) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

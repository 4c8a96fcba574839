"""GGUF files for tests: raw ones byte by byte, and a tiny random llama written with the gguf package."""
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from compiler import models
from compiler.checkpoint import Checkpoint, open_checkpoint

CODES = {"u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "u8": (0, "<B")}
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, CONTEXT = 256, 512, 2, 4, 2, 128
LETTERS = [chr(97 + i) for i in range(26)]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", *LETTERS, "ab", "\u2581ab", "abc", "\u2581a", *"ABCDEFGHIJ"]
TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(TOKENS) - 259)


def open_gguf(path: Path) -> Checkpoint:
    """As the pipeline opens it."""
    return open_checkpoint(path, models.gguf_architectures())


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: str, value: Any) -> bytes:
    if kind == "str":
        return string(name) + struct.pack("<I", 8) + string(value)
    number, code = CODES[kind]
    return string(name) + struct.pack("<I", number) + struct.pack(code, value)


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Header of a row-major shape."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def raw(keys: list[bytes], tensors: list[bytes], data: bytes = b"", magic: bytes = b"GGUF", version: int = 3,
        counts: tuple[int, int] | None = None, alignment: int = 32) -> bytes:
    """A whole file from its parts, whatever they are."""
    counts = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter moves those of q and k: LlamaModel.permute of convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def blocks(kind: str, n: int, k: int, random: np.random.Generator, size: float = 0.05) -> np.ndarray:
    """u8[n, bytes]: random blocks of a type, the scales such that weights are about `size`."""
    import gguf

    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    flat = random.integers(0, 256, (n * k // weights, nbytes), np.uint8)
    largest = {"Q6_K": 32 * 128, "Q4_K": 64 * 16, "Q5_K": 64 * 32, "IQ4_XS": 32 * 127, "IQ4_NL": 127, "Q8_0": 128,
               "Q2_K": 15 * 3, "Q3_K": 32 * 4}
    scale = (random.uniform(0.2, 1, len(flat)) * size / largest.get(kind, 16)).astype(np.float16)
    places = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2],
              "Q4_1": [0, 2], "Q5_1": [0, 2]}
    for at in places.get(kind, [0]):
        flat[:, at:at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return flat.reshape(n, -1)


def write_llama(path: Path, attention: str = "F16", value: str | None = None, down: str | None = None,
                embedding: str = "F16", head: str | None = "F16", **changed: Any) -> Path:
    """A tiny random llama. Types by name ("Q4_K"); head None ties it to the embedding; changed: other metadata."""
    import gguf

    random, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    numbers = {"context_length": CONTEXT, "embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": FFN,
               "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": 64,
               "vocab_size": len(TOKENS)}
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value_ in changed.items():
        writer.add_key_value(name, value_, gguf.GGUFValueType.get_type(value_))

    def put(name: str, n: int, k: int, kind: str, heads: int = 0) -> None:
        number = gguf.GGMLQuantizationType[kind]
        if kind in ("F16", "F32", "BF16"):
            stored = gguf.quants.quantize((random.standard_normal((n, k)) * 0.05).astype(np.float32), number)
        else:
            stored = blocks(kind, n, k, random)
        stored = interleave(stored, heads) if heads else stored
        writer.add_tensor(name, stored, raw_dtype=number)

    def norm(name: str) -> None:
        writer.add_tensor(name, (1 + random.standard_normal(HIDDEN) * 0.1).astype(np.float32))

    put("token_embd.weight", len(TOKENS), HIDDEN, embedding)
    if head is not None:
        put("output.weight", len(TOKENS), HIDDEN, head)
    norm("output_norm.weight")
    for i in range(LAYERS):
        put(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN, attention, HEADS)
        put(f"blk.{i}.attn_k.weight", HIDDEN // 2, HIDDEN, attention, KV_HEADS)
        put(f"blk.{i}.attn_v.weight", HIDDEN // 2, HIDDEN, value or attention)
        put(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN, attention)
        put(f"blk.{i}.ffn_gate.weight", FFN, HIDDEN, attention)
        put(f"blk.{i}.ffn_up.weight", FFN, HIDDEN, attention)
        put(f"blk.{i}.ffn_down.weight", HIDDEN, FFN, down or attention)
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

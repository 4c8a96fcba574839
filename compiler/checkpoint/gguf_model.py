"""GGUF metadata as the config.json, and GGUF tensor names as the module names, that transformers gives the same model.

Names as llama.cpp's converter writes them. A key under the architecture's own prefix that no table knows goes into the
Config under its GGUF name, so that it is refused by name unless a model reads it.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.checkpoint import safetensors
from compiler.checkpoint.config import Config, Entry
from compiler.checkpoint.gguf_architecture import KEYS, Architecture
from compiler.checkpoint.gguf_file import GgufFile
from compiler.checkpoint.safetensors import TensorInfo
from compiler.checkpoint.strict_json import shown
from compiler.errors import CheckpointError, UnsupportedError

SHOWN_NUMBERS = 64  # of an array that nobody reads but a message may name
# Keys that change nothing when they have this value.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.sliding_window": 0,
    "rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0, "rope.scaling.factor": 0.0,
}
# Read elsewhere, or said better elsewhere: the embedding itself says vocab_size.
IGNORED = frozenset({"vocab_size", "rope.scaling.finetuned", "attention.value_length", "rope.dimension_count",
                     "rope.freq_base"})
LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
MOST_FACTORS = 4096  # of a rotary tensor


def convert(file: GgufFile, architectures: Mapping[str, Architecture]) -> tuple[Config, dict[str, TensorInfo]]:
    """config.json's values and the tensors by transformers' names. Raises UserError for what it cannot name.

    architectures: those that some model knows, by general.architecture.
    """
    where, metadata = str(file.path), file.metadata
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{where} is one of {shown(metadata['split.count'])} parts. Merge them first: "
                               f"llama-gguf-split --merge FIRST_PART MERGED.gguf")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in architectures:
        raise UnsupportedError(f"{where}: general.architecture is {shown(name)}, but quern reads "
                               f"{', '.join(sorted(architectures))} from GGUF. Take the model as safetensors, if "
                               f"quern knows its model_type.")
    architecture = architectures[name]
    entries = _entries(file, architecture)
    tensors: dict[str, TensorInfo] = {}
    for tensor, info in file.tensors.items():
        if tensor in (LLAMA3, LONG, SHORT):
            continue
        renamed = architecture.module_name(tensor)
        if renamed is None or renamed in tensors:
            raise UnsupportedError(f"{where}: the tensor {shown(tensor)} belongs to no {name} that quern knows. "
                                   f"Take the model as safetensors, if quern knows its model_type.")
        tensors[renamed] = info
    config = Config(entries, f"{where}: ")
    config.quantization = Config.of({
        "quant_method": "gguf", "interleaved": architecture.interleaved, "norms_plus_one": architecture.norms_plus_one,
    }, where)
    return config, tensors


def _entries(file: GgufFile, architecture: Architecture) -> dict[str, Entry]:
    """Everything config.json would say, each with the place in the GGUF file that says it."""
    where, own = str(file.path), f"{architecture.name}."
    found = {key.removeprefix(own): _plain(value) for key, value in file.metadata.items() if key.startswith(own)}

    def entry(value: Any, key: str) -> Entry:
        return Entry(value, f"{where}: {key}")

    entries = {key: entry(value, f"({key})") for key, value in {
        "model_type": architecture.model_type or architecture.name,
        "tie_word_embeddings": "output.weight" not in file.tensors}.items()}
    keys = {**KEYS, **architecture.keys}
    for key, value in found.items():
        if key in NEUTRAL and NEUTRAL[key] == value:
            continue
        if key in keys:
            entries[keys[key]] = entry(value, own + key)
        elif key not in IGNORED and not key.startswith("rope.scaling."):
            entries[own + key] = entry(value, own + key)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{where} has no matrix token_embd.weight, the embedding. Fetch the file again.")
    entries["vocab_size"] = entry(embedding.shape[0], "rows of token_embd.weight")
    entries["rope_parameters"] = entry(*_rotation(file, found, own))
    for key, tensor in architecture.biases.items():
        if f"blk.0.{tensor}.bias" in file.tensors:
            entries[key] = entry(True, f"blk.0.{tensor}.bias")
    _head_sizes(found, entries, entry, architecture)
    for key, wanted in (("bos", ("bos",)), ("eos", ("eos", "eot", "eom"))):
        ids = [file.metadata.get(f"tokenizer.ggml.{token}_token_id") for token in wanted]
        ids = [token for token in dict.fromkeys(ids) if type(token) is int]
        if ids:
            entries[f"{key}_token_id"] = entry(ids[0] if len(ids) == 1 else ids, f"tokenizer.ggml.{key}_token_id")
    rest = architecture.rest({key: item.value for key, item in entries.items()})
    return entries | {key: entry(value, f"({key})") for key, value in rest.items()}


def _head_sizes(found: dict[str, Any], entries: dict[str, Entry], entry: Any, architecture: Architecture) -> None:
    """Keys, values and rotation share one width, or the difference stands under a name that somebody must read."""
    own = f"{architecture.name}."
    hidden, heads = found.get("embedding_length"), found.get("attention.head_count")
    whole = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    width = found.get("attention.key_length", hidden // heads if whole else None)  # type: ignore[operator]
    if found.get("attention.value_length", width) != width:
        entries[f"{own}attention.value_length"] = entry(found["attention.value_length"], f"{own}attention.value_length")
    rotated = found.get("rope.dimension_count", width)
    if rotated != width:
        key, value = f"{own}rope.dimension_count", rotated
        if architecture.partial and isinstance(rotated, int) and isinstance(width, int) and width > 0:
            key, value = "partial_rotary_factor", rotated / width
        entries[key] = entry(value, f"{own}rope.dimension_count")


def _rotation(file: GgufFile, found: dict[str, Any], own: str) -> tuple[dict[str, Any], str]:
    """rope_parameters as transformers 5 spells them, and where they stand; what nobody knows stays, to be refused."""
    values = {"rope_type": "default", "rope_theta": found.get("rope.freq_base", 10000.0)}
    scaling = {key.removeprefix("rope.scaling."): value for key, value in found.items()
               if key.startswith("rope.scaling.") and key not in IGNORED and NEUTRAL.get(key) != value}
    renamed = {"type": "rope_type", "original_context_length": "original_max_position_embeddings",
               "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    if type(values["rope_theta"]) not in (int, float):
        return values, f"{own}rope.freq_base"  # refused by whoever reads it
    if LLAMA3 in file.tensors:
        return _llama3(file, values["rope_theta"]), LLAMA3
    if LONG in file.tensors and SHORT in file.tensors:
        # llama.cpp multiplies by attn_factor alone here, but by more where there is YaRN: only here it is the same.
        renamed["attn_factor"] = "attention_factor"
        scaling |= {"type": "longrope", "short_factor": _factors(file, SHORT).tolist(),
                    "long_factor": _factors(file, LONG).tolist()}
        scaling.setdefault("attn_factor", 1.0)
    elif "type" not in scaling and set(scaling) <= {"original_context_length"}:
        return values, f"{own}rope"  # what some files say of a model that is not scaled
    return {**values, **{renamed.get(key, key): value for key, value in scaling.items()}}, f"{own}rope"


def _factors(file: GgufFile, name: str) -> NDArray[np.float32]:
    """A short float32 vector."""
    info = file.tensors[name]
    if info.dtype != "float32" or len(info.shape) != 1 or not 0 < info.shape[0] <= MOST_FACTORS:
        raise UnsupportedError(f"{file.path}: {name} is {info.dtype} {list(info.shape)}, but rotary factors are a "
                               f"short float32 vector. Take the model as safetensors, if quern knows its rope_type.")
    return safetensors.view(safetensors.map_file(file.path), info)


def _llama3(file: GgufFile, theta: float) -> dict[str, Any]:
    """Llama 3's rotary scaling, of which GGUF holds only the resulting divisor of every frequency, f32[d/2].

    The divisors of the parameters that all published models have are worked out and compared. Raises UnsupportedError
    when they are not these.
    """
    stored = _factors(file, LLAMA3)
    known = {"rope_type": "llama3", "rope_theta": theta, "factor": float(stored.max()), "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if np.isfinite(stored).all() and stored.min() >= 1 and np.allclose(llama3_divisors(known, len(stored)), stored,
                                                                       rtol=1e-4, atol=0):
        return known
    raise UnsupportedError(f"{file.path}: {LLAMA3} holds rotary scaling that is not Llama 3's. "
                           f"Take the model as safetensors, if quern knows its rope_type.")


def llama3_divisors(rope: Mapping[str, Any], half: int) -> np.ndarray:
    """What Llama 3's scaling divides each of the `half` frequencies by, as llama.cpp's converter computes it."""
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(half) / half)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < context / high, 1.0, np.where(wavelength > context / low, factor, between))


def _plain(value: Any) -> Any:
    """Values as JSON has them. A float32 becomes the shortest decimal that means it: 1e-05, not 9.99999974e-06."""
    if isinstance(value, float):
        short = float(str(np.float32(value)))
        return short if np.float32(short) == np.float32(value) else value
    if isinstance(value, np.ndarray):
        return value[:SHOWN_NUMBERS].tolist()
    return value[:SHOWN_NUMBERS] if isinstance(value, list) else value

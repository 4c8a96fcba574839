"""GGUF metadata as the config.json, and GGUF tensor names as the module names, that transformers gives the same model.

Names as llama.cpp's converter writes them. A key under the architecture's own prefix that no table here knows goes into
the Config under its GGUF name, so that it is refused by name unless a model reads it.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compiler.checkpoint.config import Config, Entry
from compiler.checkpoint.gguf_file import GgufFile
from compiler.checkpoint.safetensors import TensorInfo
from compiler.checkpoint.strict_json import shown
from compiler.errors import CheckpointError, UnsupportedError

SHOWN_NUMBERS = 64  # of an array that nobody reads but a message may name
# Keys without the architecture's prefix -> config.json.
KEYS = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}
# Keys that change nothing when they have this value. vocab_size: the embedding itself says it.
NEUTRAL: dict[str, Any] = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.type": "none",
    "rope.scaling.attn_factor": 1.0, "rope.scaling.factor": 0.0,
}
IGNORED = frozenset({"vocab_size", "rope.scaling.finetuned", "attention.value_length", "rope.dimension_count",
                     "rope.freq_base"})
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FOUR_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """How one general.architecture differs. interleaved: the converter moved the rows of q and k for ggml's rotary
    embedding; norms_plus_one: it added one to every norm; constants: config.json keys that GGUF leaves unsaid.
    """

    model_type: str
    interleaved: bool = False
    norms_plus_one: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


GEMMA = {"names": {"ffn_norm": "pre_feedforward_layernorm", **FOUR_NORMS},
         "constants": {"hidden_activation": "gelu_pytorch_tanh"}, "norms_plus_one": True}
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),  # and Mistral, whose window llama.cpp does not keep
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3", names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "granite": Architecture("granite", interleaved=True, keys={
        "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
        "attention.scale": "attention_multiplier", "logit_scale": "logits_scaling"}),
    "olmo2": Architecture("olmo2", names=FOUR_NORMS),
    "gemma2": Architecture("gemma2", **GEMMA),  # type: ignore[arg-type]
    "gemma3": Architecture("gemma3_text", **GEMMA),  # type: ignore[arg-type]
}


def convert(file: GgufFile) -> tuple[Config, dict[str, TensorInfo]]:
    """config.json's values and the tensors by transformers' names. Raises UserError for what it cannot name."""
    where, metadata = str(file.path), file.metadata
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{where} is one of {shown(metadata['split.count'])} parts. Merge them first: "
                               f"llama-gguf-split --merge FIRST_PART MERGED.gguf")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(f"{where}: general.architecture is {shown(name)}, but quern reads "
                               f"{', '.join(ARCHITECTURES)} from GGUF. Take the model as safetensors, if "
                               f"quern knows its model_type.")
    architecture = ARCHITECTURES[name]
    if architecture.model_type == "gemma2" and metadata.get(f"{name}.block_count") == 46:
        raise UnsupportedError(f"{where} is Gemma 2 27B, whose attention scale GGUF does not hold. "
                               f"Take the model as safetensors.")
    entries = _entries(file, name, architecture)
    tensors: dict[str, TensorInfo] = {}
    for tensor, info in file.tensors.items():
        if tensor == ROPE_FACTORS:
            _llama3(file, entries)
            continue
        renamed = module_name(tensor, architecture)
        if renamed is None or renamed in tensors:
            raise UnsupportedError(f"{where}: the tensor {shown(tensor)} belongs to no {name} that quern knows. "
                                   f"Take the model as safetensors, if quern knows its model_type.")
        tensors[renamed] = info
    config = Config(entries, f"{where}: ")
    config.quantization = Config.of({
        "quant_method": "gguf", "interleaved": architecture.interleaved, "norms_plus_one": architecture.norms_plus_one,
    }, where)
    return config, tensors


def module_name(tensor: str, architecture: Architecture) -> str | None:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight; None for a name that is not known."""
    matched = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,3})\.)?([a-z_]+)\.(weight|bias)", tensor)
    names = {**NAMES, **architecture.names}
    if matched is None or matched[2] not in names:
        return None
    layer, name, kind = matched[1], names[matched[2]], matched[3]
    inside = matched[2] not in ("token_embd", "output_norm", "output")
    if inside != (layer is not None):
        return None
    return f"model.layers.{layer}.{name}.{kind}" if inside else f"{name}.{kind}"


def _entries(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Entry]:
    """Everything config.json would say, each with the place in the GGUF file that says it."""
    where, own = str(file.path), f"{name}."
    found = {key.removeprefix(own): _plain(value) for key, value in file.metadata.items() if key.startswith(own)}

    def entry(value: Any, key: str = "") -> Entry:
        return Entry(value, f"{where}: {key}")

    entries = {key: entry(value, f"({key})") for key, value in {
        "model_type": architecture.model_type, "tie_word_embeddings": "output.weight" not in file.tensors,
        **architecture.constants}.items()}
    keys = {**KEYS, **architecture.keys}
    for key, value in found.items():
        if key in keys:
            entries[keys[key]] = entry(value, own + key)
        elif key not in IGNORED and not key.startswith("rope.scaling.") and NEUTRAL.get(key) != value:
            entries[own + key] = entry(value, own + key)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{where} has no matrix token_embd.weight, the embedding. Fetch the file again.")
    entries["vocab_size"] = entry(embedding.shape[0], "rows of token_embd.weight")
    entries["rope_parameters"] = entry(_rope(found), f"{own}rope")
    _head_sizes(found, entries, entry, own)
    for key, wanted in (("bos", ("bos",)), ("eos", ("eos", "eot", "eom"))):
        ids = [file.metadata.get(f"tokenizer.ggml.{token}_token_id") for token in wanted]
        ids = [token for token in dict.fromkeys(ids) if type(token) is int]
        if ids:
            entries[f"{key}_token_id"] = entry(ids[0] if len(ids) == 1 else ids, f"tokenizer.ggml.{key}_token_id")
    return entries


def _head_sizes(found: dict[str, Any], entries: dict[str, Entry], entry: Any, own: str) -> None:
    """Keys, values and rotation share one width, or the difference stands under a name that somebody must read."""
    hidden, heads = found.get("embedding_length"), found.get("attention.head_count")
    whole = isinstance(hidden, int) and isinstance(heads, int) and heads > 0
    width = found.get("attention.key_length", hidden // heads if whole else None)  # type: ignore[operator]
    if found.get("attention.value_length", width) != width:
        entries[f"{own}attention.value_length"] = entry(found["attention.value_length"], f"{own}attention.value_length")
    rotated = found.get("rope.dimension_count", width)
    if rotated != width:
        entries[f"{own}rope.dimension_count"] = entry(rotated, f"{own}rope.dimension_count")


def _rope(found: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers 5 spells them; scaling of a kind that nobody knows stays, to be refused."""
    values = {"rope_type": "default", "rope_theta": float(found.get("rope.freq_base", 10000.0))}
    scaling = {key.removeprefix("rope.scaling."): value for key, value in found.items()
               if key.startswith("rope.scaling.") and key not in IGNORED and NEUTRAL.get(key) != value}
    if "type" not in scaling and set(scaling) <= {"original_context_length"}:
        return values  # what some files say of a model that is not scaled
    renamed = {"type": "rope_type", "original_context_length": "original_max_position_embeddings",
               "attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    return {**values, **{renamed.get(key, key): value for key, value in scaling.items()}}


def _llama3(file: GgufFile, entries: dict[str, Entry]) -> None:
    """Llama 3's rotary scaling, of which GGUF holds only the resulting divisor of every frequency, f32[d/2].

    The divisors of the parameters that all published models have are worked out and compared. Raises UnsupportedError
    when they are not these.
    """
    from compiler.checkpoint import safetensors

    info, parameters = file.tensors[ROPE_FACTORS], entries["rope_parameters"].value
    if info.dtype == "float32" and len(info.shape) == 1 and 0 < info.shape[0] <= 4096:
        stored = safetensors.view(safetensors.map_file(file.path), info)
        known = {"rope_type": "llama3", "rope_theta": parameters["rope_theta"], "factor": float(stored.max()),
                 "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if np.isfinite(stored).all() and stored.min() >= 1 and np.allclose(llama3_divisors(known, len(stored)), stored,
                                                                           rtol=1e-4, atol=0):
            entries["rope_parameters"] = Entry(known, f"{file.path}: {ROPE_FACTORS}")
            return
    raise UnsupportedError(f"{file.path}: {ROPE_FACTORS} holds rotary scaling that is not Llama 3's. "
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

"""The same random model as safetensors and as GGUF, which must become one graph with equal weights, bit for bit.

What the graph computes is then `oracle.check`'s business. The file is laid out as llama.cpp's convert_hf_to_gguf.py
does it: tensor names from the gguf package's own table, metadata by its writer, rows of q and k moved where the
converter moves them, norms plus one where it adds one. Everything is float32, so that nothing hides in a rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import GGUFWriter

import targets
from compiler import pipeline, weights
from compiler.models import Model
from compiler.quant.codes import Codes
from tests.checkpoint.gguf_files import interleave
from tests.models import oracle


def check(
    folder: Path,
    config: Any,
    name: str,
    *,
    permuted: bool = False,
    plus_one: bool = False,
    tensors: dict[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> Model:
    """permuted, plus_one: what the converter does to this architecture; metadata: keys beside the usual ones."""
    model = oracle.save(folder / "plain", config)
    file = folder / "model.gguf"
    writer = GGUFWriter(file, name)
    for key, value in {**usual(config), **metadata}.items():
        writer.add_key_value(f"{name}.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"t{i}" for i in range(3, config.vocab_size))])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(number_of(name), config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for module, tensor in model.state_dict().items():
        if module == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = tensor.numpy()
        part = module.split(".")[-2]
        if permuted and part in heads:
            stored = interleave(stored, heads[part])
        if plus_one and part.endswith("norm"):
            stored = stored + np.float32(1)
        tensor_name = names.get_name(module, try_suffixes=(".weight", ".bias"))
        assert tensor_name is not None, module
        writer.add_tensor(tensor_name, stored)
    for extra, values in (tensors or {}).items():
        writer.add_tensor(extra, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return compare(folder / "plain", file)


def number_of(name: str) -> Any:
    """The package's number of a general.architecture."""
    return next(number for number, said in gguf.MODEL_ARCH_NAMES.items() if said == name)


def usual(config: Any) -> dict[str, Any]:
    """What the converter writes for every model."""
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rotation(config)["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return found


def rotation(config: Any) -> dict[str, Any]:
    """rope_parameters, of layers that see everything."""
    found: dict[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return found


def array(value: np.ndarray | Codes) -> np.ndarray:
    """Codes may still be packed."""
    return value.array() if isinstance(value, Codes) else value


def compare(plain: Path, file: Path) -> Model:
    """Import both."""
    request = pipeline.Request(plain.parent / "bundle", targets.load("native"), "exact")
    want, got = (pipeline.import_checkpoint(path, request) for path in (plain, file))
    assert got.model.graph.module().script() == want.model.graph.module().script()
    for theirs, ours in zip(want.model.weights, got.model.weights, strict=True):
        pairs = zip(weights.load_weight(theirs, want.source), weights.load_weight(ours, got.source), strict=True)
        for (name, expected), (same, values) in pairs:
            assert same == name
            assert np.array_equal(array(values), array(expected)), name
    for field in ("context", "vocab_size", "bos", "eos", "parameters", "caches"):
        assert getattr(got.model, field) == getattr(want.model, field), field
    return got.model

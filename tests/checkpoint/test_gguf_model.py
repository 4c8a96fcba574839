"""GGUF names and metadata: the gguf package's own name map, the config.json that comes out, and refusals."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from compiler import models
from compiler.checkpoint import gguf_model
from compiler.errors import CheckpointError, UnsupportedError, UserError
from compiler.quant.formats import open_source
from tests.checkpoint.gguf_files import TOKENS, key, open_gguf, raw, tensor, write_llama

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1}


def refusal(path: Path, kind: type[UserError]) -> str:
    with pytest.raises(kind) as error:
        open_gguf(path)
    return str(error.value)


@pytest.mark.parametrize("name", models.gguf_architectures())
def test_names_are_the_inverse_of_the_package(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    architecture = models.gguf_architectures()[name]
    config = transformers.CONFIG_MAPPING[architecture.model_type or name](**SMALL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    number = next(enum for enum, said in gguf.MODEL_ARCH_NAMES.items() if said == name)
    names = gguf.get_tensor_name_map(number, 2)
    for ours in model.state_dict():
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, ours
        assert architecture.module_name(theirs) == ours


def test_what_config_json_would_say(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_llama(tmp_path / "tiny.gguf"))
    assert checkpoint.name == "tiny"
    assert checkpoint.config.data == {
        "model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 128, "hidden_size": 256,
        "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05, "vocab_size": len(TOKENS), "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "quantization_config": {"quant_method": "gguf", "interleaved": True, "norms_plus_one": False}}
    assert checkpoint.config.where("hidden_size") == f"{tmp_path / 'tiny.gguf'}: llama.embedding_length"
    assert open_gguf(tmp_path).path == tmp_path / "tiny.gguf"


def test_what_no_model_reads_keeps_its_name(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {"llama.expert_count": 8, "llama.rope.scaling.attn_factor": 1.0,
                                "llama.attention.value_length": 32, "llama.new_trick": 1}
    path = write_llama(tmp_path / "m.gguf", **metadata)
    config = open_gguf(path).config
    assert {name for name in config.names() if name.startswith("llama.")} == {
        "llama.expert_count", "llama.attention.value_length", "llama.new_trick"}
    config.accept(*(name for name in config.names() if not name.startswith("llama.")))
    with pytest.raises(UserError) as error:
        config.refuse_unhandled()
    assert str(error.value) == (
        f"{path}: llama.expert_count is 8; {path}: llama.new_trick is 1; {path}: llama.attention.value_length is 32: "
        f"quern does not know this key and will not guess what it changes. If it changes nothing in the computation, "
        f"remove it; otherwise the model is not supported.")


def factors_file(path: Path, factors: np.ndarray) -> Path:
    keys = [key("general.architecture", "str", "llama"), key("llama.rope.freq_base", "f32", 500000.0)]
    data = bytes(32) + factors.astype(np.float32).tobytes()
    path.write_bytes(raw(keys, [tensor("token_embd.weight", (1, 8), 0, 0),
                                tensor("rope_freqs.weight", (len(factors),), 0, 32)], data))
    return path


def test_llama3_scaling_comes_back_from_its_factors(tmp_path: Path) -> None:
    for factor in (8.0, 32.0):
        rope = {**LLAMA3, "factor": factor}
        path = factors_file(tmp_path / "m.gguf", gguf_model.llama3_divisors(rope, 64))
        config = open_gguf(path).config
        assert config.data["rope_parameters"] == rope
        assert config.where("rope_parameters") == f"{path}: rope_freqs.weight"
    path = factors_file(tmp_path / "m.gguf", np.linspace(1, 8, 64))
    assert refusal(path, UnsupportedError) == (
        f"{path}: rope_freqs.weight holds rotary scaling that is not Llama 3's. Take the model as safetensors, if "
        f"quern knows its rope_type.")


def test_llama3_divisors_are_those_of_transformers() -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**{**SMALL, "head_dim": 128}, rope_parameters=LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(64) / 64)
    assert np.allclose(plain / scaled.numpy(), gguf_model.llama3_divisors(LLAMA3, 64), rtol=1e-6, atol=0)


def test_gemma_norms_lose_the_one_that_the_converter_added(tmp_path: Path) -> None:
    w = np.array([-0.5, 0, 0.125, 3], np.float32)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw([key("general.architecture", "str", "gemma2")], [
        tensor("token_embd.weight", (1, 8), 0, 0), tensor("output_norm.weight", (4,), 0, 32)],
        bytes(32) + (1 + w).tobytes()))
    assert open_source(open_gguf(path)).vector("model.norm").tolist() == w.tolist()


@pytest.mark.parametrize(("keys", "tensors", "message"), [
    ([], [("token_embd.weight", (1, 8))],
     f"P: general.architecture is null, but quern reads {', '.join(sorted(models.gguf_architectures()))} from "
     "GGUF. Take the model as safetensors, if quern knows its model_type."),
    ([key("general.architecture", "str", "llama"), key("split.count", "u32", 3)], [("token_embd.weight", (1, 8))],
     "P is one of 3 parts. Merge them first: llama-gguf-split --merge FIRST_PART MERGED.gguf"),
    ([key("general.architecture", "str", "llama")], [("token_embd.weight", (1, 8)), ("blk.0.ffn_gate_exps.weight",
                                                                                    (2, 2, 2))],
     "P: the tensor 'blk.0.ffn_gate_exps.weight' belongs to no llama that quern knows. Take the model as safetensors, "
     "if quern knows its model_type."),
    ([key("general.architecture", "str", "llama")], [("token_embd.weight", (1, 8)), ("rope_freqs.weight", (2, 4))],
     "P: rope_freqs.weight is float32 [2, 4], but rotary factors are a short float32 vector. Take the model as "
     "safetensors, if quern knows its rope_type."),
])
def test_refusals(tmp_path: Path, keys: list[bytes], tensors: list[tuple[str, tuple[int, ...]]], message: str) -> None:
    path = tmp_path / "m.gguf"
    headers: list[Any] = [tensor(name, shape, 0, 32 * i) for i, (name, shape) in enumerate(tensors)]
    path.write_bytes(raw(keys, headers, bytes(32 * len(tensors))))
    assert refusal(path, UnsupportedError).replace(str(path), "P") == message


def test_a_file_without_embedding_and_folders_with_several_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(raw([key("general.architecture", "str", "llama")], [tensor("output_norm.weight", (8,), 0, 0)],
                         bytes(32)))
    assert refusal(path, CheckpointError) == (
        f"{path} has no matrix token_embd.weight, the embedding. Fetch the file again.")
    (tmp_path / "b.gguf").touch()
    assert refusal(tmp_path, CheckpointError) == (
        f"{tmp_path} has 2 .gguf files (a.gguf, b.gguf). Give one of the files.")

"""Files that the real libraries wrote: tensors against a plain torch unpack, whole models against recorded logits."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.checkpoint import open_checkpoint
from compiler.errors import FormatError
from compiler.quant.formats import open_source
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import dequantize
from compiler.quant.source import Source
from tests.quant import samples

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

# float32 forwards of the same weights differ by the order of summation only: at most 7e-6 seen, on logits up to 5.5,
# whose last place is worth 4.8e-7. A single code off by one moved a logit by 0.0047 to 0.025 in twelve trials.
LOGITS_TOLERANCE = 5e-5
GPTQ = [  # folder, whether act-order gives a permutation somewhere
    ("auto-gptq-gptq-4bit-sym-g128", False),
    ("auto-gptq-gptq-4bit-sym-g128-descact", True),
    ("auto-round-gptq-sym-g128", False),
    ("gptqmodel-gptq-2bit-sym-g64", False),
    ("gptqmodel-gptq-3bit-sym-g128", False),
    ("gptqmodel-gptq-4bit-asym-g128", False),
    ("gptqmodel-gptq-4bit-sym-g128", False),
    ("gptqmodel-gptq-4bit-sym-g128-descact", True),
    ("gptqmodel-gptq-4bit-sym-g128-lmhead", False),
    ("gptqmodel-gptq-4bit-sym-g32", False),
    ("gptqmodel-gptq-4bit-sym-perchannel", False),
    ("gptqmodel-gptq-8bit-sym-g128", False),
    ("gptqmodel-gptq_v2-4bit-asym-g128", False),
]


def open_folder(folder: Path) -> Source:
    return open_source(open_checkpoint(folder))


def fields(words: Any, bits: int) -> Any:
    """int32[rows, w] -> int64[rows, w * 32 / bits] with torch, 3 bits included: every value from the bits it covers."""
    single = (words.to(torch.int64)[..., None] >> torch.arange(32)) & 1
    stream = single.reshape(words.shape[0], -1, bits)
    return (stream << torch.arange(bits)).sum(-1)


def by_torch(tensors: dict[str, Any], module: str, bits: int, stored_plus: int) -> Any:
    """f32[n, k] of a GPTQ module, with none of quern's code."""
    q = fields(tensors[f"{module}.qweight"].t(), bits)
    zeros = (fields(tensors[f"{module}.qzeros"], bits) + stored_plus) % (1 << bits)
    group = tensors[f"{module}.g_idx"].to(torch.int64)
    return tensors[f"{module}.scales"].float()[group].t() * (q - zeros[group].t())


@pytest.mark.parametrize(("name", "permuted"), GPTQ)
def test_tensors_equal_a_plain_unpack(name: str, permuted: bool) -> None:
    folder = samples.folder("checkpoints", name)
    source = open_folder(folder)
    tensors = {key: value for file in folder.glob("*.safetensors")
               for key, value in safetensors_torch.load_file(file).items()}
    found = False
    for module in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        w = source.load(module)
        assert isinstance(w, QuantWeight)
        assert source.describe(module) == w.type
        found |= w.permutation is not None
        want = by_torch(tensors, module, w.type.bits, 0 if "gptq_v2" in name else 1)
        assert np.array_equal(dequantize(w), want.numpy()), module
    assert found == permuted


@pytest.mark.parametrize("name", [name for name, _ in GPTQ] + ["fp16-source"])
def test_whole_models_give_the_recorded_logits(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = samples.folder("checkpoints", name)
    source = open_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    model.load_state_dict({
        key: torch.from_numpy(dequantize(source.load(key.removesuffix(".weight"))) if value.ndim == 2
                              else source.vector(key))
        for key, value in model.state_dict().items()})
    recorded = np.load(folder / "logits.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(recorded["input_ids"])).logits.numpy()
    for key in {"logits", "logits_numpy_dequant"} & set(recorded):
        assert np.abs(logits - recorded[key]).max() < LOGITS_TOLERANCE, key


def test_the_model_in_this_repository() -> None:
    source = open_folder(samples.STORYTELLER_GPTQ)
    tensors = safetensors_torch.load_file(samples.STORYTELLER_GPTQ / "model.safetensors")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.5.mlp.down_proj"):
        assert np.array_equal(dequantize(source.load(module)), by_torch(tensors, module, 4, 1).numpy())
    assert source.describe("model.embed_tokens").grid == "bfloat16"
    assert source.vector("model.norm").shape == (256,)


@pytest.mark.parametrize("name", ["autoawq-awq-4bit-gemm-g128", "auto-round-awq-sym-g128"])
def test_awq_fed_as_gptq_is_refused(tmp_path: Path, name: str) -> None:
    sample = samples.folder("checkpoints", name)
    config = json.loads((sample / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((sample / "model.safetensors").read_bytes())
    with pytest.raises(FormatError) as error:
        open_folder(tmp_path).load("model.layers.0.self_attn.q_proj")
    assert str(error.value) == (
        f"{tmp_path / 'model.safetensors'}: model.layers.0.self_attn.q_proj.qweight is int32[256, 32], but GPTQ with 4 "
        f"bits and group_size 128 needs int32[256, 256] for k = 2048 and n = 256. These are the shapes of AWQ: if "
        f"AutoAWQ packed it, config.json must say quant_method = 'awq'.")

"""A sample of each format from checkpoint to logits: `compiler build`, then `runtime logits` on the bundle."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.gguf_files import write_llama
from tests.quant import samples

# Exact activations leave float32 sums in another order than torch's: at most 7e-6 seen on logits up to 5.5 (see
# LOGITS_TOLERANCE in test_real_checkpoints.py, which the same weights meet in torch).
LOGITS_TOLERANCE = 5e-5
SAMPLES = [  # folder, which of the recorded logits come from dequantised weights alone
    ("auto-gptq-gptq-4bit-sym-g128", "logits"),
    ("gptqmodel-gptq-4bit-sym-g128-descact", "logits"),  # act-order
    ("autoawq-awq-4bit-gemm-g128", "logits"),
    ("auto-round-autoround-sym-g128", "logits_numpy_dequant"),
    ("llmcompressor-compressed-tensors-w4a16-asym-rtn", "logits"),
    ("llmcompressor-compressed-tensors-w8a8", "logits_numpy_dequant"),
    ("bitsandbytes-nf4-dq", "logits_dequant_fp32"),
    ("bitsandbytes-fp4", "logits_dequant_fp32"),
    ("bitsandbytes-int8", "logits_dequant_fp32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "key"), SAMPLES)
def test_bundles_give_the_recorded_logits(tmp_path: Path, name: str, key: str) -> None:
    folder = samples.folder("checkpoints", name)
    recorded = np.load(folder / "logits.npz")
    run("compiler", "build", "--model", folder, "--activations", "exact", "--out", tmp_path / "bundle")
    for i, ids in enumerate(recorded["input_ids"]):
        np.save(tmp_path / "ids.npy", ids)
        run("runtime", "logits", tmp_path / "bundle", "--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy")
        worst = np.abs(np.load(tmp_path / "logits.npy") - recorded[key][i]).max()
        assert worst < LOGITS_TOLERANCE, f"row {i}: {worst}"


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "value", "down", "embedding", "head"), [
    ("Q4_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K"),  # Q4_K_M: q and k of another type than v
    ("Q8_0", "Q8_0", "Q5_1", "Q8_0", None),  # tied to a quantised embedding
])
def test_gguf_bundles_give_the_logits_of_transformers(
        tmp_path: Path, attention: str, value: str, down: str, embedding: str, head: str | None) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_llama(tmp_path / "m.gguf", attention, value, down, embedding, head)
    config = load_gguf_checkpoint(str(path))["config"]
    del config["model_type"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=head is not None)
    ids = np.arange(20) * 13 % config["vocab_size"]
    np.save(tmp_path / "ids.npy", ids)
    run("compiler", "build", "--model", path, "--activations", "exact", "--out", tmp_path / "bundle")
    run("runtime", "logits", tmp_path / "bundle", "--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy")
    with torch.no_grad():
        want = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - want).max() < LOGITS_TOLERANCE


def run(module: str, verb: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, verb, *map(str, arguments)]
    done = subprocess.run(command, cwd=samples.REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The oracle: transformers' Llama in float32 on the very weights that a bundle holds, and what may differ."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compiler.checkpoint import open_checkpoint
from compiler.quant.formats import open_source
from compiler.quant.ir import DenseWeight
from compiler.quant.reference import dequantize
from compiler.quantize import rtn

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

F32 = NDArray[np.float32]
QUANTISED = ("_proj.weight",)  # what --bits applies to: every linear layer but a dense head, which the exact path keeps


@functools.cache
def model(folder: Path, bits: int | None = None, group_size: int | None = None) -> Any:
    """The checkpoint as a torch model: weights dequantised and, with `bits`, the dense ones quantised to nearest."""
    source = open_source(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()

    def values(key: str, rank: int) -> F32:
        if rank == 1:
            return source.vector(key)
        module = key.removesuffix(".weight")
        weight = source.load(module if source.has(module) else "model.embed_tokens")  # a tied head
        if bits and isinstance(weight, DenseWeight) and key.endswith(QUANTISED):
            size = min(group_size or rtn.default_group_size(weight.type.k), weight.type.k)
            weight = rtn.quantize(weight, bits, size)
        return dequantize(weight)

    state = {key: torch.from_numpy(values(key, value.ndim)) for key, value in made.state_dict().items()}
    made.load_state_dict(state)
    return made


def logits(model: Any, ids: list[int]) -> F32:
    """f32[len(ids), vocab] of one forward, without a cache."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy(), np.float32)


def tolerance(model: Any, logits: F32) -> float:
    """How far two float32 forwards of the same weights may be apart, absolutely.

    A sum of k products rounds k times, each time by up to 2^-24 of what is in it and evenly below that (so the standard
    deviation is 2^-24 / sqrt(3)), in directions that have nothing to do with each other: sqrt(k / 3) * 2^-24 of its
    size. A layer adds two such sums to the hidden state and the head is one more: 2 * layers + 1 of them meet in a
    logit. There are two forwards (sqrt(2)), and the largest of some hundred thousand logits is 4.5 deviations out.
    """
    config = model.config
    one_sum = math.sqrt(max(config.hidden_size, config.intermediate_size) / 3) * 2.0**-24
    sums = math.sqrt(2 * config.num_hidden_layers + 1)
    return float(np.abs(logits).max()) * one_sum * sums * math.sqrt(2) * 4.5

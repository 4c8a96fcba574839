"""Random models: they describe what they load, repeat, and keep activations of size one."""

from __future__ import annotations

import numpy as np
import pytest

from compiler import models
from compiler.errors import UserError
from compiler.measure import shapes
from compiler.models import Options
from compiler.quant.ir import QuantWeight, WeightType
from compiler.quant.reference import matmul_exact

OPTIONS = Options(32, (), "float16", linear=lambda weight: weight, head=lambda weight: weight)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> shapes.RandomSource:
    small = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 8}
    rest = {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}
    monkeypatch.setitem(shapes.SHAPES, "small", {**shapes.LLAMA, **small, **rest})
    return shapes.RandomSource("small", bits=4, group_size=128, head_bits=8)


def test_kinds_by_hand(source: shapes.RandomSource) -> None:
    assert source.describe("model.embed_tokens") == WeightType(50, 64, "float16", 0)
    # 128 is cut to k
    assert source.describe("model.layers.1.self_attn.k_proj") == WeightType(16, 64, "int4", 64, symmetric=True)
    assert source.describe("model.layers.1.mlp.down_proj") == WeightType(64, 172, "int4", 128, symmetric=True)
    assert source.describe("lm_head") == WeightType(50, 64, "int8", 64, symmetric=True)
    assert len(source.modules()) == 2 + 2 * 7
    assert source.has("lm_head")
    assert not source.has("model.layers.2.mlp.down_proj")


def test_what_is_described_is_loaded_twice_the_same(source: shapes.RandomSource) -> None:
    for module in source.modules():
        first, second = source.load(module), source.load(module)
        assert first.type == second.type == source.describe(module)
        if isinstance(first, QuantWeight) and isinstance(second, QuantWeight):
            assert np.array_equal(first.codes, second.codes)
            assert np.array_equal(first.scale, second.scale)
    one, other = (source.load(f"model.layers.{i}.self_attn.o_proj") for i in (0, 1))
    assert isinstance(one, QuantWeight)
    assert isinstance(other, QuantWeight)
    assert not np.array_equal(one.codes, other.codes)


@pytest.mark.parametrize("module", ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"])
def test_activations_of_size_one_stay_so(source: shapes.RandomSource, module: str) -> None:
    weight = source.load(module)
    x = np.random.default_rng(0).standard_normal((64, weight.type.k)).astype(np.float32)
    assert 0.8 < matmul_exact(x, weight).std() < 1.25  # 64 rows: the spread is known to a few percent


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_shape_is_a_model_we_can_build(shape: str) -> None:
    source = shapes.RandomSource(shape, bits=4, group_size=128, head_bits=4)
    model = models.build(shapes.config(shape), source.describe, OPTIONS)
    if shape == "tinyllama-1.1b":
        assert model.parameters == 1_100_048_384  # of TinyLlama-1.1B-Chat-v1.0


def test_unknown() -> None:
    with pytest.raises(UserError) as caught:
        shapes.RandomSource("gpt-9", 4, 128, 4)
    assert str(caught.value) == (
        "There is no shape 'gpt-9'. Known shapes: tinyllama-1.1b, llama-0.1b, llama-0.5b, qwen2.5-0.5b, llama-3.2-1b, "
        "llama-3.2-3b, llama-2-7b, llama-3-8b, qwen2.5-1.5b, a72-count."
    )

"""GGUF files for llama.cpp: the same numbers as the checkpoint, as quern's own GGUF import and `gguf` read them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from compiler import models
from compiler.checkpoint import open_checkpoint
from compiler.errors import UnsupportedError
from compiler.measure import gguf_model, shapes
from compiler.measure.gguf_model import Shape, Writer
from compiler.measure.peers.llama_cpp import letter
from compiler.quant.formats import open_source
from compiler.quant.ir import QuantWeight
from compiler.quant.reference import dequantize

STORY = Path(__file__).parents[1] / "models" / "storyteller-5m-gptq-4bit-g128"
CONFIG = json.loads((STORY / "config.json").read_text())
HALF_STEP = 0.5 / 127  # Q8_0 rounds to 1/127 of a block's largest value, and keeps that in fp16
FP16 = 2**-11


@pytest.mark.parametrize(("kind", "grid", "zero"), [("Q4_0", "int4", 8), ("Q8_0", "int8", 128)])
def test_codes_go_over_without_rounding(kind: str, grid: str, zero: int) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 2 * zero, (6, 128), np.uint8)
    codes[0, :32] = 0
    codes[1, :32] = 2 * zero - 1
    scale = random.uniform(-1, 1, (6, 2)).astype(np.float16)
    weight = QuantWeight(codes, scale, np.full((6, 2), zero, np.int16), grid, 64)
    blocks = gguf_model.exact_blocks(weight, kind)
    assert blocks is not None
    read = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, dequantize(weight))
    other = QuantWeight(codes, scale, np.full((6, 2), zero - 1, np.int16), grid, 64)
    assert gguf_model.exact_blocks(other, kind) is None


@pytest.mark.parametrize("kind", gguf_model.SCALES_AT)
def test_random_blocks_keep_activations_near_one(kind: str) -> None:
    blocks = gguf_model.random_blocks("output", kind, 64, 1024)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert values.shape == (64, 1024)
    assert 0.7 < float(np.sqrt(np.square(values).mean())) * 1024**0.5 < 1.4
    assert np.array_equal(blocks, gguf_model.random_blocks("output", kind, 64, 1024))


def test_a_checkpoint_reads_back_as_it_was(tmp_path: Path) -> None:
    """Q4_0 holds a symmetric GPTQ checkpoint to the bit, the head is rounded to Q8_0, rows of q and k are reordered."""
    source = open_source(open_checkpoint(STORY))
    writer = Writer(Shape.of(CONFIG), "Q4_0", "Q8_0", source)
    writer.write(tmp_path / "story.gguf")
    assert (writer.exact, writer.rounded) == (6 * 7, 1)
    read = open_source(open_checkpoint(tmp_path / "story.gguf", models.gguf_architectures()))
    for module in source.modules():
        ours, theirs = dequantize(source.load(module)), dequantize(read.load(module))
        if module == "model.embed_tokens":
            assert np.abs(ours - theirs).max() <= FP16 * np.abs(ours).max()
            head = dequantize(read.load("lm_head"))
            assert np.abs(head - ours).max() <= (HALF_STEP + FP16) * np.abs(ours).max()
        else:
            assert np.array_equal(ours, theirs), module
    assert np.array_equal(read.vector("model.norm"), source.vector("model.norm"))


def test_one_letter_a_token() -> None:
    """What llama.cpp splits the text into are characters; each is one token's name, and none is a space."""
    letters = [letter(token) for token in range(152064)]
    assert len(set(letters)) == len(letters)
    assert not any(character.isspace() or len(character) != 1 for character in letters)
    assert all(len(character.encode()) == 4 for character in (letters[0], letters[-1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "phi3"}, "llama.cpp: the comparison writes llama and mistral models, not phi3."),
        ({"rope_scaling": {"rope_type": "llama3"}},
         "llama.cpp: the comparison writes models with the default rotary embedding only."),
    ],
    ids=str,
)  # fmt: skip
def test_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Shape.of({**shapes.settings("tinyllama-1.1b"), **change})
    assert str(caught.value) == said


def test_k_quants_need_256() -> None:
    with pytest.raises(UnsupportedError) as caught:
        gguf_model.random_blocks("blk.0.attn_q", "Q6_K", 4, 896)
    assert str(caught.value) == (
        "llama.cpp: blk.0.attn_q has 896 inputs, but Q6_K has blocks of 256. Take 4 or 8 bits: their blocks have 32."
    )

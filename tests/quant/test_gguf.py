"""GGUF blocks: one by hand, the gguf package's own dequantisation of every type, whole models against transformers."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest

from compiler.checkpoint import open_checkpoint
from compiler.errors import FormatError, UnsupportedError
from compiler.quant.formats import gguf, open_source
from compiler.quant.ir import QuantWeight, WeightType
from compiler.quant.reference import dequantize
from tests.checkpoint.gguf_files import HIDDEN, blocks, interleave, key, open_gguf, raw, tensor, write_llama
from tests.quant import samples

# float32 forwards of equal weights: see tests/quant/test_real_checkpoints.py.
LOGITS_TOLERANCE = 5e-5
HALFS = {"q2_k": [80, 82], "q3_k": [108], "q6_k": [208],
         "q4_k": [0, 2], "q5_k": [0, 2], "q4_1": [0, 2], "q5_1": [0, 2]}
EXTREMES = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0], np.float16)


def test_a_block_by_hand() -> None:  # q4_0: d = 0.5, nibbles 0xF1: weight 0 is code 1, weight 16 is code 15
    block = np.frombuffer(np.float16(0.5).tobytes() + bytes([0xF1] * 16), np.uint8).reshape(1, 18)
    w = gguf.decode(block, "q4_0", "x")
    assert w.type == WeightType(1, 32, "int4", 32, "float16", symmetric=True)
    assert dequantize(w)[0].tolist() == [-3.5] * 16 + [3.5] * 16


def test_a_superblock_by_hand() -> None:  # q4_k: d = 2, dmin = 1; s[0] = 3, m[0] = 5; s[4] = 0x21, m[4] = 0x12
    packed = np.zeros(12, np.uint8)
    packed[0], packed[4], packed[8] = 3 | 2 << 6, 5 | 1 << 6, 0x21
    halfs = np.array([2, 1], np.float16).tobytes()
    w = gguf.decode(np.frombuffer(halfs + packed.tobytes() + bytes([0x74] * 128), np.uint8).reshape(1, 144), "q4_k",
                    "x")
    assert w.offset is not None
    assert w.scale[0, [0, 4]].tolist() == [6, 2 * 0x21]
    assert w.offset[0, [0, 4]].tolist() == [-5, -0x12]
    assert w.codes[0, [0, 31, 32, 63]].tolist() == [4, 4, 7, 7]


@pytest.mark.parametrize("kind", sorted(gguf.BLOCKS))
def test_every_type_equals_the_package_bit_for_bit(kind: str) -> None:
    random, block = np.random.default_rng(1), gguf.BLOCKS[kind]
    stored = random.integers(0, 256, (7, 5 * block.nbytes), np.uint8)
    flat = stored.reshape(-1, block.nbytes)
    for at in HALFS.get(kind, [0]):
        half = np.where(np.arange(len(flat)) < 16, np.resize(EXTREMES, len(flat)),
                        random.standard_normal(len(flat)).astype(np.float16))
        flat[:, at:at + 2] = np.roll(half, at).view(np.uint8).reshape(-1, 2)
    theirs = package.quants.dequantize(stored, package.GGMLQuantizationType[kind.upper()])
    w = gguf.decode(stored, kind, "x")
    columns, symmetric = 5 * block.weights, not block.offset and not kind.startswith("iq4")
    want = WeightType(7, columns, block.grid, block.group, block.scale, block.offset, symmetric=symmetric)
    assert w.type == want
    mine = dequantize(w)
    assert np.array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("kind", sorted(gguf.BLOCKS))
def test_scales_that_are_not_finite_are_refused(kind: str) -> None:
    block = gguf.BLOCKS[kind]
    for at in HALFS.get(kind, [0]):
        stored = np.full((1, block.nbytes), 1, np.uint8)
        stored[0, at:at + 2] = np.array([np.inf], np.float16).view(np.uint8)
        with pytest.raises(FormatError) as error:
            gguf.decode(stored, kind, "x")
        groups = block.weights // block.group
        assert str(error.value) == (f"x: {groups} of {groups} scales or offsets are NaN or infinite. The file is "
                                    f"damaged or the quantisation failed: fetch it again.")


def test_rows_of_q_and_k_come_back_in_order(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf", "Q4_K")
    source, reader = open_source(open_gguf(path)), package.GGUFReader(path)
    stored = {t.name: package.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for module, name, heads in (("q_proj", "blk.1.attn_q.weight", 4), ("k_proj", "blk.1.attn_k.weight", 2)):
        mine = dequantize(source.load(f"model.layers.1.self_attn.{module}"))
        assert np.array_equal(interleave(mine, heads), stored[name])
        assert not np.array_equal(mine, stored[name])


@pytest.mark.parametrize(("attention", "value", "down", "embedding", "head"), [
    ("Q4_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K"),  # as Q4_K_M files are
    ("Q5_K", "Q5_K", "Q5_K", "Q8_0", None),
    ("Q4_0", "Q4_0", "Q4_1", "Q4_0", "Q6_K"),
    ("Q5_0", "Q5_1", "Q8_0", "F16", "F32"),
    ("IQ4_XS", "IQ4_NL", "Q5_K", "BF16", "Q8_0"),
    ("Q2_K", "Q3_K", "Q3_K", "Q2_K", "Q6_K"),  # as Q2_K files are
])
def test_whole_models_equal_transformers(tmp_path: Path, attention: str, value: str, down: str, embedding: str,
                                         head: str | None) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_llama(tmp_path / "m.gguf", attention, value, down, embedding, head)
    config = load_gguf_checkpoint(str(path))["config"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{name: item for name, item in config.items() if name in transformers.LlamaConfig().to_dict()
           and name != "model_type"})).float().eval()
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(loaded, strict=head is not None)
    checkpoint = open_gguf(path)
    source = open_source(checkpoint)
    ours = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{name: item for name, item in checkpoint.config.data.items() if name != "quantization_config"})).eval()
    assert ours.config.tie_word_embeddings == (head is None)
    state: dict[str, Any] = {}
    for name, tensor_ in ours.state_dict().items():
        if name == "lm_head.weight" and head is None:
            state[name] = state["model.embed_tokens.weight"]
        elif tensor_.ndim == 2:
            state[name] = torch.from_numpy(dequantize(source.load(name.removesuffix(".weight"))))
            assert torch.equal(state[name], loaded[name].float()), name
        else:
            state[name] = torch.from_numpy(source.vector(name))
    ours.load_state_dict(state)
    ids = torch.arange(24).reshape(2, 12) * 7 % 300
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < LOGITS_TOLERANCE


def test_repacked_codes_are_the_stored_bytes() -> None:
    stored = blocks("Q4_0", 4, 64, np.random.default_rng(2))
    w = gguf.decode(stored, "q4_0", "x")
    codes = w.codes.reshape(8, 2, 16)
    again = np.concatenate([w.scale.reshape(8, 1).view(np.uint8), codes[:, 0] | codes[:, 1] << 4], axis=1)
    assert np.array_equal(again.reshape(stored.shape), stored)


def minimal(path: Path, *tensors: bytes, data: bytes) -> Path:
    keys = [key("general.architecture", "str", "llama"), key("llama.attention.head_count", "u32", 2)]
    path.write_bytes(raw(keys, [tensor("token_embd.weight", (1, 8), 0, 0), *tensors], data))
    return path


def test_refusals(tmp_path: Path) -> None:
    path = minimal(tmp_path / "m.gguf", tensor("output.weight", (1, 256), 22, 32),
                   tensor("blk.0.attn_q.weight", (6, 8), 0, 128), tensor("blk.0.attn_k.weight", (2, 8), 24, 320),
                   data=bytes(352))
    source = open_source(open_gguf(path))
    with pytest.raises(UnsupportedError) as unsupported:
        source.load("lm_head")
    assert str(unsupported.value) == (
        f"{path}: lm_head is iq2_s, but quern decodes bfloat16, float16, float32, iq4_nl, iq4_xs, q2_k, q3_k, q4_0, "
        f"q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0. Take the model as Q4_K_M, Q5_K_M, Q6_K or Q8_0.")
    with pytest.raises(UnsupportedError, match=r"self_attn\.k_proj is int8, but quern decodes"):
        source.load("model.layers.0.self_attn.k_proj")
    assert source.has("lm_head")
    assert not source.has("model.layers.9.mlp.up_proj")


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    path = minimal(tmp_path / "m.gguf", tensor("blk.0.attn_q.weight", (6, 8), 0, 32), data=bytes(224))
    with pytest.raises(Exception) as error:  # noqa: PT011 - the whole message follows
        open_source(open_gguf(path)).load("model.layers.0.self_attn.q_proj")
    assert str(error.value) == (f"{path}: model.layers.0.self_attn.q_proj has 6 rows, which are not 2 heads of even "
                                f"width. Fetch the file again.")


def test_biases_move_with_their_rows(tmp_path: Path) -> None:
    bias = np.arange(8, dtype=np.float32)
    data = bytes(32) + bytes(8 * 8 * 4) + interleave(bias, 2).tobytes()
    path = minimal(tmp_path / "m.gguf", tensor("blk.0.attn_q.weight", (8, 8), 0, 32),
                   tensor("blk.0.attn_q.bias", (8,), 0, 288), data=data)
    found = open_source(open_gguf(path)).bias("model.layers.0.self_attn.q_proj")
    assert found is not None
    assert found.tolist() == bias.tolist()


def test_a_safetensors_checkpoint_is_not_taken_for_gguf() -> None:
    source = open_source(open_checkpoint(samples.STORYTELLER_GPTQ))
    assert isinstance(source.load("model.layers.0.self_attn.q_proj"), QuantWeight)
    assert not isinstance(source, gguf.GgufSource)
    assert HIDDEN == 256

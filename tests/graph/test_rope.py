"""The rotary table: by hand, against the C library's functions, and against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compiler.graph import rope

HEADS = [(2, 10000.0), (16, 10000.0), (64, 10000.0), (64, 500000.0), (80, 10000.0), (128, 1e6), (128, 12345.6)]
HALF_ULP = 2.0**-25  # of a float32 from 0.5 to 1: what rounding once may cost a cosine
TORCH_ULP = 2.0**-24  # torch's vectorised float32 cosine is good to one unit in the last place
FREQUENCY_ULP = 2.0**-23  # relative: where the float32 power of torch is rounded the other way


def test_by_hand() -> None:  # 100 ** 0 and 100 ** -(2 / 4); position 0 does not turn
    assert rope.inverse_frequencies(4, 100.0).tolist() == [1, np.float32(0.1)]
    table = rope.Rotation(np.array([np.pi / 2, np.pi], np.float32)).table(3, 4)
    assert table[0].tolist() == [1, 1, 0, 0]
    assert table[1].tolist() == pytest.approx([0, -1, 1, 0], abs=1e-7)
    assert table[2].tolist() == pytest.approx([-1, 1, 0, 0], abs=2e-7)
    assert (str(table.dtype), table.shape) == ("float32", (3, 4))


@pytest.mark.parametrize(("head_dim", "theta"), HEADS)
def test_every_value_is_rounded_once(head_dim: int, theta: float) -> None:
    """The same float32 on every machine: the C library, which shares no code with numpy's vector loops, agrees."""
    base = float(np.float32(theta))
    powers = [np.float32(math.pow(base, np.float32(2 * i) / np.float32(head_dim))) for i in range(head_dim // 2)]
    frequencies = rope.inverse_frequencies(head_dim, theta)
    assert frequencies.tolist() == [np.float32(1) / power for power in powers]
    table = rope.Rotation(frequencies).table(300, head_dim)
    for position in (0, 1, 299):
        angles = [float(np.float32(position) * f) for f in frequencies]
        want = [f(angle) for f in (math.cos, math.sin) for angle in angles]
        assert table[position].tolist() == np.array(want).astype(np.float32).tolist()


@pytest.mark.parametrize(("head_dim", "theta"), HEADS)
def test_against_transformers(head_dim: int, theta: float) -> None:
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama")
    config = llama.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    oracle = llama.modeling_llama.LlamaRotaryEmbedding(config)
    theirs = oracle.inv_freq.numpy()
    ours = rope.inverse_frequencies(head_dim, theta)
    np.testing.assert_allclose(ours, theirs, rtol=FREQUENCY_ULP, atol=0)
    assert (ours == theirs).mean() > 0.95  # numpy's own float32 power agreed in no more than 3 of 4

    cos, sin = oracle(torch.zeros(1), torch.arange(4096)[None])
    want = np.concatenate([part[0, :, : head_dim // 2].numpy() for part in (cos, sin)], axis=1)
    np.testing.assert_allclose(rope.Rotation(theirs).table(4096, head_dim), want, rtol=0, atol=HALF_ULP + TORCH_ULP)

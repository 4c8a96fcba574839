"""The model of boards with a GPU: its arithmetic by hand, and what it says of itself."""

from __future__ import annotations

import json

import pytest

from compiler.__main__ import main
from compiler.measure.gpu_forecast import BOARDS, EFFICIENCY, GAP_S, PEAK_MACS, SHARE

SHAPE = ["bench", "--shape", "llama-0.1b", "--cost", "model"]
HIDDEN, FFN, LAYERS, VOCAB = 768, 2048, 12, 32000


def test_a_shape_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE, "--target", "jetson-orin", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cost"], found["target"], found["bits"], found["context"]) == ("model", "jetson-orin", 4, 128)
    macs = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    assert found["macs_per_prompt_token"] == macs
    # Codes of 4 bits; a scale of 2 bytes and a zero for 128 inputs. Kernels may pad, but by no more than 3 %.
    codes = (macs + VOCAB * HIDDEN) * (0.5 + 3 / 128)
    assert codes <= found["weight_bytes_per_token"] <= 1.03 * codes
    assert found["cache_bytes_per_token"] == LAYERS * 2 * HIDDEN * 2
    read = found["weight_bytes_per_token"] + 128 * found["cache_bytes_per_token"]
    for board, said in zip(BOARDS["jetson-orin"], found["boards"], strict=True):
        assert said["board"] == board.name and said["fits"]
        for name, share, gap, efficiency in zip(("low", "expected", "high"), SHARE, GAP_S, EFFICIENCY, strict=True):
            reading = read / (share * board.read_mb_per_s * 1e6)
            assert said["decode_tok_s"][name] == pytest.approx(1 / (reading + found["launches_per_token"] * gap))
            peak = PEAK_MACS[87] * board.multiprocessors * board.clock_mhz * 1e6
            assert said["prefill_tok_s"][name] < 128 / max(reading, 128 * macs / (efficiency * peak))


def test_a_table_says_that_it_is_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE, "--target", "jetson-nano"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a model, not a measurement ")
    assert "Jetson Nano 4 GB" in out and "MiB planned, without the driver's own\n" in out


def test_a_context_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHAPE, "--target", "jetson-orin", "--context", "2048"]) == 2
    assert capsys.readouterr().err == (
        "error: --context is 2048, but llama-0.1b has 2048 positions: leave 128 for the prompt.\n"
    )

"""The model of boards with a GPU: instructions of a kernel by hand, its arithmetic, and what it says of itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import targets
from compiler.__main__ import main
from compiler.codegen import nvrtc
from compiler.measure import gpu_forecast, gpu_issue, ptx, ptx_walk
from compiler.measure.forecast import Spread
from compiler.measure.gpu_forecast import (
    BOARDS,
    GAP_S,
    ISSUED,
    LATENCY_S,
    OVERLAP,
    SHARE,
    Forecast,
    Kernel,
    Parts,
    Report,
)  # fmt: skip
from compiler.measure.gpu_issue import CHIPS, Busy

HIDDEN, FFN, LAYERS, VOCAB = 768, 2048, 12, 32000
# 3 blocks of 64 threads; a thread sums `rounds` of 128-bit loads, one of a warp's threads exchanges and writes.
SOURCE = """#include "quern.cuh"
extern "C" __global__ void strided(const uint4* x, const int32_t* span, float* out) {
  __shared__ float gathered[64];
  if (blockIdx.x >= span[0]) return;
  float sum = 0;
  const int end = opaque(span[1]);
#pragma unroll 1
  for (int i = threadIdx.x; i < end; i += 64)
    sum += bits_float(load_constant(x + blockIdx.x * 1024 + i * STEP).x);
  gathered[threadIdx.x * 2 % 64] = shuffle_xor(sum, 1);
  block_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = gathered[0];
}
"""


# One warp: fragments of fp16 hold everything twice, so a load of 16 x 16 of them is 1 KiB, as one of fp32.
FRAGMENTS = """
.visible .entry fragments(
)
{
wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%r9], %r10;
wmma.load.b.sync.aligned.col.m16n16k16.shared.s8 {%r1, %r2}, [%r9], %r10;
wmma.load.c.sync.aligned.row.m16n16k16.shared.f32 {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8}, [%r9], %r10;
wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%r9], {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8}, %r10;
ret;
}
"""


def walked(step: int, blocks: int, count: int) -> ptx_walk.Executed:
    gpu = targets.load("jetson-orin").gpu
    assert gpu is not None
    made = nvrtc.compile(SOURCE.replace("STEP", str(step)), gpu)
    assert 30 <= made.functions["strided"].instructions <= 120
    function = ptx.functions(made.ptx.decode())["strided"]
    return ptx_walk.walk(function, (3, 1, 1), (64, 1, 1), {1: np.array([blocks, count], np.int32)}, 3)


def test_what_a_kernel_executes_follows_from_its_numbers() -> None:
    one, many = walked(1, 3, 64), walked(1, 3, 64 * 5)
    assert (one.warps, one.unknown) == (6, 0)
    # 6 warps of 32 threads, 16 bytes each, every line once; span besides, by every thread.
    assert one.loads[0] == 6 * 32 * 16 and many.loads[0] == 5 * one.loads[0]
    assert many.moved - one.moved == 4 * 6 * 4 == many.lines - one.lines
    assert one.kinds[ptx.FLOAT] == 6 and many.kinds[ptx.FLOAT] == 5 * 6
    assert one.kinds[ptx.SHUFFLE] == 6 and one.stored == 3 * 4
    # Two threads of a warp meet in a bank at every second word; then one of a block reads one word.
    assert one.banks == 6 * 2 + 3
    assert many.rounds == one.rounds + 4


def test_fragments_are_read_as_machine_code_reads_them() -> None:
    code = ptx.functions(FRAGMENTS)["fragments"]
    found = ptx_walk.walk(code, (1, 1, 1), (32, 1, 1), {}, 1)
    assert found.banks == (1024 + 256 + 1024 + 1024) / 128


def test_threads_that_are_far_apart_ask_for_a_line_each() -> None:
    together, apart = walked(1, 3, 64), walked(8, 3, 64)
    assert apart.loads == together.loads and apart.moved == together.moved
    assert apart.lines - together.lines == 6 * (32 - 4)


def test_blocks_that_leave_at_once_execute_little() -> None:
    all_blocks, one_block = walked(1, 3, 64), walked(1, 1, 64)
    assert one_block.loads[0] == all_blocks.loads[0] / 3 and one_block.kinds[ptx.FLOAT] == 2
    assert one_block.warps == 6


@pytest.mark.slow
def test_every_kernel_of_a_shape_can_be_followed(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--shape", "llama-0.1b", "--cost", "model", "--target", "jetson-nano", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cost"], found["target"], found["bits"], found["context"]) == ("model", "jetson-nano", 4, 128)
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    macs = LAYERS * layer
    assert found["macs_per_prompt_token"] == macs - layer + 3 * HIDDEN * HIDDEN  # q, k and v alone of the last layer
    # Codes of 4 bits; a scale of 2 bytes and a zero for 128 inputs. Kernels may pad, but by no more than 3 %.
    codes = (macs + VOCAB * HIDDEN) * (0.5 + 3 / 128)
    assert codes <= found["weight_bytes_per_token"] <= 1.03 * codes
    assert found["cache_bytes_per_token"] == LAYERS * 2 * HIDDEN * 2
    # What the launches read is what the graph's weights and the cache have, besides activations that they write.
    read = sum(kernel["times"] * kernel["nbytes"] for kernel in found["decode"])
    expected = found["weight_bytes_per_token"] + 129 * found["cache_bytes_per_token"]
    assert expected <= read <= 1.05 * expected
    assert sum(kernel["times"] for kernel in found["decode"]) == found["launches_per_token"]
    # A half2 product is one instruction for two weights; unpacking and the rest is little more than three a weight.
    assert 0.5 * (macs + VOCAB * HIDDEN) < found["instructions_per_token"] < 4 * (macs + VOCAB * HIDDEN)
    (board,) = found["boards"]
    for speed in ("decode_tok_s", "prefill_tok_s"):
        assert 0 < board[speed]["low"] < board[speed]["expected"] < board[speed]["high"]
    assert 1 / board["decode_tok_s"]["expected"] == pytest.approx(sum(board["decode_s"].values()))


def test_a_launch_by_hand() -> None:
    board, chip = BOARDS["jetson-orin"][0], CHIPS[87]  # 8 multiprocessors, 625 MHz, 68 GB/s
    busy = Busy(issue=9e6, units=8e6, tensor=0, turns=1e6, lines=4e6, instructions=36e6, chain=1000, rounds=2)
    kernel = Kernel("k", 3, 17, 2, 34e6, busy)
    memory, issue, latency = gpu_forecast.seconds(kernel, board, chip, 1)
    assert memory == pytest.approx(34e6 / (SHARE[1] * 68e9))
    assert issue == pytest.approx(9e6 * 3 / 17 / (ISSUED[1] * 625e6))  # one of eight has three of the 17 blocks
    assert latency == pytest.approx(2 * (2 * LATENCY_S[1] + 1000 * 2 / 625e6))  # waves of 16; 2 clocks a step
    made = gpu_forecast.forecast(board, [kernel], [kernel], chip, 8193.0)
    whole = 3 * (issue + (1 - OVERLAP[1]) * memory + GAP_S[1])
    assert issue > memory > latency and made.decode_tok_s.expected == pytest.approx(1 / whole)
    assert made.prefill_tok_s.expected == pytest.approx(128 / whole) and not made.fits
    assert made.decode_s.memory == 0 and made.decode_s.gaps == pytest.approx(3 * GAP_S[1])


def test_clocks_of_a_multiprocessor_by_hand() -> None:
    kinds = np.zeros(ptx.KINDS)
    kinds[[ptx.HALF, ptx.LOGIC, ptx.SHIFT, ptx.TO_FLOAT, ptx.SHUFFLE]] = 40, 20, 10, 8, 2
    done = ptx_walk.Executed(kinds, 1, {}, 0, 12, 4, 5, 3, {}, 80, 0)
    found = gpu_issue.busy(done, 1.0, CHIPS[53])
    assert (found.issue, found.units, found.tensor) == (80 / 4, (40 + 20) / 4 + 10 / 2, 0)
    assert (found.turns, found.lines, found.clocks(2)) == (5 + 4 + 2, 8, 20)
    tensor = gpu_issue.busy(ptx_walk.Executed(kinds, 1, {}, 0, 0, 0, 0, 0, {8: 4096 * 100}, 80, 0), 1.0, CHIPS[87])
    assert tensor.tensor == 200 and tensor.units == max(40 + 8, 20 + 10) / 2
    used = nvrtc.Resources(registers=106, spill_bytes=0, shared_bytes=128)
    assert gpu_issue.resident(64, 0, used, CHIPS[53]) == 65536 // (112 * 64)
    assert gpu_issue.resident(256, 40 << 10, used, CHIPS[53]) == 1


def test_a_table_and_a_record_say_that_it_is_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speeds = Spread(10, 20, 123.4), Spread(100.4, 200, 300)
    board = Forecast("Jetson Nano 4 GB", *speeds, Parts(0.04, 0.01, 0.001, 0.001), Parts(0, 1, 0, 0), False)
    made = Report(223, 541_800_000, 1, 2, 2.82e9, 3.0, 704, (), (), (board,))
    assert asdict(made)["boards"][0]["decode_s"]["memory"] == 0.04
    monkeypatch.setattr(gpu_forecast, "report", lambda *args: made)
    command = ["bench", "--shape", "llama-0.1b", "--cost", "model", "--target", "jetson-nano"]
    assert main([*command, "--record", str(tmp_path / "r.jsonl")]) == 0
    record = json.loads((tmp_path / "r.jsonl").read_text())
    named = (record["cost"], record["target"], record["launches_per_token"], record["boards"][0]["fits"])
    assert named == ("model", "jetson-nano", 223, False) and "commit" in record and "cpu" not in record
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line.split()) for line in lines] == [
        "a model, not a measurement expected low high waits for",
        "Jetson Nano 4 GB decode after 128 (tokens/s) 20 10 123 memory 77 %, issue 19 %",
        "prefill 200 100 300 issue 100 %",
        "does not fit into its memory",
        "223 launches, 541.8 MB of weights and 2.82 billion instructions a token, 704 MiB planned, "
        "without the driver's own",
    ]


def test_a_context_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--shape", "llama-0.1b", "--cost", "model", "--target", "jetson-orin", "--context", "2048"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "error: --context is 2048, but llama-0.1b has 2048 positions: leave 128 for the prompt.\n"
    )

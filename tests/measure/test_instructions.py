"""The counting rig: exact, repeatable, blind to values; and the gates of a whole token on a Cortex-A72."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from compiler.__main__ import main
from compiler.errors import UserError
from compiler.measure import cycles, emulator
from compiler.measure.cycles import Stretch, stretches
from compiler.measure.emulator import Call, Executed, Program
from schedules import add_bias
from schedules.kernel import TensorSpec
from tests.schedules import emulated
from tests.schedules.kernels import ARM, build, request

# Counted with the same plugin for llama.cpp's Q4_0 and all of a decoded token of this shape.
LLAMA_CPP_Q4_0 = 0.973
GATE = 0.35 * LLAMA_CPP_Q4_0
# Modelled cycles a multiplication of a whole decoded token, and of its linear layers, by group size (llvm-mca 14).
CYCLES = {128: 0.14, 32: 0.18}
# Of 16 prompt tokens: 0.1425 at groups of 128, of which 0.1309 are linear layers and 0.0087 attention, where fp32 has
# 0.25 cycles a multiplication as its floor: 4 lanes keep both pipes busy for one. It was 0.1424 while the number of
# tokens was a constant: addresses of residuals take 16 instructions more a tile.
PROMPT_CYCLES = {128: 0.1427, 32: 0.156}
ARGUMENTS = ("x", "bias", "span", "out")


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, str]:
    """A program with add_bias for 2 rows of 37."""
    emulated.require("aarch64")
    x, bias = np.zeros((2, 37), np.float32), np.zeros(37, np.float32)
    built = build(add_bias.lower, request("quern.add_bias", [x, bias], [TensorSpec((2, 37), "float32")], ARM))
    (llvm,) = (m for m in built.executable.mod.imports if m.kind == "llvm")
    out = tmp_path_factory.mktemp("adder") / "program"
    return emulator.link(llvm, [built.kernel.name], ARM, out), built.kernel.name


def tensors(value: float) -> dict[str, Any]:
    x = np.arange(74, dtype=np.float32).reshape(2, 37)
    span = np.array([0, 2], np.int32)
    return {"x": x, "bias": np.full(37, value, np.float32), "span": span, "out": ((2, 37), "float32")}


def test_a_kernel_runs_there(adder: tuple[Program, str]) -> None:
    program, name = adder
    (out,) = program.run(tensors(0.5), [Call(name, ARGUMENTS)], ["out"])
    assert np.array_equal(out, np.arange(74, dtype=np.float32).reshape(2, 37) + np.float32(0.5))


def counted(program: Program, name: str, calls: int, value: float = 0.5) -> dict[int, int]:
    """Executions by address inside the kernel's body."""
    symbols = [*program.symbols(), (1 << 62, "")]
    at = next(i for i, (_, symbol) in enumerate(symbols) if symbol == f"{name}_compute_")
    low, high = symbols[at][0], symbols[at + 1][0]
    executed = program.count(tensors(value), [Call(name, ARGUMENTS)] * calls)
    return {e.address: e.count for e in executed if low <= e.address < high}


def test_counts_are_exact(adder: tuple[Program, str]) -> None:
    """Twice the calls, twice the count of every instruction; other values, the same counts."""
    program, name = adder
    once = counted(program, name, 1)
    assert once
    assert counted(program, name, 2) == {address: 2 * n for address, n in once.items()}
    assert counted(program, name, 1, value=-1e30) == once
    assert min(once.values()) >= 1
    assert max(once.values()) >= 2  # the loop over rows


def test_a_kernel_that_refuses_its_arguments_is_heard(adder: tuple[Program, str]) -> None:
    program, name = adder
    wrong = tensors(0.5) | {"x": np.zeros((2, 36), np.float32)}
    with pytest.raises(RuntimeError, match="left with 1"):
        program.run(wrong, [Call(name, ARGUMENTS)], ["out"])


def test_stretches_by_hand() -> None:
    """Cut behind a branch, where the count changes, and at a gap."""
    text = {1: "add\tx0, x0, #1", 2: "b.ne\t#-4", 3: "ret"}
    run = [Executed(0, 1, 5), Executed(4, 2, 5), Executed(8, 1, 5), Executed(12, 1, 1), Executed(20, 3, 1)]
    assert stretches(run, text) == [
        Stretch(0, (1, 2), 5), Stretch(8, (1,), 5), Stretch(12, (1,), 1), Stretch(20, (3,), 1)
    ]  # fmt: skip


def test_cycles_by_hand() -> None:
    """A chain of vector additions: 3 cycles each on a Cortex-A57, whose model LLVM takes (Optimization Guide, 3.14)."""
    add = 0x4EA18400  # add v0.4s, v0.4s, v1.4s
    found = cycles.of({"chain": [Executed(0, add, 1000)]}, ARM)["chain"]
    assert found / 1000 == pytest.approx(3, abs=0.1)  # of 100 repetitions, a few cycles to begin and to end


@pytest.mark.slow
@pytest.mark.parametrize("group", CYCLES)
def test_the_gates_of_a_whole_token(group: int, capsys: pytest.CaptureFixture[str]) -> None:
    emulated.require("aarch64")
    asked = ["bench", "--shape", "a72-count", "--target", "rpi4", "--cost", "model", "--json"]
    assert main([*asked, "--group-size", str(group)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["macs"] == 4 * (1024 * (1024 + 512 + 1024) + 3 * 1024 * 2816) + 32000 * 1024
    assert said["instructions_per_mac"] <= GATE
    assert said["prefill_instructions_per_mac"] <= GATE
    assert said["linear_cycles_per_mac"] <= said["cycles_per_mac"] <= CYCLES[group]
    assert said["prefill_linear_cycles_per_mac"] <= said["prefill_cycles_per_mac"] <= PROMPT_CYCLES[group]
    assert said["prefill_linear_cycles_per_mac"] <= CYCLES[group]
    forecast = said["forecast"]
    assert said["cost"] == "model"
    for name in ("decode_tok_s", "prefill_tok_s", "peak_mib"):
        assert 0 < forecast[name]["low"] <= forecast[name]["expected"] <= forecast[name]["high"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["story", "--cost", "model"], "--cost model compiles a shape for its target: give a --shape, not a BUNDLE."),
        (["--shape", "a72-count", "--target", "x86-64", "--cost", "model"],
         "--cost model counts instructions under qemu-user, for aarch64 and riscv64; target 'x86-64' is x86_64."),
        (["--shape", "a72-count", "--target", "rpi4", "--cost", "model", "--context", "2048"],
         "--context is 2048, but a72-count has 2048 positions: leave 16 for the prompt."),
    ],
)  # fmt: skip
def test_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_without_the_tools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cycles.tools.cache_clear()
    with pytest.raises(UserError, match=r"no llvm-mca-N with its llvm-mc-N on PATH .*: apt-get install llvm\."):
        cycles.tools()
    with pytest.raises(UserError, match=r"needs qemu-aarch64, .*: apt-get install qemu-user\."):
        emulator.qemu(targets.load("rpi4"))
    cycles.tools.cache_clear()

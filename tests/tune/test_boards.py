"""Boards with faults, over real sockets and TVM's own tracker: what is measured, what is blamed, what is given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compiler.tune import boards, tracker
from compiler.tune.boards import BoardError, BoardMeasurer
from compiler.tune.measure import EMULATED, RPC, Batch, DeviceLost, NoisyError, Setting
from runtime.rpc_tracker import Address
from schedules import kernel
from schedules.kernel import Space
from tests.tune import fake_board
from tests.tune.test_records import NATIVE, linear

REQUEST = linear(64)
KEY = "mill"
REPLY_S = 20.0


def room() -> Space:
    found = kernel.space(REQUEST)
    assert found is not None
    return found


SPACE = room()
GOOD = {**SPACE.default, "row_blocks": 1}
OTHER = {**SPACE.default, "unroll": 2}
WRONG = {**SPACE.default, "row_blocks": 3, "unroll": 5}


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with tracker.running() as found:
        yield found


@pytest.fixture(scope="module")
def worker(address: Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoardMeasurer]:
    """One for all tests: TVM is loaded, and the candidates are linked, once."""
    setting = replace(Setting.here(1), cpu="unknown", measured=RPC)
    made = BoardMeasurer(
        setting, reply_s=REPLY_S, most_drift=1000, tracker=str(address), key=KEY, target=NATIVE,
        folder=tmp_path_factory.mktemp("libraries"), least_bytes=1 << 20,
    )  # fmt: skip
    yield made
    made.close()


@pytest.fixture
def measurer(worker: BoardMeasurer, monkeypatch: pytest.MonkeyPatch) -> BoardMeasurer:
    """The same without a memory of boards, and in a hurry."""
    monkeypatch.setattr(boards, "COOL_S", 0.01)
    monkeypatch.setattr(boards, "SOON_S", 3.0)
    worker._best_spin.clear()
    worker._opened = None
    return worker


def measured(batch: Batch, failures: int = 0) -> None:
    """Every candidate has times, but for the last few."""
    times = batch.timings[: len(batch.timings) - failures]
    assert times
    for timing in (*times, batch.default):
        assert timing.failure is None and len(timing.speedups) == 3 and all(0 < s < 1 for s in timing.seconds)
    assert len(batch.reads) == 3 and batch.rotated_bytes >= 1 << 20 and len(batch.spins) == 4
    assert batch.bytes_per_call == 1024 + 128 + 64  # 4 blocks of 16 rows, 32 inputs: codes, scales, zeros


Offer = Callable[[str], Any]


@pytest.fixture
def offer(address: Address, measurer: BoardMeasurer, tmp_path: Path) -> Offer:
    """A board with a fault; a session with the board of the test before is over."""

    def made(fault: str) -> Any:
        return fake_board.offered(address, KEY, fault, tmp_path)

    return made


def test_candidates_beside_the_default(measurer: BoardMeasurer, offer: Offer) -> None:
    with offer("Board"):
        batch = measurer.measure(REQUEST, SPACE, [GOOD, OTHER, WRONG], rounds=3)
        measured(batch, failures=1)
        assert batch.timings[2].failure is not None and batch.timings[2].seconds == []
        assert (measurer.setting.measured, measurer.setting.cpu) == (RPC, measurer._about["cpu"])


@pytest.mark.parametrize("fault", ["Garbage", "Dies", "Slow"])
def test_a_fault_that_can_be_told(measurer: BoardMeasurer, offer: Offer, fault: str) -> None:
    with offer(fault):
        started = time.monotonic()
        batch = measurer.measure(REQUEST, SPACE, [OTHER, GOOD] if fault != "Dies" else [GOOD, OTHER], rounds=3)
    if fault == "Slow":
        assert time.monotonic() - started > 1.5
    if fault != "Dies":
        measured(batch)
        return
    dead, alive = batch.timings
    assert alive.failure is None and alive.seconds
    assert dead.failure is not None and dead.failure.endswith(": signal 4, Illegal instruction")


def test_a_board_that_hangs_is_left(measurer: BoardMeasurer, offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurer, "_time_s", lambda count, rounds: 4.0)
    with offer("Hangs"):
        measured(measurer.measure(REQUEST, SPACE, [GOOD], rounds=3))


def test_a_board_without_power_is_exchanged(
    measurer: BoardMeasurer, offer: Offer, address: Address, tmp_path: Path
) -> None:
    with offer("Vanishes") as first:
        with pytest.raises(DeviceLost) as caught:  # it was the only one
            measurer.measure(REQUEST, SPACE, [OTHER, GOOD], rounds=3)
        assert str(caught.value) == f"the tracker at {address} has no free board of key 'mill'"
        assert first.wait() == -9
        with fake_board.offered(address, KEY, "Board", tmp_path):
            measured(measurer.measure(REQUEST, SPACE, [OTHER, GOOD], rounds=3))


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("AlwaysVanishes", "it fails with the default kernel, too: {}: signal 9, Killed"),
        ("Lies", "it fails with the default kernel, too: {}: the default kernel's results change from run to run"),
    ],
)
def test_a_broken_board_blames_no_candidate(measurer: BoardMeasurer, offer: Offer, fault: str, why: str) -> None:
    with offer(fault):
        with pytest.raises(DeviceLost) as caught:
            measurer.measure(REQUEST, SPACE, [GOOD, OTHER], rounds=3)
    assert str(caught.value) == why.format(measurer._about["address"])


@pytest.mark.parametrize("attempts", [4, 2])
def test_a_hot_board_may_cool(
    measurer: BoardMeasurer, offer: Offer, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    monkeypatch.setattr(measurer, "most_drift", 1.0)
    monkeypatch.setattr(BoardMeasurer, "_drift", lambda self, batch: 0.0)
    monkeypatch.setattr(BoardMeasurer, "_most_foreign", lambda self: 1.0)
    monkeypatch.setattr(BoardMeasurer, "repeats", attempts)
    with offer("Hot"):
        measured(measurer.measure(REQUEST, SPACE, [GOOD], rounds=3))  # at its best
        if attempts == 2:  # the batch was hot, so was the look at the clock after it
            with pytest.raises(NoisyError) as caught:
                measurer.measure(REQUEST, SPACE, [GOOD], rounds=3)
            assert str(caught.value) == (
                "the board's clock is 50% slower than at its best (32% is the limit): it throttles or is busy"
            )
        else:
            measured(measurer.measure(REQUEST, SPACE, [GOOD], rounds=3))


def test_the_firmware_knows_of_heat(measurer: BoardMeasurer) -> None:
    said = "the board's firmware holds its clock down: it is too hot, or its power supply is too weak"
    measurer._about = {"address": "stone:1"}
    assert measurer._heat((1.0,), throttled=True) == said
    assert measurer._heat((1.0,), throttled=False) is None


ABOUT = {"address": "stone:1", "name": "stone", "session": 1, "arch": NATIVE.arch, "features": list(NATIVE.cpuinfo),
         "glibc": "2.40", "cpu": "stone", "tvm_ffi": [0, 1, 15], "emulator": None}  # fmt: skip
NO_NATIVE = "The board at stone:1 (stone) is offered as 'mill', but is no native: it is "
OTHER_KEY = ". Give boards of another kind another --key."


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"tvm_ffi": [0, 2, 0]}, "The board at stone:1 (stone) has tvm-ffi 0.2.0, but kernels are made here for 0.1. "
         "Give it the libraries of this release: build --self-contained."),
        ({"arch": "riscv64"}, f"{NO_NATIVE}riscv64, CPU stone, glibc 2.40{OTHER_KEY}"),
        ({"glibc": "2.2"}, f"{NO_NATIVE}{NATIVE.arch}, CPU stone, glibc 2.2{OTHER_KEY}"),
        ({"features": sorted(NATIVE.cpuinfo)[1:]},
         f"{NO_NATIVE}{NATIVE.arch}, CPU stone, glibc 2.40, without {min(NATIVE.cpuinfo)}{OTHER_KEY}"),
    ],
)  # fmt: skip
def test_another_machine_is_refused(measurer: BoardMeasurer, about: dict[str, Any], said: str) -> None:
    with pytest.raises(BoardError) as caught:
        measurer._admit(ABOUT | about)
    assert str(caught.value) == said


def test_an_emulated_board_says_so(measurer: BoardMeasurer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Setting] = []
    monkeypatch.setattr(measurer, "setting", measurer.setting)
    monkeypatch.setattr(measurer, "admit", seen.append)
    measurer._admit(ABOUT | {"emulator": "qemu-aarch64"})
    assert measurer.setting.measured == EMULATED and seen == [measurer.setting]

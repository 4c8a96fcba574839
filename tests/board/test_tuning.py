"""Two emulated boards tune together through TVM's tracker: one is killed in the middle, and comes back."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler.tune import fleet, tracker
from compiler.tune.boards import BoardMeasurer
from compiler.tune.fleet import Fleet
from compiler.tune.measure import EMULATED, Setting
from compiler.tune.records import Database, frozen
from compiler.tune.search import Task, Tuner
from runtime.rpc_tracker import Address
from schedules.kernel import space
from tests.tune.test_records import linear
from tests.waiting import wait_for

pytestmark = [pytest.mark.board, pytest.mark.slow]
RPI4 = targets.load("rpi4")
TRIALS, KILLED_AFTER = 10, 3
LOOSE = 1000.0  # of drift: an emulator's times are no times


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with tracker.running() as found:
        yield found


@contextlib.contextmanager
def offered(board: Any, address: Address, log: Path) -> Iterator[Any]:
    """A board as its owner starts it."""
    with log.open("a") as file:
        server = board.start_runtime(
            ["rpc-server", "--tracker", str(address), "--key", "rpi4", "--port", "0"], stderr=file
        )
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def test_two_boards_one_of_which_dies_and_comes_back(
    board: Any, address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MOST_PAUSE_S", 1.0)
    monkeypatch.setattr("compiler.tune.search.BATCH", 2)
    request = linear(64, RPI4)
    asked, setting = space(request), replace(Setting.here(1), measured="rpc")
    assert asked is not None
    told: list[str] = []
    database = Database.writing(tmp_path / "own", "rpi4")
    measurers = [
        BoardMeasurer(setting, most_drift=LOOSE, tracker=str(address), key="rpi4", target=RPI4, folder=tmp_path,
                      admit=lambda found: database.admit(found.measured), least_bytes=1 << 16)
        for _ in range(2)
    ]  # fmt: skip
    tuner = Tuner(database, measurers[0], TRIALS, devices=2)
    outcomes: list[Any] = []
    both = Fleet(tuner, measurers, told.append)
    thread = threading.Thread(target=lambda: outcomes.extend(both.run([Task(request, asked)])))
    with offered(board, address, tmp_path / "first"):
        with offered(board, address, tmp_path / "second") as killed:
            thread.start()
            wait_for(lambda: len(database.records) >= KILLED_AFTER)
            wait_for(lambda: "a client came" in (tmp_path / "second").read_text())
            killed.kill()
            killed.wait()
        at_death = len(database.records)
        with offered(board, address, tmp_path / "again"):
            thread.join(300)
            assert not thread.is_alive()
    database.close()
    (outcome,) = outcomes
    records = Database.read(tmp_path / "own", "rpi4").records
    points = [frozen(record["knobs"]) for record in records if record["kind"] == "trial"]
    assert at_death < TRIALS == len(points) == len(set(points)) == outcome.trials
    assert (outcome.failed, outcome.noise) == (0, None) and outcome.choice["trials"] == TRIALS
    assert {(r["measured"], r["cpu"], r["target"]) for r in records} == {(EMULATED, "0xd08", "rpi4")}
    for log in ("first", "second", "again"):
        assert "a client came" in (tmp_path / log).read_text(), told


def test_the_board_says_that_it_is_emulated(board: Any) -> None:
    from compiler.board import qemu

    told = "[board.emulator(), board.cpu_model(), board.throttled()]"
    code = f"import json; from runtime import board; print(json.dumps({told}))"
    said = board.run(["-c", code], pythonpath=[qemu.runtime_folder()]).stdout
    assert json.loads(said) == ["qemu-aarch64", "0xd08", False]

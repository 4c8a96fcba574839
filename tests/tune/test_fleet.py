"""Several boards into one database, by formula: shared work, boards that go and come, and who is told what."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from compiler.tune import fleet, search
from compiler.tune.boards import BoardError, BoardMeasurer
from compiler.tune.fleet import Fleet
from compiler.tune.measure import Batch, DeviceLost, NoisyError, Timing
from compiler.tune.records import Database, frozen
from compiler.tune.search import Outcome, Task, Tuner
from schedules.kernel import Request, Space
from tests.tune.test_records import linear
from tests.tune.test_search import LARGE, SETTING, SMALL

BATCH_S = 0.01  # seconds of a batch


@dataclass
class Board:
    """seconds(knobs) of a call. trouble(n): raises what befalls the n-th batch; absent(n): raises in the n-th wait."""

    seconds: Callable[[Mapping[str, int]], float] = lambda knobs: 1.0
    trouble: Callable[[int], None] = lambda n: None
    absent: Callable[[int], None] = lambda n: None
    batch_s: float = BATCH_S
    setting: Any = SETTING
    asked: list[Any] = field(default_factory=list)
    cancelled: Callable[[], bool] = lambda: False
    batches: int = 0
    waits: int = 0
    closed: bool = False

    def ready(self) -> None:
        """Wait for a board."""
        self.waits += 1
        self.absent(self.waits)

    def measure(self, request: Request, space: Space, candidates: Sequence[Mapping[str, int]], rounds: int) -> Batch:
        """By formula, after a while."""
        self.batches += 1
        time.sleep(self.batch_s)
        self.trouble(self.batches)
        found = []
        for knobs in candidates:
            if rounds == search.ROUNDS:
                self.asked.append(frozen(knobs))
            seconds = self.seconds(knobs)
            found.append(Timing([seconds] * rounds, [self.seconds(space.default) / seconds] * rounds))
        return Batch(found, Timing([1.0] * rounds, [1.0] * rounds), [20.0] * rounds, 1000, 100.0)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def after(count: int, error: Exception, until: int = 10**9) -> Callable[[int], None]:
    """Trouble from the count-th time on, before the until-th."""

    def trouble(n: int) -> None:
        if count <= n < until:
            raise error

    return trouble


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE_S", 0.01)
    monkeypatch.setattr(fleet, "WATCH_S", 0.01)


def tune(
    folder: Path, boards: list[Board], spaces: Sequence[Space] = (LARGE,), trials: int = 32, patience_s: float = 60
) -> tuple[list[Outcome], list[str]]:
    """Outcomes, and the lines that were told."""
    told: list[str] = []
    database = Database.writing(folder, "mill")
    try:
        measurers = cast("list[BoardMeasurer]", boards)
        tuner = Tuner(database, measurers[0], trials, devices=len(boards))
        made = Fleet(tuner, measurers, told.append, patience_s)
        return made.run([Task(linear(32), space) for space in spaces]), told
    finally:
        database.close()


def once(folder: Path, boards: list[Board], count: int, space: Space = LARGE) -> None:
    """So many trials are in the database, each once, whoever measured them."""
    records = Database.read(folder, "mill").records
    points = [frozen(r["knobs"]) for r in records if r["kind"] == "trial" and r["workload"] == dict(space.workload)]
    assert len(points) == len(set(points)) == count
    assert set(points) <= {point for board in boards for point in board.asked}


def test_boards_share_a_shape(tmp_path: Path) -> None:
    boards = [Board(lambda knobs: 1 + sum(knobs.values())) for _ in range(3)]
    (outcome,), told = tune(tmp_path, boards)
    assert (outcome.trials, outcome.new, outcome.noise, told) == (32, 32, None, [])
    assert outcome.choice is not None and outcome.choice["rounds"] == search.FINAL_ROUNDS
    assert all(board.asked for board in boards) and all(board.closed for board in boards)
    once(tmp_path, boards, 32)


def test_boards_go_on_with_the_next_shape(tmp_path: Path) -> None:
    boards = [Board(), Board()]
    outcomes, _ = tune(tmp_path, boards, [LARGE, SMALL])
    assert [outcome.trials for outcome in outcomes] == [32, 3]
    assert all(outcome.choice is not None for outcome in outcomes)
    once(tmp_path, boards, 3, SMALL)


def test_what_a_lost_board_had_is_measured_by_another(tmp_path: Path) -> None:
    gone = DeviceLost("no board")
    lost = Board(trouble=after(2, gone), absent=after(3, gone))
    boards = [lost, Board(batch_s=0.1)]
    (outcome,), told = tune(tmp_path, boards)
    assert (outcome.trials, outcome.noise, told) == (32, None, ["board 1: no board"])
    once(tmp_path, boards, 32)


def test_a_board_that_comes_back_works_again(tmp_path: Path) -> None:
    hot = NoisyError("the board's clock is slow")
    boards = [Board(trouble=after(2, hot, until=4)), Board(batch_s=0.2)]
    (outcome,), told = tune(tmp_path, boards)
    assert outcome.trials == 32
    assert told == ["board 1: the board's clock is slow", "board 1: is back at work"]
    assert len(boards[0].asked) > len(boards[1].asked)
    once(tmp_path, boards, 32)


def test_without_boards_tuning_ends_and_goes_on_later(tmp_path: Path) -> None:
    boards = [Board(trouble=after(2, DeviceLost("it burnt"))), Board(trouble=after(2, DeviceLost("it burnt")))]
    (outcome,), told = tune(tmp_path, boards, patience_s=0.2)
    assert (outcome.trials, outcome.noise, outcome.choice) == (16, "it burnt", None)
    ends = Counter(line for line in told if "given up" in line)
    assert ends == {"board 1: given up after 0 s": 1, "board 2: given up after 0 s": 1}
    more = [Board()]
    (outcome,), _ = tune(tmp_path, more)
    assert (outcome.trials, outcome.new) == (32, 16) and outcome.choice is not None
    once(tmp_path, boards + more, 32)


def test_the_users_mistake_ends_everything(tmp_path: Path) -> None:
    wrong = BoardError("The board at stone:1 is no rpi4.")
    boards = [Board(batch_s=0.05), Board(absent=after(1, cast("Exception", wrong)))]
    with pytest.raises(BoardError) as caught:
        tune(tmp_path, boards, trials=2000)
    assert caught.value is wrong and all(board.closed for board in boards)
    assert len(Database.read(tmp_path, "mill").records) < 200


def test_nobody_waits_for_a_board_that_is_not_needed(tmp_path: Path) -> None:
    waiting = Board()

    def wait(n: int) -> None:
        while not waiting.cancelled():
            time.sleep(0.01)
        raise DeviceLost("it is not needed any more")

    waiting.absent = wait
    boards = [Board(), waiting]
    before = threading.active_count()
    (outcome,), told = tune(tmp_path, boards)
    assert (outcome.trials, outcome.noise, told) == (32, None, [])
    assert threading.active_count() == before


def test_records_say_which_board(tmp_path: Path) -> None:
    boards = [Board(setting=replace(SETTING, cpu="0xd08", measured="rpc"))]
    tune(tmp_path, boards, trials=8)
    assert {(r["cpu"], r["measured"]) for r in Database.read(tmp_path, "mill").records} == {("0xd08", "rpc")}

"""Turns and ratios by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from compiler.measure import compare
from compiler.measure.compare import Workload
from compiler.measure.speed import Spread


@dataclass
class Scripted:
    """An engine whose speeds are written down; `log` is shared, to see who ran when."""

    name: str
    prompts: list[float]
    steps: list[float]
    log: list[str]
    threads: int = 2
    about: dict[str, object] = field(default_factory=dict)

    def prefill(self, tokens: int) -> float:
        self.log.append(f"{self.name} p{tokens}")
        return self.prompts.pop(0)

    def decode(self, context: int, tokens: int) -> float:
        self.log.append(f"{self.name} d{context}+{tokens}")
        return self.steps.pop(0)

    def perplexity(self, windows: list[list[int]]) -> float:
        raise AssertionError(windows)


def test_turns_and_ratios() -> None:
    """The machine slows down from round to round; the ratio, taken within a round, stays 2 and 4."""
    log: list[str] = []
    ours = Scripted("quern", [100, 50, 20], [40, 20, 8], log)
    theirs = Scripted("other", [50, 25, 10], [10, 5, 2], log)
    first, second = compare.compare([ours, theirs], Workload(512, 128, 16, 3))
    assert log == ["quern p512", "other p512"] * 3 + ["quern d128+16", "other d128+16"] * 3
    assert (first.prefill_tok_s, first.decode_tok_s) == (Spread(50, 20, 100), Spread(20, 8, 40))
    assert (first.prefill_ratio, first.decode_ratio) == (None, None)
    assert (second.prefill_ratio, second.decode_ratio) == (Spread(2, 2, 2), Spread(4, 4, 4))


def test_rounds_of_their_own_make_the_same_rows() -> None:
    """As growth takes them; an engine that missed a round is left out, since nothing stands beside that round."""
    log: list[str] = []
    ours = Scripted("quern", [100, 50], [40, 20], log)
    theirs = Scripted("other", [50, 25], [10, 5], log)
    once = Scripted("once", [1], [1], log)
    work = Workload(512, 128, 16, 1)
    first, second = compare.runs([ours, theirs, once], work), compare.runs([ours, theirs], work)
    rows = compare.rows(compare.joined([first, second]))
    assert [(row.name, row.prefill_tok_s, row.decode_ratio) for row in rows] == [
        ("quern", Spread(75, 50, 100), None), ("other", Spread(37.5, 25, 50), Spread(4, 4, 4))]  # fmt: skip


def test_a_part_that_is_left_out() -> None:
    log: list[str] = []
    ours, theirs = (Scripted(name, [], [3, 4], log) for name in ("quern", "other"))
    rows = compare.compare([ours, theirs], Workload(0, 0, 4, 2))
    assert [row.prefill_tok_s for row in rows] == [None, None]
    assert rows[1].prefill_ratio is None
    assert rows[1].decode_ratio == Spread(1, 1, 1)
    records = compare.records(rows, Workload(0, 0, 4, 2), {"shape": "x"})
    assert records[1]["decode_ratio"] == {"median": 1, "min": 1, "max": 1}
    assert (records[0]["shape"], records[0]["name"], records[0]["rounds"]) == ("x", "quern", 2)

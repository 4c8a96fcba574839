"""Engines side by side: each in processes of its own, one after the other, round by round; ratios within a round only.

A shared machine drifts by tens of percent within minutes. What is compared is therefore what ran next to each other:
A B A B ..., and the ratio is taken pair by pair before its median is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from compiler.measure.peers import Side
from compiler.measure.speed import Spread


@dataclass(frozen=True)
class Workload:
    """Tokens of a prompt, tokens before the decoded ones, decoded tokens, and how often each is run.

    prompt_tokens = 0 or decode_tokens = 0 leaves that part out.
    """

    prompt_tokens: int
    context: int
    decode_tokens: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """One engine: its tokens/s, and the first engine's tokens/s over its own (None for the first itself)."""

    name: str
    about: dict[str, object]
    threads: int
    prefill_tok_s: Spread | None
    decode_tok_s: Spread | None
    prefill_ratio: Spread | None
    decode_ratio: Spread | None


@dataclass(frozen=True)
class Runs:
    """What one engine did, tokens/s run by run; the same place in the lists of two engines is the same round."""

    name: str
    about: dict[str, object]
    threads: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


def compare(sides: Sequence[Side], work: Workload) -> list[Row]:
    """The first side is the one that ratios are about."""
    return rows(runs(sides, work))


def runs(sides: Sequence[Side], work: Workload) -> list[Runs]:
    """All rounds, engine by engine."""
    prompts = [partial(side.prefill, work.prompt_tokens) for side in sides]
    steps = [partial(side.decode, work.context, work.decode_tokens) for side in sides]
    prefill = interleave(prompts, work.rounds if work.prompt_tokens else 0)
    decode = interleave(steps, work.rounds if work.decode_tokens else 0)
    return [
        Runs(side.name, dict(side.about), side.threads, tuple(prefill[i]), tuple(decode[i]))
        for i, side in enumerate(sides)
    ]


def joined(rounds: Sequence[Sequence[Runs]]) -> list[Runs]:
    """One after another; an engine that is not in every round is left out, because rounds would no longer be pairs."""
    found = []
    for first in rounds[0]:
        same = [one for each in rounds for one in each if one.name == first.name]
        if len(same) == len(rounds):
            prefill = tuple(speed for one in same for speed in one.prefill)
            decode = tuple(speed for one in same for speed in one.decode)
            found.append(replace(first, prefill=prefill, decode=decode))
    return found


def rows(found: Sequence[Runs]) -> list[Row]:
    """Spreads of each engine, and ratios to the first."""
    return [
        Row(
            one.name, one.about, one.threads, _spread(one.prefill), _spread(one.decode),
            _ratio(found[0].prefill, one.prefill) if i else None, _ratio(found[0].decode, one.decode) if i else None,
        )
        for i, one in enumerate(found)
    ]  # fmt: skip


def interleave(runs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """One list of results a run: every run once, then every run once more, and so on."""
    results: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for result, run in zip(results, runs, strict=True):
            result.append(run())
    return results


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread.of(list(values)) if values else None


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Ours over theirs, pair by pair."""
    return _spread([a / b for a, b in zip(ours, theirs, strict=True)])


def records(rows: Sequence[Row], work: Workload, more: dict[str, object]) -> list[dict[str, object]]:
    """One JSON object an engine."""
    return [{**more, **asdict(row), **asdict(work)} for row in rows]

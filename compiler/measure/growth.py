"""How speed grows with context, prompt, model size, group size and bits: one table of points, and a plot.

Points take turns, round by round, so that a machine that drifts does so for all of them alike. Engines that cannot run
a point are left out there, with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compiler.errors import UserError
from compiler.measure.compare import Row, Workload
from compiler.measure.speed import Spread

SIZES = ("llama-0.1b", "llama-0.5b", "tinyllama-1.1b", "llama-3.2-3b", "llama-2-7b")
KINDS: dict[str, tuple[str, tuple[Any, ...]]] = {  # what grows -> its axis and the points
    "context": ("tokens of context", (0, 128, 256, 512, 1024, 2048, 4096)),
    "prompt": ("tokens of prompt", (1, 4, 16, 64, 128, 256, 512, 1024, 2048)),
    "size": ("parameters", SIZES),
    "group": ("inputs that share a scale", (32, 64, 128)),
    "bits": ("bits a weight", (2, 3, 4, 6, 8)),
}


@dataclass(frozen=True)
class Setup:
    """What one point measures: a shape with random weights, and a workload. kv_cache: as in `build`, None: default."""

    shape: str
    bits: int
    group_size: int
    head_bits: int
    work: Workload
    kv_cache: str | None = None

    @property
    def positions(self) -> int:
        """Context that the model needs."""
        return max(self.work.prompt_tokens, self.work.context + self.work.decode_tokens, 1)


@dataclass(frozen=True)
class Point:
    """A value of what grows, where it lies on the axis, and an engine's row there."""

    value: Any
    at: float
    row: Row


def setups(kind: str, base: Setup, values: Sequence[Any]) -> list[tuple[Any, Setup]]:
    """The setup of each value. Only what depends on the value is measured: decoding for context, prefill for prompt."""
    made: dict[str, Callable[[Any], Setup]] = {
        "context": lambda v: replace(base, work=replace(base.work, context=v, prompt_tokens=0)),
        "prompt": lambda v: replace(base, work=replace(base.work, prompt_tokens=v, decode_tokens=0)),
        "size": lambda v: replace(base, shape=v),
        "group": lambda v: replace(base, group_size=v),
        "bits": lambda v: replace(base, bits=v, head_bits=v),
    }
    return [(value, made[kind](value)) for value in values]


def shared(todo: Sequence[Setup]) -> list[Setup]:
    """What to build for each: of setups that differ in their workload alone, the one with the most positions."""
    largest: dict[Setup, Setup] = {}
    keys = [replace(setup, work=Workload(0, 0, 0, 0)) for setup in todo]
    for key, setup in zip(keys, todo, strict=True):
        largest[key] = max(largest.get(key, setup), setup, key=lambda s: s.positions)
    return [largest[key] for key in keys]


def values(kind: str, given: str | None) -> list[Any]:
    """The points of a kind, or those given as a comma list. Raises UserError for what is no value of it."""
    points = KINDS[kind][1]
    if given is None:
        return list(points)
    parts = [part.strip() for part in given.split(",")]
    if kind == "size":
        return parts
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise UserError(f"--growth-values is {given!r}, but --growth {kind} needs numbers, as in 32,64.") from None
    if kind == "bits" and (unknown := [n for n in numbers if n not in points and n != 5]):
        raise UserError(f"--growth-values: quern has no {unknown[0]}-bit weights. Take some of 2, 3, 4, 5, 6, 8.")
    if (low := min(numbers)) < (0 if kind == "context" else 1):
        raise UserError(f"--growth-values: {low} is too few for --growth {kind}.")
    return numbers


def title(kind: str, base: Setup) -> str:
    """What all points have in common."""
    about = {"size": base.shape, "bits": f"{base.bits} bits", "group": f"groups of {base.group_size}"}
    return ", ".join(text for name, text in about.items() if name != kind)


def require_plot(out: Path) -> None:
    """Raise UserError where `plot` could not draw, before hours have been measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs the package matplotlib. Install it: pip install 'quern[plot]'.")
    if out.suffix not in (".svg", ".png"):
        raise UserError(f"--plot {out}: the name must end in .svg or .png.")


def plot(kind: str, points: Sequence[Point], title: str, out: Path) -> None:
    """Lines of tokens/s over the axis, one an engine, number of threads and phase, with min and max as a band.

    SVG or PNG by the name.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "quern"  # equal points give equal files
    phases = [phase for phase in ("prefill", "decode") if any(getattr(p.row, f"{phase}_tok_s") for p in points)]
    several = len({p.row.threads for p in points}) > 1
    names = [_counted(p.row) if several else p.row.name for p in points]
    figure, axes = plt.subplots(1, len(phases), figsize=(5.5 * len(phases), 4), squeeze=False)
    for axis, phase in zip(axes[0], phases, strict=True):
        for name in dict.fromkeys(names):
            own = [p for p, its in zip(points, names, strict=True) if its == name]
            mine = [(p.at, getattr(p.row, f"{phase}_tok_s")) for p in own]
            _line(axis, name, [(at, spread) for at, spread in mine if spread is not None])
        axis.set_title(phase)
        axis.set_xlabel(KINDS[kind][0])
        axis.set_ylabel("tokens/s")
        axis.set_ylim(bottom=0)
        if kind in ("prompt", "size"):
            axis.set_xscale("log")
            if kind == "size":
                axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def _counted(row: Row) -> str:
    return f"{row.name}, {row.threads} thread{'s' if row.threads != 1 else ''}"


def _line(axis: Any, name: str, points: list[tuple[float, Spread]]) -> None:
    at = [x for x, _ in points]
    axis.plot(at, [s.median for _, s in points], marker="o", label=name)
    axis.fill_between(at, [s.min for _, s in points], [s.max for _, s in points], alpha=0.15)

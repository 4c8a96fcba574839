"""Bundles compiled and run in the test process, each once a session, however many tests look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import targets
from compiler import pipeline
from compiler.progress import Reporter
from runtime.bundle import open_bundle
from runtime.session import Session
from tests.end_to_end.places import DEMO

F32 = NDArray[np.float32]


class Bundles:
    """bundles(DEMO, "rpi4", activations="exact"): the folder of that bundle, compiled when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[Any, Path] = {}

    def __call__(self, model: Path = DEMO, target: str = "native", **settings: Any) -> Path:
        key = (model, target, *sorted(settings.items()))
        if key not in self._made:
            # A path of its own: dlopen takes a second library of the same path for the first one.
            out = self._root / f"{len(self._made)}-{model.name}-{target}"
            request = pipeline.Request(out=out, target=targets.load(target), **settings)
            pipeline.build(model, request, Reporter(quiet=True))
            self._made[key] = out
        return self._made[key]


class Sessions:
    """sessions(bundle): the bundle's one session in this process, at the beginning.

    One thread: with more, the runtime would pin the test process to a CPU.
    """

    def __init__(self) -> None:
        self._made: dict[Path, Session] = {}

    def __call__(self, bundle: Path) -> Session:
        if bundle not in self._made:
            self._made[bundle] = Session(open_bundle(bundle), threads=1)
        self._made[bundle].reset()
        return self._made[bundle]


def all_logits(session: Session, ids: list[int]) -> F32:
    """f32[len(ids), vocab] from an empty context, in chunks where they fit."""
    session.reset()
    return np.concatenate(list(session.logits(ids)))


def greedy(session: Session, ids: list[int], count: int) -> tuple[list[int], F32]:
    """`count` tokens, each the most likely one, and the logits f32[count, vocab] that they were taken from."""
    session.reset()
    rows = [session.prefill(ids).copy()]
    tokens = [int(rows[0].argmax())]
    while len(tokens) < count:
        rows.append(session.step(tokens[-1]).copy())
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.array(rows)

"""Prefill and decode speed of a bundle, interleaved with the read ceiling, in the threads and memory of one session."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compiler.errors import UserError
from compiler.measure import read_bandwidth
from runtime.bundle import Bundle, open_bundle
from runtime.session import Session
from runtime.vm import Vm
from targets import Target


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of a repeated measurement."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """At least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """tokens/s, GB/s (10^9 bytes), and bytes of weights that one decoded token reads.

    prefill_plain_tok_s: prefill without AMX tiles, beside one that used them; None where the session has none.
    """

    prefill_tok_s: Spread
    decode_tok_s: Spread
    read_gb_s: Spread
    weight_bytes_per_token: int
    decode_bandwidth_ratio: Spread
    threads: int
    prefill_plain_tok_s: Spread | None = None


def weight_bytes_per_token(bundle: Bundle) -> int:
    """What `decode` must read: its weights, but of the embedding one row and of the rotary table one row."""
    sizes = {w.name: w for w in bundle.manifest.weights.tensors}
    total = 0
    for name in bundle.manifest.functions["decode"].inputs:
        if name in sizes:
            weight = sizes[name]
            by_row = name.partition(".")[0] in ("embedding", "rope")
            total += weight.nbytes // weight.shape[0] if by_row else weight.nbytes
    return total


def measure(
    path: Path, target: Target, prompt: int, steps: int, rounds: int, threads: int | None, context: int
) -> Speed:
    """`rounds` times: prefill `prompt` tokens, decode `steps` from position `context` on, read the same bytes.

    The ratio is taken round by round, because the bandwidth of a shared machine drifts.
    """
    bundle = open_bundle(path)
    session = Session(bundle, threads)
    plain = Session(bundle, threads, tiles=False) if session.tiles else None
    reader = _reader(bundle, target, session.threads)
    random = np.random.default_rng(0)
    ids = random.integers(0, bundle.manifest.model.vocab_size, max(prompt, context, 1)).astype(np.int32)
    used = weight_bytes_per_token(bundle)
    _decode(session, ids[:context], min(2, steps))
    prefill, without, decode, read, ratio = [], [], [], [], []
    for _ in range(rounds):
        prefill.append(_prefill(session, ids[:prompt]))
        if plain is not None:
            without.append(_prefill(plain, ids[:prompt]))
        before = reader()
        seconds = _decode(session, ids[:context], steps)
        gb_s = (before + reader()) / 2
        decode.append(1 / seconds)
        read.append(gb_s)
        ratio.append(used / seconds / 1e9 / gb_s)
    spreads = Spread.of(prefill), Spread.of(decode), Spread.of(read), used, Spread.of(ratio)
    return Speed(*spreads, session.threads, Spread.of(without) if without else None)


def _prefill(session: Session, ids: np.ndarray) -> float:
    """Tokens a second of one prefill."""
    session.reset()
    started = time.perf_counter()
    session.prefill(ids)
    return len(ids) / (time.perf_counter() - started)


def _decode(session: Session, ids: np.ndarray, steps: int) -> float:
    """Median seconds a decoded token, after `ids`."""
    session.reset()
    row = session.prefill(ids)
    times = []
    for _ in range(steps):
        token = int(row.argmax())
        started = time.perf_counter()
        row = session.step(token)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _reader(bundle: Bundle, target: Target, threads: int) -> Callable[[], float]:
    """A function that reads the weights file from memory, once, and gives GB/s: the fastest reader for this machine."""
    data = np.asarray(np.memmap(bundle.path / bundle.manifest.weights.file, np.uint8, mode="r"))
    nbytes = read_bandwidth.usable(data.nbytes)
    if nbytes == 0:
        raise UserError(f"{bundle.path}: its {data.nbytes} bytes of weights are too few to time reading them.")
    with tempfile.TemporaryDirectory(prefix="quern-bench-") as folder:
        library = Path(folder) / "read.so"
        names = read_bandwidth.build(nbytes, target, library)
        vm = Vm(library, bundle.manifest.tvm, threads)
    tensor = vm.tensor(data[:nbytes].view(np.int32))
    functions = [vm.function(name, [tensor]) for name in names]

    def gb_s(function: Callable[[], object]) -> float:
        started = time.perf_counter()
        function()
        return nbytes / (time.perf_counter() - started) / 1e9

    for function in functions:
        function()
    return lambda: max(gb_s(function) for function in functions)

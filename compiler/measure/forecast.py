"""The speed of a board that is not at hand, from what its instructions cost. A model.

Instructions are counted, exactly (instructions.py, bundle_cost.py). Cycles are llvm-mca's. Seconds follow from the
target's clock, cores and memory bandwidth, none of it measured on that board by quern:

    arithmetic = cycles of parallel kernels / (cores * clock) + cycles of the others / clock
    memory     = bytes of weights and cache a token / bandwidth
    low: 1.3 arithmetic + memory / SUSTAINED + 20 us a parallel kernel     expected: the same with 1.0 and 5 us
    high: the larger of arithmetic and memory, nothing lost
The expected sum for llama.cpp's Q4_0 (0.379 cycles, 0.5625 bytes a multiplication) gives a Raspberry Pi 4 3.0 GB/s of
weights at 1.5 GHz and 3.2 at 1.8; published are 3.1 to 3.4 (Ollama, Q4_0 and Q4_K_M, Pi 4 and Pi 400).
"""

from __future__ import annotations

from dataclasses import dataclass

from targets import Target

SUSTAINED = 0.93  # of the STREAM figure that a target states: what streaming kernels get (4.5 of 4.85 GB/s on a Pi 4)
SLOW_ARITHMETIC = 1.3  # cache misses and branches that llvm-mca leaves out
FORK_S = (5e-6, 20e-6)  # one fork and join of a parallel kernel
RUNTIME_MIB = (34, 80)  # beside weights, cache, activations: TVM's runtime alone; with Python and numpy


@dataclass(frozen=True)
class Spread:
    """A forecast: expected, and from low to high."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """Speeds in tokens/s, memory in MiB, seconds to read the weights from the board's storage (None: unknown)."""

    decode_tok_s: Spread
    prefill_tok_s: Spread
    peak_mib: Spread
    load_s: float | None


@dataclass(frozen=True)
class Work:
    """One call: rows it computes, cycles that threads share, cycles that they cannot, parallel launches, bytes read."""

    tokens: int
    shared_cycles: float
    own_cycles: float
    launches: float
    nbytes: float


def known(target: Target) -> bool:
    """Whether the target states what a forecast needs."""
    return bool(target.clock_mhz and target.dram_read_mb_per_s)


def forecast(decode: Work, prefill: Work, planned_bytes: int, weights_bytes: int, target: Target) -> Forecast:
    """For a target with a known clock and bandwidth. planned_bytes: weights, caches and activations."""
    storage = target.storage_read_mb_per_s
    load_s = weights_bytes / 1e6 / storage if storage else None
    return Forecast(_speed(decode, target), _speed(prefill, target), _peak(planned_bytes), load_s)


def _speed(work: Work, target: Target) -> Spread:
    """tokens/s."""
    assert target.clock_mhz and target.dram_read_mb_per_s
    arithmetic = (work.shared_cycles / target.cores + work.own_cycles) / (target.clock_mhz * 1e6)
    memory = work.nbytes / (target.dram_read_mb_per_s * 1e6)
    low = SLOW_ARITHMETIC * arithmetic + memory / SUSTAINED + work.launches * FORK_S[1]
    expected = arithmetic + memory / SUSTAINED + work.launches * FORK_S[0]
    return Spread(*(work.tokens / seconds for seconds in (low, expected, max(arithmetic, memory))))


def _peak(planned: int) -> Spread:
    least, most = (planned / (1 << 20) + mib for mib in RUNTIME_MIB)
    return Spread(least, (least + most) / 2, most)

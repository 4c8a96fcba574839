"""Where the time of a decoded token and of a prompt goes: every kernel, and beside it the memory's read ceiling.

Three things take turns in the bundle's own process: the reader, the session as it is, and a second session on the same
bundle whose machine calls back around every kernel (kernel_clock.py). A kernel's times are those of the second, less
what that clock costs; what they leave of the first one's time is the virtual machine, Python, and waiting in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import mean, median

from compiler.errors import UserError
from compiler.measure.compare import Workload
from compiler.measure.speed import QuernSide, Spread, bytes_read, open_side, refuse_few_weights
from runtime.bundle import open_bundle
from runtime.manifest import Manifest
from runtime.session import Planner
from targets import Target

TOKENS = re.compile(r"_m(\d+)_")  # of a call
LINEAR = re.compile(r"^linear_.*_m(\d+)_n(\d+)_k(\d+)(?:_|$)")  # multiply-adds of a call: their product
ATTENTION = re.compile(r"^attention_.*_m(\d+)_h(\d+)_kv\d+_d(\d+)_")  # theirs, twice for each position
STREAMS = 1 << 16  # bytes of weights a call; what reads fewer is not asked how near to the ceiling it is


@dataclass(frozen=True)
class KernelRow:
    """One kernel in a decoded token or a prompt. us: of a call, median, min and max of all that were seen.

    calls, ms, share: of one token or prompt; share of what it takes without the clock. nbytes: of weights that a call
    reads, 10^9 of them a second in gb_s, and that by the reader's in of_ceiling, for calls of one token; gmac_s: 10^9
    multiply-adds a second. None where that means nothing. Medians of rounds, each round with its own reader.
    """

    kernel: str
    calls: float
    us: Spread
    ms: float
    share: float
    nbytes: int
    gb_s: float | None
    of_ceiling: float | None
    gmac_s: float | None


@dataclass(frozen=True)
class Phase:
    """A decoded token or a prompt: ms of one, without the clock; its kernels, slowest first.

    other_ms: what kernels leave of it, round by round, and other_share the median of its shares: below 0 where it is
    less than two runs next to each other differ by. clock_us: subtracted from every call.
    """

    name: str
    ms: Spread
    rows: tuple[KernelRow, ...]
    other_ms: Spread
    other_share: float
    clock_us: float


@dataclass(frozen=True)
class Profile:
    """Both phases, GB/s of the reader, and bytes of weights that a decoded token reads."""

    phases: tuple[Phase, ...]
    read_gb_s: Spread
    weight_bytes_per_token: int
    threads: int

    def record(self) -> dict[str, object]:
        """One JSON object."""
        return {
            "profile": {phase.name: asdict(phase) for phase in self.phases},
            "read_gb_s": self.read_gb_s.median,
            "spread": {"read_gb_s": asdict(self.read_gb_s)},
            "weight_bytes_per_token": self.weight_bytes_per_token,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Round:
    """`times` tokens or prompts, next to each other in time. ns: of calls by kernel, without what the clock takes."""

    times: int
    plain_s: float  # of one, without the clock
    read_gb_s: float
    clock_ns: int
    ns: Mapping[str, Sequence[int]]
    arguments: Mapping[str, Sequence[str]]  # weights, caches and span of one call, by kernel

    @classmethod
    def of(cls, side: QuernSide, work: str, times: int, **amount: int) -> Round:
        """Read, the work as it is, with the clock, read."""
        before = side.read()
        plain_s = float(side.process.ask(work, **amount)["seconds"]) / times
        found = side.process.ask("kernels_of", work=work, **amount)
        clock, kernels = int(found["clock_ns"]), found["kernels"]
        ns = {name: [max(0, taken - clock) for taken in one["ns"]] for name, one in kernels.items()}
        arguments = {name: one["arguments"] for name, one in kernels.items()}
        return cls(times, plain_s, (before + side.read()) / 2, clock, ns, arguments)

    def ms(self, kernel: str) -> float:
        """Of a token or prompt."""
        return sum(self.ns[kernel]) / self.times / 1e6


def measure(path: Path, target: Target, work: Workload, threads: int | None) -> Profile:
    """`work.rounds` rounds of decoding and of prompts, in turns."""
    bundle = open_bundle(path, verify_weights=False)
    if bundle.manifest.target.gpu is not None:
        raise UserError(
            f"{path}: computes on a GPU, and --profile times the kernels of a CPU. Leave it out: bench then times a "
            f"token's kernels together, by the GPU's clock."
        )
    refuse_few_weights(bundle)
    decode, prompt = [], []
    with open_side(path, threads) as side:
        side.load_readers(bundle, target)
        for _ in range(work.rounds):
            steps = work.decode_tokens
            decode.append(Round.of(side, "decode", steps, context=work.context, tokens=steps))
            prompt.append(Round.of(side, "prefill", 1, tokens=work.prompt_tokens))
        phases = (
            phase("decode", decode, bundle.manifest, work.context + (work.decode_tokens + 1) / 2),
            phase("prefill", prompt, bundle.manifest, (work.prompt_tokens + 1) / 2, rows(bundle.manifest, work)),
        )
        reads = Spread.of([one.read_gb_s for one in (*decode, *prompt)])
        return Profile(phases, reads, side.used, side.threads)


def rows(manifest: Manifest, work: Workload) -> dict[int, float]:
    """Tokens that a prompt function computes in a call, in the mean over a prompt's calls, by what it has room for.

    Functions of other bundles than counted ones compute their padding, too.
    """
    chunks = Planner.of(manifest).plan(work.prompt_tokens)
    counted = {f.tokens for f in manifest.functions.values() if f.counted}
    return {size: mean(c.valid for c in chunks if c.tokens == size) for c in chunks if (size := c.tokens) in counted}


def phase(
    name: str, rounds: Sequence[Round], manifest: Manifest, positions: float, real: Mapping[int, float] | None = None
) -> Phase:
    """The table of these rounds, in which the same kernels ran.

    positions: that a token attends to, in the mean; real: as `rows` gives it.
    """
    found = []
    for kernel, arguments in rounds[0].arguments.items():
        room = int(named[1]) if (named := TOKENS.search(kernel)) else 1
        tokens = (real or {}).get(room, room)
        sizes = bytes_read(manifest, round(tokens))
        nbytes = sum(sizes.get(argument, 0) for argument in arguments)
        found.append(_row(kernel, rounds, nbytes, room, multiply_adds(kernel, positions) * tokens / room))
    found.sort(key=lambda row: -row.ms)
    other = [1e3 * one.plain_s - sum(map(one.ms, one.ns)) for one in rounds]
    share = median(ms / one.plain_s / 1e3 for ms, one in zip(other, rounds, strict=True))
    clock_us = median(one.clock_ns for one in rounds) / 1e3
    whole = Spread.of([1e3 * one.plain_s for one in rounds])
    return Phase(name, whole, tuple(found), Spread.of(other), share, clock_us)


def _row(kernel: str, rounds: Sequence[Round], nbytes: int, tokens: int, macs: float) -> KernelRow:
    # A prompt's calls differ in their rows, of which macs and bytes are the mean.
    middle = median if tokens == 1 else mean
    seconds = [middle(one.ns[kernel]) / 1e9 for one in rounds]
    us = Spread.of([taken / 1e3 for one in rounds for taken in one.ns[kernel]])
    timed = min(seconds) > 0
    ratio = [nbytes / s / 1e9 / one.read_gb_s for s, one in zip(seconds, rounds, strict=True)] if timed else [0.0]
    streams = timed and nbytes >= STREAMS
    return KernelRow(
        kernel=kernel,
        calls=len(rounds[0].ns[kernel]) / rounds[0].times,
        us=us,
        ms=median(one.ms(kernel) for one in rounds),
        share=median(one.ms(kernel) / 1e3 / one.plain_s for one in rounds),
        nbytes=nbytes,
        gb_s=nbytes / median(seconds) / 1e9 if streams else None,
        of_ceiling=median(ratio) if streams and tokens == 1 else None,
        gmac_s=macs / median(seconds) / 1e9 if timed and macs else None,
    )


def multiply_adds(kernel: str, positions: float) -> float:
    """Of a call with all the tokens that it has room for, by the kernel's name; 0 for what is no layer or attention."""
    if found := LINEAR.match(kernel):
        return prod(map(int, found.groups()))
    if found := ATTENTION.match(kernel):
        return 2 * prod(map(int, found.groups())) * positions
    return 0

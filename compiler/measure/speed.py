"""Prefill and decode speed of a bundle, interleaved with the read ceiling, in the threads and memory of one session.

The session is in a process of its own that has loaded the runtime only (bundle_process.py), as on the device.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from compiler.errors import UserError
from compiler.measure import perplexity, read_bandwidth
from compiler.measure.process import Process, Timed
from runtime.bundle import Bundle, open_bundle
from runtime.manifest import Manifest
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

    start_s: seconds from starting a process to the logits after the prompt, weights in the page cache: Python, digests,
    library and prefill, which a tokenizer of some 10 ms would join.
    peak_rss_mib: of these processes. planned_mib: weights, caches and activations.
    kv_cache: the element type of keys and values.
    prefill_plain_tok_s: prefill without AMX tiles, beside one that used them; None where the session has none.
    """

    start_s: Spread
    prefill_tok_s: Spread
    decode_tok_s: Spread
    read_gb_s: Spread
    weight_bytes_per_token: int
    decode_bandwidth_ratio: Spread
    threads: int
    peak_rss_mib: float
    planned_mib: float
    kv_cache: str
    prefill_plain_tok_s: Spread | None = None

    def record(self) -> dict[str, object]:
        """Medians under their names, and min and max of each beside them."""
        spreads = {name: value for name in vars(self) if isinstance(value := getattr(self, name), Spread)}
        record: dict[str, object] = {name: spread.median for name, spread in spreads.items()}
        record["spread"] = {name: asdict(spread) for name, spread in spreads.items()}
        plain = ("weight_bytes_per_token", "threads", "peak_rss_mib", "planned_mib", "kv_cache")
        return {**record, **{name: getattr(self, name) for name in plain}}


def weight_bytes_per_token(manifest: Manifest) -> int:
    """What `decode` must read: its weights, but of the embedding one row and of the rotary table one row."""
    sizes = bytes_read(manifest, 1)
    return sum(sizes.get(name, 0) for name in manifest.functions["decode"].inputs)


def bytes_read(manifest: Manifest, tokens: int) -> dict[str, int]:
    """What a call of `tokens` tokens must read of each weight: all of it, of tables by row one row a token."""
    sizes = {}
    for weight in manifest.weights.tensors:
        by_row = weight.name.partition(".")[0] in ("embedding", "rope")
        row = weight.nbytes // weight.shape[0]
        sizes[weight.name] = min(tokens * row, weight.nbytes) if by_row else weight.nbytes
    return sizes


class QuernSide(Timed):
    """A bundle in its process, for speed.measure and for compare.py."""

    name = "quern"

    def __init__(self, process: Process, bundle: Bundle) -> None:
        super().__init__(process)
        self.used = weight_bytes_per_token(bundle.manifest)
        about = process.ask("about")
        self.threads: int = about["threads"]
        self.tiles: bool = about["tiles"]
        self.about: dict[str, object] = {
            **bundle.manifest.quantization, "target": bundle.manifest.target.name, "weight_bytes_per_token": self.used,
        }  # fmt: skip

    def prefill_plain(self, tokens: int) -> float:
        """The same as `prefill`, without AMX tiles."""
        return tokens / float(self.process.ask("prefill_plain", tokens=tokens)["seconds"])

    def read(self) -> float:
        """GB/s of reading all weights; `load_readers` first."""
        return float(self.process.ask("read")["gb_s"])

    def perplexity(self, windows: list[list[int]]) -> float:
        """Of windows of ids, the second half of each scored."""
        return perplexity.perplexity(self.process, windows)

    def load_readers(self, bundle: Bundle, target: Target) -> None:
        """Compile the reading kernels here, and have the process load them."""
        nbytes = read_bandwidth.usable((bundle.path / bundle.manifest.weights.file).stat().st_size)
        with tempfile.TemporaryDirectory(prefix="quern-bench-") as folder:
            library = Path(folder) / "read.so"
            names = read_bandwidth.build(nbytes, target, library)
            self.process.ask("reader", library=str(library), names=names, nbytes=nbytes)


def refuse_few_weights(bundle: Bundle) -> None:
    """Raise UserError where reading the weights takes too short to be timed."""
    size = bundle.manifest.files[bundle.manifest.weights.file].bytes
    if read_bandwidth.usable(size) == 0:
        raise UserError(f"{bundle.path}: its {size} bytes of weights are too few to time reading them.")


@contextmanager
def open_side(path: Path, threads: int | None) -> Iterator[QuernSide]:
    """The bundle's process, warm: it has computed a token and a prompt. Gone at the end."""
    bundle = open_bundle(path, verify_weights=False)  # the process verifies them
    with _process(path, threads) as process:
        side = QuernSide(process, bundle)
        side.decode(1, 1)
        yield side


def _process(path: Path, threads: int | None) -> Process:
    return Process(sys.executable, "compiler.measure.bundle_process", [str(path), str(threads or 0)])


def started(path: Path, threads: int | None, prompt: int) -> tuple[float, float]:
    """Seconds from starting a process to its logits after `prompt` tokens; the MiB it held at most, one token later."""
    began = time.perf_counter()
    with _process(path, threads) as process:
        process.ask("prefill", tokens=prompt)
        seconds = time.perf_counter() - began
        process.ask("decode", context=0, tokens=1)
        return seconds, float(process.ask("memory")["peak_rss_mib"])


def measure(
    path: Path, target: Target, prompt: int, steps: int, rounds: int, threads: int | None, context: int
) -> Speed:
    """`rounds` starts; then so often: prefill `prompt` tokens, decode `steps` after `context`, read the same bytes.

    The ratio is taken round by round, because the bandwidth of a shared machine drifts.
    """
    bundle = open_bundle(path, verify_weights=False)
    refuse_few_weights(bundle)
    started(path, threads, prompt)  # brings the weights into memory
    starts, peaks = zip(*(started(path, threads, prompt) for _ in range(rounds)), strict=True)
    prefill, without, decode, read, ratio = [], [], [], [], []
    with open_side(path, threads) as side:
        side.load_readers(bundle, target)
        for _ in range(rounds):
            prefill.append(side.prefill(prompt))
            if side.tiles:
                without.append(side.prefill_plain(prompt))
            before = side.read()
            decode.append(side.decode(context, steps))
            read.append((before + side.read()) / 2)
            ratio.append(side.used * decode[-1] / 1e9 / read[-1])
        return Speed(
            start_s=Spread.of(list(starts)),
            prefill_tok_s=Spread.of(prefill),
            decode_tok_s=Spread.of(decode),
            read_gb_s=Spread.of(read),
            weight_bytes_per_token=side.used,
            decode_bandwidth_ratio=Spread.of(ratio),
            threads=side.threads,
            peak_rss_mib=max(peaks),
            planned_mib=bundle.manifest.memory.planned_peak_bytes / (1 << 20),
            kv_cache=str(side.about["kv_cache"]),
            prefill_plain_tok_s=Spread.of(without) if without else None,
        )

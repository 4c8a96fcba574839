"""The measured process: it has loaded a bundle and the runtime, as on the device, and neither TVM nor the compiler.

python -m compiler.measure.bundle_process BUNDLE THREADS (0: the runtime's default); see process.py for how it is asked.
Nobody samples here: the tokens are given, as llama-bench gives them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.bench import Timed
from runtime.bundle import Bundle, open_bundle
from runtime.device import peak_rss_mib
from runtime.errors import UserError
from runtime.session import Session

if TYPE_CHECKING:
    from compiler.measure.kernel_clock import KernelClock


class Measured:
    """One session; each method is a verb, its keywords the request, its result the answer. Times are in seconds."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle, self._session = bundle, Session(bundle, threads, timed=True)
        self._timed = Timed(self._session)
        self._plain: Session | None = None
        self._watched: tuple[Timed, KernelClock] | None = None
        self._readers: list[Callable[[], object]] = []
        self._read_bytes = 0

    def about(self) -> dict[str, Any]:
        """Threads, positions in all, and whether prompts go through AMX tiles."""
        return {"threads": self._session.threads, "context": self._session.context, "tiles": self._session.tiles}

    def gpu(self) -> dict[str, Any]:
        """The card, its driver, and how the model runs on it; asked after a few calls."""
        info = self._session.machine.info
        return {
            "device": info.name.decode(),
            "sm": 10 * info.major + info.minor,
            "multiprocessors": info.multiprocessors,
            "driver": f"{info.driver // 1000}.{info.driver % 1000 // 10}",
            "code": "cubin" if info.cubin else "ptx",
            "graphs": bool(info.graphs),
            "note": info.note.decode(errors="replace"),
            "gpu_memory_mib": round((info.total_bytes - info.free_bytes) / (1 << 20)),
        }

    def graphs(self, on: bool) -> dict[str, Any]:
        """Replay calls as CUDA graphs, or launch kernel by kernel."""
        self._session.machine.replay(on)
        return {}

    def copy(self, nbytes: int) -> dict[str, Any]:
        """GB/s (10^9 bytes) read and written by a copy of that size, or of what there is room for, on the GPU."""
        room = max(1 << 20, int(self._session.machine.info.free_bytes) // 4)
        return {"gb_s": self._session.machine.copy_gb_s(min(nbytes, room))}

    def kernels(self, context: int) -> dict[str, Any]:
        """Seconds on the GPU of the kernels of one token after `context` others."""
        self.decode(context, 1)
        return {"seconds": self._session.machine.milliseconds() / 1000}

    def profile(self, function: str, rounds: int) -> dict[str, Any]:
        """[kernel, launches, milliseconds of all of them] of a function's call as it was last asked, the longest first.

        Of each launch the quickest of some rounds: with an event before and behind it, a launch takes longer.
        """
        sums: dict[str, list[Any]] = {}
        for launches in zip(*(self._session.machine.profile(function) for _ in range(rounds)), strict=True):
            found = sums.setdefault(launches[0][0], [0, 0.0])
            found[0], found[1] = found[0] + 1, found[1] + min(milliseconds for _, milliseconds in launches)
        ordered = sorted(sums.items(), key=lambda item: -item[1][1])
        return {"kernels": [[name, count, round(ms, 6)] for name, (count, ms) in ordered]}

    def memory(self) -> dict[str, Any]:
        """The most that this process ever held."""
        return {"peak_rss_mib": peak_rss_mib()}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt of `tokens` from an empty context to the logits after it."""
        return {"seconds": self._timed.prefill(tokens)}

    def prefill_plain(self, tokens: int) -> dict[str, Any]:
        """The same without tiles, in a session of its own."""
        if self._plain is None:
            self._plain = Session(self._bundle, self._session.threads, tiles=False)
        return {"seconds": self._timed.prefill(tokens, self._plain)}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """`tokens` tokens one by one, after `context` others, whose part in the cache is filled only once."""
        return {"seconds": self._timed.decode(context, tokens)}

    def kernels_of(self, work: str, **amount: int) -> dict[str, Any]:
        """`decode` or `prefill` of that amount in a session whose kernels are timed one by one: see KernelClock."""
        if self._watched is None:
            from compiler.measure.kernel_clock import KernelClock

            session = Session(self._bundle, self._session.threads, self._session.tiles)
            self._watched = Timed(session), KernelClock(session.machine.vm, session.machine.tensors)
            self._watched[0].decode(0, 1)
        timed, clock = self._watched
        if work == "decode":
            timed.decode(amount["context"], 1)  # what lies before these tokens is in the cache then
        clock.take()
        seconds = getattr(timed, work)(**amount)
        return {"seconds": seconds, **clock.take()}

    def reader(self, library: str, names: list[str], nbytes: int) -> dict[str, Any]:
        """Load the functions that only read (read_bandwidth.py wrote them) and run each once, as warming up."""
        from runtime.vm import Vm

        manifest = self._bundle.manifest
        data = np.asarray(np.memmap(self._bundle.path / manifest.weights.file, np.uint8, mode="r"))
        vm = Vm(Path(library), manifest.tvm, self._session.threads)
        tensor = vm.tensor(data[:nbytes].view(np.int32))
        self._readers = [vm.function(name, [tensor]) for name in names]
        self._read_bytes = nbytes
        for function in self._readers:
            function()
        return {}

    def read(self) -> dict[str, Any]:
        """Every byte of the weights once: GB/s (10^9 bytes) of the fastest reader."""
        best = 0.0
        for function in self._readers:
            started = time.perf_counter()
            function()
            best = max(best, self._read_bytes / (time.perf_counter() - started) / 1e9)
        return {"gb_s": best}

    def losses(self, window: list[int], first: int) -> dict[str, Any]:
        """Sum of -log p(window[j + 1] | window[:j + 1]) in nats over j = first .. len - 2; the window is seen alone."""
        self._session.reset()
        self._timed.filled = 0
        rows = np.concatenate([block.copy() for block in self._session.logits(window)])
        return {"sum": nll(rows[first:-1], window[first + 1 :])}


def nll(logits: NDArray[np.float32], targets: list[int]) -> float:
    """Sum of -log softmax(logits[i])[targets[i]], in float64; logits f32[n, vocab]."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    logs = rows[np.arange(len(targets)), targets] - np.log(np.exp(rows).sum(axis=1))
    return float(-logs.sum())


def main() -> int:
    """Answer until stdin ends."""
    path, threads = sys.argv[1:]
    measured: Measured | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if measured is None:
                measured = Measured(open_bundle(Path(path)), int(threads) or None)
            answer = getattr(measured, request.pop("verb"))(**request)
        except UserError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

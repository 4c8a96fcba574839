"""The process between tuning and one board: it compiles and links candidates here, and has them timed there.

`python -m compiler.tune.board_worker FD JSON`, with the fields of `Worker`. A board comes from TVM's tracker; what
is asked of it goes through TVM's RPC (its client waits without a limit, so that whoever started this process kills it).
The other end is runtime/rpc_session.py. Whatever it says is checked: boards may be broken.

Commands: `connect`, `open`, `prepare`, `time`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tvm import rpc

import targets
from compiler.codegen import link
from compiler.measure import read_bandwidth
from compiler.tune import canaries, candidates, cuda_candidates
from compiler.tune.candidates import MOST_COPIES, READ_BYTES, Lost, NoBoard
from runtime import rpc_server, timing
from runtime.rpc_session import KERNEL, PROTOCOL
from runtime.rpc_tracker import Address, Tracker
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Kernel, Request
from targets import Target

SESSION_S = 1200.0  # a session older than half of it is exchanged before the next batch
MOST_S = 3600.0  # of one call: what is longer is no time
ARGUMENTS = "arguments.bin"


@dataclass
class Workload:
    """What is open on the board. count: candidates there, the default included."""

    request: Request
    call: candidates.Call
    default: Path
    reference: list[np.ndarray]
    count: int


@dataclass
class Worker:
    """The commands. tracker: HOST:PORT; threads: on the board; folder: for libraries, kept from session to session."""

    tracker: str
    key: str
    target: str
    threads: int
    folder: str
    _session: Any = None
    _since: float = 0.0
    _number: int = 0
    _about: dict[str, Any] = field(default_factory=dict)
    _workload: Workload | None = None
    _sent: set[str] = field(default_factory=set)  # libraries that this session has

    def connect(self, wait_s: float) -> dict[str, Any]:
        """What the board says of itself, with `address`, and `session`, a number that changes when the board may have.

        Raises NoBoard when the tracker has none within that time.
        """
        if self._session is not None:
            if time.monotonic() - self._since > SESSION_S / 2:
                self._leave()
            else:
                with contextlib.suppress(Lost):  # it may have gone since it was asked last
                    self._json("about")
        if self._session is None:
            offer = self._requested(wait_s)
            key = f"{offer.match_key} -threads={self.threads}"
            self._session = self._safely(lambda: rpc.connect(offer.host, offer.port, key, SESSION_S))
            self._since, self._number = time.monotonic(), self._number + 1
            self._sent.clear()
            about = self._json("about")
            if about.get("protocol") != PROTOCOL or not isinstance(about.get("name"), str):
                raise self._lost(f"its rpc-server speaks protocol {about.get('protocol')!r}, not {PROTOCOL}")
            if self._machine().gpu is not None:
                about["gpu"] = self._json("gpu")
            self._about = about | {"address": str(Address(offer.host, offer.port)), "session": self._number}
        return self._about

    def open(self, request: Request, default: Mapping[str, int], least_bytes: int) -> dict[str, Any]:
        """Take up a workload: send arguments, canaries and the default, whose results count as right from then on."""
        self._workload = None
        made = candidates.Call.of(request, default)
        library = self._library(made.kernel, request, default)
        shared, about = self._canaries(least_bytes)
        arguments, data = _laid_out(made)
        self._upload(ARGUMENTS, data)
        self._send(shared)
        spec = about | {
            "file": ARGUMENTS, "arguments": arguments, "least_bytes": least_bytes, "most_copies": MOST_COPIES,
            "outs": [{"shape": out.shape, "dtype": out.dtype} for out in request.outs], "canaries": shared.name,
        }  # fmt: skip
        opened = self._json("open", json.dumps(spec))
        rotated, pages = opened.get("rotated_bytes"), opened.get("page_kib")
        if not isinstance(rotated, int) or rotated < 0:
            raise self._lost("it gave no size of the rotated weights")
        if not isinstance(pages, (int, type(None))):
            raise self._lost("it gave no size of its pages")
        workload = Workload(request, made, library, [], 0)
        workload.reference = self._run(workload, library)
        if not all(np.isfinite(out).all() for out in workload.reference if out.dtype.kind == "f"):
            raise self._lost("the default kernel gave results there that are no numbers")
        self._workload = workload
        return {"rotated_bytes": rotated, "bytes_per_call": made.bytes_per_call, "page_kib": pages}

    def prepare(self, knobs: Mapping[str, int]) -> int:
        """Link a candidate, have it run there, and compare; gives its number for `time`.

        Where results differ, the default runs once more: a board that disagrees with itself is broken.
        """
        made = self._workload
        assert made is not None
        kernel = candidates.candidate(made.request, knobs, made.call.kernel)
        library = self._library(kernel, made.request, knobs)
        outs = self._run(made, library)
        number = made.count - 1
        try:
            candidates.check(outs, made.reference, candidates.tolerance(made.request))
        except ValueError:
            again = self._run(made, made.default)
            if not all(np.array_equal(a, b) for a, b in zip(again, made.reference, strict=True)):
                raise self._lost("the default kernel's results change from run to run") from None
            raise
        return number

    def time(self, numbers: list[int], rounds: int) -> dict[str, Any]:
        """See runtime.timing.times."""
        assert self._workload is not None
        found = self._json("time", json.dumps(numbers), rounds)
        if why := nonsense(found, len(numbers), rounds):
            raise self._lost(f"it answered nonsense: {why}")
        return found

    def _requested(self, wait_s: float) -> Any:
        address = Address.parse(self.tracker)
        try:
            connection = Tracker(address, wait_s)
        except OSError as error:
            raise NoBoard(f"there is no tracker at {address}: {error.strerror or error}") from None
        try:
            offer = connection.request(self.key, wait_s)
        except OSError as error:
            raise NoBoard(f"the tracker at {address} left: {error}") from None
        finally:
            connection.close()
        if offer is None:
            raise NoBoard(f"the tracker at {address} has no free board of key {self.key!r}")
        return offer

    def _run(self, made: Workload, library: Path) -> list[np.ndarray]:
        """Send a library, have it run once; its results."""
        self._send(library)
        answer = self._json("prepare", library.name)
        if isinstance(answer.get("error"), str):
            raise RuntimeError(answer["error"])
        if answer.get("number") != made.count:
            raise self._lost("it lost count of its candidates")
        made.count += 1
        raw = self._call("outputs")
        specs = [(out.shape, np.dtype(out.dtype)) for out in made.request.outs]
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in specs]
        if not isinstance(raw, bytes | bytearray) or len(raw) != sum(sizes):
            raise self._lost("its results have another size than asked for")
        starts = np.cumsum([0, *sizes])
        return [
            np.frombuffer(raw, kind, math.prod(shape), start).reshape(shape)
            for (shape, kind), start in zip(specs, starts[:-1].tolist(), strict=True)
        ]

    def _library(self, kernel: Kernel | CudaKernel, request: Request, knobs: Mapping[str, int]) -> Path:
        """A candidate as the board takes it."""
        what = (request, sorted(knobs.items()))
        if isinstance(kernel, CudaKernel):
            return self._made(what, lambda path: cuda_candidates.build(kernel, request, path))
        return self._linked({KERNEL: kernel.func}, what)

    def _canaries(self, least_bytes: int) -> tuple[Path, dict[str, Any]]:
        """Their library, and what the board must know to use it."""
        target = self._machine()
        if target.gpu is not None:
            library = self._made("canaries", lambda path: cuda_candidates.canaries(path, target))
            front, copied = cuda_candidates.SPIN_BYTES, cuda_candidates.copy_bytes(least_bytes)
            return library, {"gpu": True, "front_bytes": front, "copy_bytes": copied}
        return self._linked(canaries.functions(), "canaries"), {
            "readers": [canaries.READER.format(i) for i in range(len(read_bandwidth.VARIANTS))],
            "read_bytes": READ_BYTES, "reader_out": (read_bandwidth.SLICES, read_bandwidth.LANES),
            "spin_out": (canaries.SLICES,),
        }  # fmt: skip

    def _linked(self, funcs: Mapping[str, Any], what: Any) -> Path:
        """A library of these functions for the board's CPU."""
        target = self._machine()
        return self._made(what, lambda path: link.export(candidates.generate(funcs, target), path, target))

    def _made(self, what: Any, make: Callable[[Path], None]) -> Path:
        """A library for the board, made once."""
        name = hashlib.sha256(repr((self._machine(), what)).encode()).hexdigest()[:16]
        path = Path(self.folder) / f"{name}.so"
        if not path.is_file():
            make(path)
        return path

    def _machine(self) -> Target:
        return targets.load(self.target)

    def _send(self, library: Path) -> None:
        """Once a session: what the board has mapped must not be written again."""
        if library.name not in self._sent:
            self._upload(library.name, library.read_bytes())
            self._sent.add(library.name)

    def _upload(self, name: str, data: bytes) -> None:
        self._safely(lambda: self._session.upload(bytearray(data), name))

    def _json(self, name: str, *arguments: Any) -> dict[str, Any]:
        text = self._call(name, *arguments)
        try:
            found = json.loads(text)
        except (TypeError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise self._lost(f"quern.{name} answered something that is no JSON object")
        return found

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._safely(lambda: self._session.get_function(f"quern.{name}")(*arguments))

    def _safely(self, act: Callable[[], Any]) -> Any:
        """What TVM's client raises, as ours."""
        try:
            return act()
        except Exception as error:
            said = str(error)
            _, marked, why = said.partition(rpc_server.ENDED)
            raise self._lost(why if marked else said[-300:]) from None

    def _lost(self, why: str) -> Lost:
        """Leave the board; gives what to raise."""
        where = self._about.get("address", "the board")
        self._leave()
        return Lost(f"{where}: {why}")

    def _leave(self) -> None:
        session, self._session, self._workload = self._session, None, None
        if session is not None:
            try:
                session.get_function("CloseRPCConnection")()
            except Exception:  # it is gone already
                return


def _laid_out(made: candidates.Call) -> tuple[list[dict[str, Any]], bytes]:
    """Every argument's dtype, shape and place, and the bytes of all."""
    described, pieces, place = [], [], 0
    for name, array in made.arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        fill = candidates.padded(len(raw))
        described.append({"dtype": str(array.dtype), "shape": array.shape, "offset": place, "nbytes": len(raw),
                          "streamed": name in made.streamed})  # fmt: skip
        pieces.append(raw.ljust(fill, b"\0"))
        place += fill
    return described, b"".join(pieces)


def nonsense(found: Mapping[str, Any], count: int, rounds: int) -> str | None:
    """What cannot be in an answer about that many candidates and rounds; None when all can."""
    seconds, reads, spins = found.get("seconds"), found.get("reads"), found.get("spins")
    if not isinstance(seconds, list) or len(seconds) != rounds:
        return "not as many rounds as asked for"
    for row in seconds:
        if not isinstance(row, list) or len(row) != count:
            return "not as many candidates as asked for"
        if any(not isinstance(slot, list) or len(slot) < timing.LEAST_CALLS for slot in row):
            return "fewer calls than asked for"
    numbers = [s for row in seconds for slot in row for s in slot]
    for what, values in (("times", numbers), ("reads", reads), ("spins", spins)):
        if not isinstance(values, list) or not all(isinstance(v, float) and 0 < v < MOST_S for v in values):
            return f"{what} that are none"
    if len(reads or ()) != rounds or len(spins or ()) != rounds + 1:
        return "not as many canaries as rounds"
    foreign = found.get("foreign")
    if not isinstance(foreign, int | float) or not 0 <= foreign < math.inf or type(found.get("throttled")) is not bool:
        return "no share of other processes, or no word on throttling"
    return None


if __name__ == "__main__":
    candidates.serve(Worker(**json.loads(sys.argv[2])), int(sys.argv[1]))

"""Timing of candidates on a board that TVM's tracker lends, through a worker process that compiles and links here.

Boards vanish, hang, answer nonsense and get hot. A board that is lost is exchanged for the next one that the tracker
has; a candidate is blamed for a loss only when it is lost twice, and the default kernel is not, under the same
circumstances. A batch in which the clock of the board was not what it has been before is thrown away, and the board may
cool.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from compiler.codegen.cuda import tables
from compiler.errors import UserError
from compiler.tune.measure import (
    DRIFT,
    EMULATED,
    LEAST_BYTES,
    OPEN_S,
    RPC,
    Batch,
    CandidateFailed,
    CandidateLost,
    Device,
    DeviceLost,
    Setting,
    WorkerMeasurer,
)  # fmt: skip
from runtime import device, timing
from schedules.kernel import Request, Space
from targets import Gpu, Target

WAIT_S, SOON_S = 20.0, 3.0  # for a board: before a batch, and in the middle of one
MEMORY_SHARE = 4  # rotated weights take at most this part of a board's memory
CACHES = 4  # and at least so many of its last-level caches
SPIN_DRIFT = 0.08  # of the clock's canary: a Pi 4 has steps of 100 MHz, 7 % of 1500; quiet boards show below 1 %
COOL_S, MOST_COOL_S = 2.0, 30.0  # pause before a hot board is looked at again; it doubles
SLOWEST = 20  # a board may take so much longer for a batch than its default kernel's time says
# Linux's "CPU part" of the cores that targets name: Arm's MIDR_EL1 documentation. Another core is another device.
PARTS = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "cortex-a76": "0xd0b"}


class BoardError(UserError):
    """A board that offered itself is not what its key says, or may not fill this database."""


@dataclass
class BoardMeasurer(WorkerMeasurer):
    """One board at a time, whichever the tracker lends. admit: raises UserError for a board that may not be used.

    folder: where linked libraries are kept while tuning lasts.
    """

    tracker: str = ""
    key: str = ""
    target: Target | None = None
    folder: Path = field(default_factory=Path)
    admit: Callable[[Setting], None] = lambda setting: None
    least_bytes: int = LEAST_BYTES
    open_s: float = OPEN_S
    _about: dict[str, Any] = field(default_factory=dict)
    _best_spin: dict[str, float] = field(default_factory=dict)  # seconds, by board

    worker: ClassVar[str] = "compiler.tune.board_worker"
    losses: ClassVar[int] = 2
    repeats: ClassVar[int] = 4

    def ready(self, wait_s: float = WAIT_S) -> None:
        """Have a board. Raises DeviceLost when there is none in that time, UserError for a board of another kind."""
        self.start()
        try:
            about = self._ask("connect", wait_s, within=wait_s + self.reply_s + self.open_s * (not self._about))
        except (CandidateLost, CandidateFailed) as error:
            raise DeviceLost(str(error)) from None
        if about["session"] != self._about.get("session") or about["address"] != self._about.get("address"):
            self._opened = None
            self._admit(about)
        self._about = about

    def _admit(self, about: dict[str, Any]) -> None:
        """Refuse what cannot run the target's code or would say nothing about it."""
        target = self.target
        assert target is not None
        where = f"The board at {about['address']} ({about['name']})"
        if about.get("tvm_ffi", [])[:2] != list(_own_ffi()):
            raise BoardError(
                f"{where} has tvm-ffi {'.'.join(map(str, about.get('tvm_ffi', [])))}, but kernels are made here for "
                f"{'.'.join(map(str, _own_ffi()))}. Give it the libraries of this release: build --self-contained."
            )
        missing = sorted(set(target.cpuinfo) - set(about.get("features", ()))) if target.gpu is None else []
        glibc = about.get("glibc")
        fits = about.get("arch") == target.arch and glibc and device.version(glibc) >= device.version(target.glibc)
        part = PARTS.get(target.mcpu, about.get("cpu"))
        gpu = None if target.gpu is None else self._admit_gpu(target.gpu, about, where)
        if missing or not fits or about.get("cpu") != part:
            raise BoardError(
                f"{where} is offered as {self.key!r}, but is no {target.name}: it is {about.get('arch')}, CPU "
                f"{about.get('cpu')}, glibc {glibc}"
                f"{', without ' + ', '.join(missing) if missing else ''}. Give boards of another kind another --key."
            )
        measured = EMULATED if about.get("emulator") or about.get("gpu", {}).get("emulated") else RPC
        setting = replace(self.setting, cpu=str(about["cpu"]), measured=measured, gpu=gpu)
        self.admit(setting)
        self.setting = setting

    def _admit_gpu(self, gpu: Gpu, about: dict[str, Any], where: str) -> Device:
        """The GPU; BoardError unless it is of the target's architecture and its driver takes our code."""
        found = about.get("gpu", {})
        if "error" in found:
            raise BoardError(f"{where} is offered as {self.key!r}, but it has no GPU: {found['error']}.")
        name, multiprocessors = found.get("name"), found.get("multiprocessors")
        if not isinstance(name, str) or type(multiprocessors) is not int or multiprocessors < 1:
            raise BoardError(f"{where} says nonsense of its GPU: {name!r}, {multiprocessors!r} multiprocessors.")
        said = f"{name}, {multiprocessors} multiprocessors"
        if found.get("arch") != gpu.sm:
            raise BoardError(
                f"{where} is offered as {self.key!r}, but its GPU is sm_{found.get('arch')} ({said}) and kernels are "
                f"tuned for {gpu.arch}. Give boards of another kind another --key."
            )
        driver, needed = int(found.get("driver") or 0), tables.driver_version(gpu)
        if driver < needed:
            have, need = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, needed))
            raise BoardError(f"{where} has an NVIDIA driver of CUDA {have}, but kernels need {need}. Update it.")
        return Device(name, multiprocessors)

    def _open(self, request: Request, space: Space) -> None:
        self.ready(SOON_S)
        if self._opened == request:
            return
        try:
            self._size = self._ask("open", request, dict(space.default), self._rotated(), within=self.open_s)
        except (CandidateFailed, CandidateLost) as error:
            raise DeviceLost(f"the default kernel failed: {error}") from None
        self._opened, self._quickest_s = request, math.inf

    def _rotated(self) -> int:
        """As many bytes of weights as a board can hold, beyond its caches; least_bytes exceeds those of any GPU."""
        memory = self._about.get("memory_bytes")
        most = int(memory) // MEMORY_SHARE if isinstance(memory, int) else self.least_bytes
        target = self.target
        assert target is not None
        if target.gpu is not None:
            return min(self.least_bytes, most)
        cache = max(int(self._about.get("cache_bytes") or 0), 1024 * (target.l2_kib or 0))
        return max(min(self.least_bytes, most), CACHES * cache)

    def _arguments(self) -> list[str]:
        assert self.target is not None
        threads = self.setting.threads
        fields = {"tracker": self.tracker, "key": self.key, "target": self.target.name, "threads": threads}
        return [json.dumps(fields | {"folder": str(self.folder)})]

    def _environment(self) -> dict[str, str]:
        return {"TVM_NUM_THREADS": "1"}  # nothing is computed here

    def _processors(self) -> int:
        return int(self._about.get("processors") or 1)

    def _time_s(self, count: int, rounds: int) -> float:
        """Known from the batches before how long a call takes; before the first, only that a slot has three calls."""
        call_s = self._quickest_s if math.isfinite(self._quickest_s) else 0.0
        slot_s = timing.SLOT_S + (1 + timing.LEAST_CALLS) * call_s
        return self.reply_s + SLOWEST * rounds * (1 + count) * slot_s

    def _unfit(self, batch: Batch) -> str | None:
        return self._heat(batch.spins, batch.throttled) or super()._unfit(batch)

    def _heat(self, spins: tuple[float, ...], throttled: bool) -> str | None:
        """Why the board's clock is not what it was at its best."""
        if throttled:
            return "the board's firmware holds its clock down: it is too hot, or its power supply is too weak"
        name = self._about["address"]
        best = self._best_spin[name] = min(self._best_spin.get(name, math.inf), *spins)
        slower, limit = max(spins) / best - 1, SPIN_DRIFT * self.most_drift / DRIFT
        if slower <= limit:
            return None
        return (
            f"the board's clock is {slower:.0%} slower than at its best ({limit:.0%} is the limit): it throttles or is "
            f"busy"
        )

    def _rested(self, repeat: int) -> bool:
        """A pause, and whether the clock is back: a batch would only heat the board."""
        time.sleep(min(COOL_S * 2 ** (repeat - 1), MOST_COOL_S))
        answer = self._ask("time", [], 1)
        return self._heat(tuple(answer["spins"]), answer["throttled"]) is None


def _own_ffi() -> tuple[int, int]:
    from importlib.metadata import version

    major, minor = device.version(version("apache-tvm-ffi"))
    return major, minor

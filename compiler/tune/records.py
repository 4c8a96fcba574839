"""Tuning records: JSON lines in tuning_logs/<target key>/tune.jsonl, appended and synced one by one, never rewritten.

A `trial` is one measured (or failed) point of a schedule's space; a `choice` is the verdict on a shape, after the best
trials met the default once more; the last one counts. `build` applies a choice when schedule, workload and the default
that it beat are still the same. The target key is `Target.tuning_key`, written into every line as well.
`measured` says by what clock: "local", "rpc" (a board), or "emulated", which never stands beside the others in a file.
Costs of a model ("model", see model.py) are no times and have a file of their own, model.jsonl beside the other one. A
build asks it only about workloads on which there is no measured verdict.
Devices of one target differ: an Orin Nano has half of an AGX Orin's multiprocessors. Records of a GPU say which device
made them ("gpu"); tuning goes on with those of its own device, and a build takes the verdict of the device whose number
of multiprocessors is nearest to the target's, which `--multiprocessors` sets; of two as near, the last one. It says
whose records it took (`Tuned.devices`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from compiler.errors import UserError
from compiler.measure import record_file
from compiler.passes.lower_to_schedules import Decision
from compiler.tune.measure import EMULATED, MODEL, Device
from schedules.kernel import OutsideSpace, Request, Space, space
from targets import Target

DEFAULT_FOLDER = Path(__file__).parents[2] / "tuning_logs"
FILE_NAME, MODEL_FILE_NAME = "tune.jsonl", "model.jsonl"
ID_DIGITS = 16  # hexadecimal, of the SHA-256 of a record's line

Record = dict[str, Any]
Knobs = Mapping[str, int]

_NUMBER, _SPREAD = (int, float), "spread"
COMMON: dict[str, Any] = {  # in every line, key -> what it must be
    "kind": str, "target": str, "schedule": str, "operator": str, "workload": dict, "knobs": dict, "default": dict,
    "threads": int, "cpu": str, "tvm": str, "commit": str, "measured": str,
}  # fmt: skip
GPU: dict[str, Any] = {"gpu": dict}  # in every line about a schedule of schedules/cuda/, beside COMMON
GPU_SCHEDULES = "cuda."
# What a line may have: pages of the weights' memory. Lines that were made before it said so were timed in 4 KiB.
OPTIONAL: dict[str, Any] = {"page_kib": int}
KINDS: dict[str, dict[str, Any]] = {
    # seconds: median, min, max of all calls; speedup: default's time / this one's, round by round
    "trial": {"seconds": _SPREAD, "runs": int, "speedup": _SPREAD, "gb_s": _NUMBER, "gmac_s": _NUMBER,
              "read_gb_s": _NUMBER, "rotated_bytes": int},
    "failure": {"error": str},
    # best: the challenger; knobs: the winner; seconds, speedup, gb_s, gmac_s: the challenger's in the last comparison
    "choice": {"best": dict, "gained": bool, "seconds": _SPREAD, "default_seconds": _SPREAD, "speedup": _SPREAD,
               "wins": int, "rounds": int, "trials": int, "gb_s": _NUMBER, "gmac_s": _NUMBER, "read_gb_s": _NUMBER,
               "rotated_bytes": int},
}  # fmt: skip
MODEL_KINDS: dict[str, dict[str, Any]] = {  # of one call, by one thread; speedup: default's cycles / this one's
    "trial": {"instructions": int, "cycles": _NUMBER, "speedup": _SPREAD},
    "failure": KINDS["failure"],
    "choice": {"best": dict, "gained": bool, "instructions": int, "cycles": _NUMBER, "default_instructions": int,
               "default_cycles": _NUMBER, "speedup": _SPREAD, "trials": int},
}  # fmt: skip


class DatabaseError(UserError):
    """A tuning database has a line that is no record, or belongs elsewhere."""


def same_workload(record: Record, asked: Space) -> bool:
    """Whether a record is about this schedule, this shape, and a default that still holds."""
    return (
        record["schedule"] == asked.schedule
        and record["workload"] == dict(asked.workload)
        and record["default"] == dict(asked.default)
    )


def frozen(knobs: Knobs) -> tuple[tuple[str, int], ...]:
    """Knobs as a key of a dictionary."""
    return tuple(sorted(knobs.items()))


@dataclass
class Database:
    """The records of one target key. Read it with `read`; `writing` also takes the file for this process alone."""

    path: Path
    key: str
    records: list[Record] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    gpu: Device | None = None  # whose trials and verdicts count while tuning
    _file: IO[bytes] | None = None
    _made: tuple[Path, ...] = ()  # folders that were not there before

    @classmethod
    def read(cls, folder: Path, key: str, name: str = FILE_NAME) -> Database:
        """All whole lines; a last line without its end was being written when the power went, and is passed over.

        Raises DatabaseError for a line that is not a record of this target key; no file is no records.
        """
        found = cls(folder / key / name, key)
        found._load(found.path.read_bytes() if found.path.exists() else b"")
        return found

    @classmethod
    def writing(cls, folder: Path, key: str, name: str = FILE_NAME) -> Database:
        """The same, ready for `append`: a half-written last line is cut off. One process at a time."""
        found = cls(folder / key / name, key)
        found._made = tuple(place for place in (folder / key, folder) if not place.exists())
        found.path.parent.mkdir(parents=True, exist_ok=True)
        file = found.path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DatabaseError(f"{found.path}: another process is tuning into it. Wait for its end.") from None
        except OSError as error:  # a network file system without locks
            file.close()
            raise DatabaseError(
                f"{found.path}: cannot be locked: {error.strerror}. Give --tuning-logs a folder on a local disk."
            ) from None
        found._file = file
        try:
            file.seek(0)
            raw = file.read()
            found._load(raw)
            file.truncate(raw.rfind(b"\n") + 1)
        except BaseException:
            found.close()
            raise
        return found

    def admit(self, measured: str, gpu: Device | None = None) -> None:
        """Raise DatabaseError when records measured so would stand beside others: an emulator's times are no times.

        gpu: the device that will be tuned for; one at a time, because points are shared out among boards.
        """
        if why := self._mixed(measured):
            raise DatabaseError(
                f"{self.path}: {why}, and the one says nothing about the other. Give --tuning-logs another folder."
            )
        if self.gpu not in (None, gpu):
            raise DatabaseError(
                f"{self.path}: this run tunes for {self.gpu}, and another board is {gpu}. Give boards of another kind "
                f"another --key."
            )
        self.gpu = gpu

    def _mixed(self, measured: str) -> str | None:
        if (measured == MODEL) != (self.path.name == MODEL_FILE_NAME):
            return "it takes costs of a model alone, and this is a time" if measured != MODEL else (
                "it takes times alone, and this is the cost of a model")  # fmt: skip
        if not self.records or (self.records[0]["measured"] == EMULATED) == (measured == EMULATED):
            return None
        return "it has times of an emulated board, this one is real" if measured != EMULATED else (
            "it has times of real boards, this one is emulated")  # fmt: skip

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on the disk. Raises DatabaseError where there is no room for it."""
        assert self._file is not None
        line = json.dumps({"target": self.key, **record}, allow_nan=False).encode()
        self._add(line, len(self.records) + 1)
        try:
            record_file.add(self._file, line + b"\n", sync=True)
        except OSError as error:
            del self.records[-1], self.names[-1]
            raise DatabaseError(
                f"{self.path}: cannot take another record: {error.strerror}. What it has is whole: make room and run "
                f"the same command again, it goes on from there."
            ) from None

    def keep(self) -> None:
        """A search has ended: the folder stays even if it is empty, for `build --tuning-logs` is given it next."""
        self._made = ()

    def close(self) -> None:
        """Let other processes write."""
        if self._file is not None:
            if not self.records and not self.path.stat().st_size:
                self.path.unlink()  # nothing came of it
                for place in self._made:
                    with suppress(OSError):  # somebody else has put something there
                        place.rmdir()
            self._file.close()
            self._file = None

    def trials(self, asked: Space, threads: int) -> dict[tuple[tuple[str, int], ...], Record]:
        """Trials and failures of this workload, thread count and device, by knobs."""
        return {
            frozen(r["knobs"]): r
            for r in self.records
            if r["kind"] != "choice" and r["threads"] == threads and same_workload(r, asked) and self._own(r)
        }

    def choice(self, asked: Space, threads: int) -> Record | None:
        """The last verdict on this workload for a thread count, of the device that is tuned for."""
        found = [r for r, _ in self._choices(asked) if r["threads"] == threads and self._own(r)]
        return found[-1] if found else None

    def _own(self, record: Record) -> bool:
        return self.gpu is None or record.get("gpu") == asdict(self.gpu)

    def _choices(self, asked: Space) -> list[tuple[Record, str]]:
        pairs = zip(self.records, self.names, strict=True)
        return [(r, name) for r, name in pairs if r["kind"] == "choice" and same_workload(r, asked)]

    def knows(self, asked: Space) -> bool:
        """Whether there is a verdict on this workload."""
        return bool(self._choices(asked))

    def decision(self, asked: Space, threads: int, multiprocessors: int | None = None) -> Decision | None:
        """What a build does: the verdict for `threads`, else for the most threads; None: the schedule's default.

        multiprocessors: of the target's GPU; the device that is nearest in size has the say.
        Raises OutsideSpace when the verdict's knobs are none of the schedule's.
        """
        choices = self._choices(asked)
        if multiprocessors is not None:
            far = [abs(math.log2(r["gpu"]["multiprocessors"] / multiprocessors)) for r, _ in choices]
            choices = [pair for pair, distance in zip(choices, far, strict=True) if distance == min(far)]
        found = {r["threads"]: (r, name) for r, name in choices}  # the last one
        if not found:
            return None
        record, name = found.get(threads) or found[max(found)]
        if not record["gained"]:
            return None
        asked.check(record["knobs"])
        return Decision(dict(record["knobs"]), name, record["measured"] == MODEL)

    def device_of(self, decision: Decision) -> Device:
        """The GPU that a decision's record was made on."""
        return Device(**self.records[self.names.index(decision.record)]["gpu"])

    def devices(self) -> set[Device]:
        """All GPUs that have verdicts here."""
        return {Device(**r["gpu"]) for r in self.records if r["kind"] == "choice"}

    def _load(self, raw: bytes) -> None:
        for number, line in enumerate(raw.split(b"\n")[:-1], 1):
            self._add(line, number)

    def _add(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line, parse_constant=_no_constant)
            _check(record, self.key)
            if why := self._mixed(record["measured"]):
                raise ValueError(f"the file mixes clocks: {why}")
        except (ValueError, RecursionError) as error:
            raise DatabaseError(
                f"{self.path}:{number}: not a tuning record of {self.key}: {error}. "
                f"Remove the line, or restore the file; 'compiler tune' measures again what is missing."
            ) from None
        self.records.append(record)
        self.names.append(hashlib.sha256(line).hexdigest()[:ID_DIGITS])


@dataclass
class Tuned:
    """What `lower_to_schedules` and `lower_to_launches` ask for decisions.

    Remembers how many records no longer fit their schedule. modelled: asked about workloads that `database` has no
    verdict on.
    """

    database: Database
    modelled: Database
    threads: int
    multiprocessors: int | None = None
    misfits: Counter[str] = field(default_factory=Counter)
    _used: set[Device] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path, target: Target) -> Tuned:
        """The records of a target, for as many threads as it has cores, or the one that feeds its GPU."""
        key, gpu = target.tuning_key, target.gpu
        threads, size = (target.cores, None) if gpu is None else (1, gpu.multiprocessors)
        return cls(Database.read(folder, key), Database.read(folder, key, MODEL_FILE_NAME), threads, size)

    def __call__(self, request: Request) -> Decision | None:
        """The measured knobs of a request, else the modelled ones, or None for the schedule's default."""
        if not self.database.records and not self.modelled.records:
            return None
        asked = space(request)
        if asked is None:
            return None
        try:
            database = self.database if self.database.knows(asked) else self.modelled
            decision = database.decision(asked, self.threads, self.multiprocessors)
            if decision is not None and self.multiprocessors is not None:
                self._used.add(database.device_of(decision))
            return decision
        except OutsideSpace as error:
            self.misfits[str(error)] += 1
            return None

    def devices(self) -> str:
        """Whose records were taken, and whose were not, for people; "" where there is nothing to choose."""
        others = sorted(map(str, self.database.devices() - self._used)) if self.multiprocessors is not None else []
        right = all(device.multiprocessors == self.multiprocessors for device in self._used)
        if not self._used or (right and not others):
            return ""
        text = f"records are of {', '.join(sorted(map(str, self._used)))}, nearest to {self.multiprocessors}"
        text += f"; there are others of {', '.join(others)}" if others else ""
        return f"{text}. --multiprocessors says how many your GPU has."


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check(record: Any, key: str) -> None:
    """Raise ValueError unless `record` has the keys of its kind, each of its type, and this target key."""
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    kind = record.get("kind")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    wanted = COMMON | (MODEL_KINDS if record.get("measured") == MODEL else KINDS)[kind]
    if str(record.get("schedule")).startswith(GPU_SCHEDULES):
        wanted |= GPU
    wanted |= {name: want for name, want in OPTIONAL.items() if name in record and record.get("measured") != MODEL}
    if odd := sorted(set(record) ^ set(wanted)):
        raise ValueError(f"unknown key {odd[0]!r}" if odd[0] in record else f"key {odd[0]!r} is missing")
    for name, want in wanted.items():
        _check_value(name, record[name], want)
    gpu = record.get("gpu", {"name": "", "multiprocessors": 1})
    if list(gpu) != ["name", "multiprocessors"] or type(gpu["name"]) is not str:
        raise ValueError("gpu must have name and multiprocessors")
    if type(gpu["multiprocessors"]) is not int or gpu["multiprocessors"] < 1:
        raise ValueError(f"gpu.multiprocessors is {gpu['multiprocessors']!r}")
    if record["target"] != key:
        raise ValueError(f"it was made for {record['target']}")


def _check_value(name: str, value: Any, want: Any) -> None:
    if want is _SPREAD:
        if not isinstance(value, dict) or list(value) != ["median", "min", "max"]:
            raise ValueError(f"{name} must have median, min and max")
        for part, number in value.items():
            _check_value(f"{name}.{part}", number, _NUMBER)
        if not 0 < value["min"] <= value["median"] <= value["max"]:
            raise ValueError(f"{name} must have 0 < min <= median <= max")
        return
    typed = isinstance(value, want) and (want is bool or not isinstance(value, bool))
    if not typed or (want in (int, _NUMBER) and not (math.isfinite(value) and value >= 0)):
        raise ValueError(f"{name} is {value!r}")
    if name in ("knobs", "default", "best") and not all(type(v) is int for v in value.values()):
        raise ValueError(f"{name} must have integers only")

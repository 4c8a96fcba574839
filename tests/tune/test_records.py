"""Databases: what a killed writer leaves, what is refused, and which record a build may apply."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler.passes.lower_to_schedules import Decision
from compiler.tune.records import Database, DatabaseError, Tuned
from schedules import kernel
from schedules.kernel import OutsideSpace, Request, Space, TensorSpec
from targets import Target

NATIVE = targets.load("native")
SPACE = Space.around(
    {"rows": 2, "ahead": 0}, {"rows": (1, 2, 4)}, schedule="mill.stone", workload={"m": 1, "n": 8, "kind": "zero"}
)
ONE = {"median": 1.0, "min": 0.5, "max": 2.0}


def trial(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "trial", "schedule": "mill.stone", "operator": "quern.linear_int8",
        "workload": {"m": 1, "n": 8, "kind": "zero"}, "knobs": {"rows": 4, "ahead": 0},
        "default": {"rows": 2, "ahead": 0}, "threads": 2, "cpu": "stone", "tvm": "0.27.0.post1", "commit": "abc",
        "measured": "local", "seconds": ONE, "runs": 5, "speedup": ONE, "gb_s": 1.5, "gmac_s": 0, "read_gb_s": 2.5,
        "rotated_bytes": 100, **changes,
    }  # fmt: skip


def choice(**changes: Any) -> dict[str, Any]:
    made = trial(kind="choice", best={"rows": 4, "ahead": 0}, gained=True, default_seconds=ONE, wins=9, rounds=9,
                 trials=3)  # fmt: skip
    del made["runs"]
    return made | changes


def database(folder: Path, *records: dict[str, Any], key: str = "mill") -> Path:
    """A file with these records; gives its path."""
    writer = Database.writing(folder, key)
    for record in records:
        writer.append(record)
    writer.close()
    return writer.path


def message(folder: Path) -> str:
    with pytest.raises(DatabaseError) as caught:
        Database.read(folder, "mill")
    return str(caught.value)


def test_reads_what_it_appends(tmp_path: Path) -> None:
    path = database(tmp_path, trial(), trial(knobs={"rows": 1, "ahead": 0}, page_kib=2048))
    assert path == tmp_path / "mill" / "tune.jsonl"
    found = Database.read(tmp_path, "mill")
    assert found.records == [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["knobs"]["rows"] for r in found.trials(SPACE, 2).values()] == [4, 1]
    assert found.trials(SPACE, 1) == {}


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert Database.read(tmp_path, "mill").records == []


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_half_written_last_line_is_passed_over_and_cut(tmp_path: Path, left: int) -> None:
    path = database(tmp_path, trial(), trial(knobs={"rows": 1, "ahead": 0}))
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:left])
    assert len(Database.read(tmp_path, "mill").records) == 1
    database(tmp_path, trial(knobs={"rows": 2, "ahead": 0}))
    assert [r["knobs"]["rows"] for r in Database.read(tmp_path, "mill").records] == [4, 2]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    writer = Database.writing(tmp_path, "mill")
    with pytest.raises(DatabaseError) as caught:
        Database.writing(tmp_path, "mill")
    assert str(caught.value) == f"{writer.path}: another process is tuning into it. Wait for its end."
    writer.close()
    Database.writing(tmp_path, "mill").close()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "it is no object"),
        ("", "Expecting value: line 1 column 1 (char 0)"),
        (trial(kind="guess"), "kind is 'guess', but must be one of trial, failure, choice"),
        (trial(extra=1), "unknown key 'extra'"),
        ({k: v for k, v in trial().items() if k != "cpu"}, "key 'cpu' is missing"),
        (trial(threads=True), "threads is True"),
        (trial(runs=-1), "runs is -1"),
        (trial(page_kib="4"), "page_kib is '4'"),
        (trial(knobs={"rows": 1.5}), "knobs must have integers only"),
        (trial(seconds=1.0), "seconds must have median, min and max"),
        (trial(seconds={"median": 1.0, "min": 2.0, "max": 3.0}), "seconds must have 0 < min <= median <= max"),
        (json.dumps(trial()).replace("1.5", "NaN"), "NaN is not JSON"),
        (trial(target="pestle"), "it was made for pestle"),
    ],
    ids=str,
)
def test_a_wrong_line_is_refused_by_file_and_number(tmp_path: Path, line: str | dict[str, Any], why: str) -> None:
    path = database(tmp_path, trial())
    text = line if isinstance(line, str) else json.dumps({"target": "mill", **line})
    with path.open("a") as file:
        file.write(text + "\n")
    assert message(tmp_path) == (
        f"{path}:2: not a tuning record of mill: {why}. Remove the line, or restore the file; 'compiler tune' measures "
        f"again what is missing."
    )


def test_a_wrong_record_is_never_written(tmp_path: Path) -> None:
    writer = Database.writing(tmp_path, "mill")
    with pytest.raises(DatabaseError, match="it was made for pestle"):
        writer.append(trial(target="pestle"))
    writer.close()
    assert not writer.path.exists()


def test_records_of_another_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mill").mkdir()
    os.link(database(tmp_path, trial(), key="x86-64-v4"), tmp_path / "mill" / "tune.jsonl")
    assert "tune.jsonl:1: not a tuning record of mill: it was made for x86-64-v4." in message(tmp_path)


def decided(folder: Path, *records: dict[str, Any], threads: int = 2, space: Space = SPACE) -> dict[str, int] | None:
    for old in folder.glob("mill/*"):
        old.unlink()
    database(folder, *records)
    decision = Database.read(folder, "mill").decision(space, threads)
    return None if decision is None else dict(decision.knobs)


def test_which_choice_counts(tmp_path: Path) -> None:
    four, one = {"rows": 4, "ahead": 0}, {"rows": 1, "ahead": 0}
    assert decided(tmp_path, trial()) is None  # a trial is no verdict
    assert decided(tmp_path, choice()) == four
    assert decided(tmp_path, choice(), choice(knobs=one)) == one  # the last one
    assert decided(tmp_path, choice(), choice(gained=False)) is None
    assert decided(tmp_path, choice(), choice(threads=8, knobs=one)) == four  # for as many threads
    assert decided(tmp_path, choice(), choice(threads=8, knobs=one), threads=4) == one  # else for the most


def test_a_choice_for_something_else_is_left_alone(tmp_path: Path) -> None:
    assert decided(tmp_path, choice(schedule="mill.steel")) is None
    assert decided(tmp_path, choice(workload={"m": 1, "n": 16, "kind": "zero"})) is None
    assert decided(tmp_path, choice(default={"rows": 1, "ahead": 0})) is None  # the default has moved on since
    grown = Space.around({"rows": 2, "ahead": 0, "new": 0}, {}, schedule="mill.stone", workload=SPACE.workload)
    assert decided(tmp_path, choice(), space=grown) is None


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"rows": 3, "ahead": 0}, "mill.stone: rows is 3, but must be one of 1, 2, 4"),
        ({"rows": 4}, "mill.stone needs the knob 'ahead'; its knobs are rows, ahead"),
        ({"rows": 4, "ahead": 0, "depth": 1}, "mill.stone has no knob 'depth'; its knobs are rows, ahead"),
    ],
    ids=str,
)
def test_knobs_outside_the_space_are_refused(tmp_path: Path, knobs: dict[str, int], said: str) -> None:
    with pytest.raises(OutsideSpace) as caught:
        decided(tmp_path, choice(knobs=knobs))
    assert str(caught.value) == said


def linear(n: int, target: Target = NATIVE) -> Request:
    specs = [((1, 1, 32), "int8"), ((1, 1), "float32"), ((1, 1), "int32"), ((n, 32), "uint8"), ((n, 1), "float16"),
             ((n, 1), "int16")]  # fmt: skip
    args = tuple(TensorSpec(shape, dtype) for shape, dtype in specs)
    return Request("quern.linear_int8", args, (TensorSpec((1, n), "float32"),), {"bits": 4, "group": 32}, target)


def test_what_a_build_asks(tmp_path: Path) -> None:
    request = linear(64)
    space = kernel.space(request)
    assert space is not None
    point = next(space.points())
    good = choice(schedule=space.schedule, workload=dict(space.workload), default=dict(space.default), knobs=point)
    path = database(tmp_path, good, key=NATIVE.tuning_key)
    tuned = Tuned.of(tmp_path, NATIVE)
    assert tuned(request) == Decision(point, Database.read(tmp_path, NATIVE.tuning_key).names[0])
    assert tuned(linear(32)) is None
    database(tmp_path, good | {"knobs": point | {"unroll": 999}}, key=NATIVE.tuning_key)
    tuned = Tuned.of(tmp_path, NATIVE)
    assert tuned(request) is None
    (why,) = tuned.misfits
    assert why.startswith(f"{space.schedule}: unroll is 999, but must be one of 1, 2, 4")
    assert path.is_file()
    other = replace(NATIVE, name="other")
    assert Tuned.of(tmp_path, other)(replace(request, target=other)) is None


def test_an_emulators_times_stand_alone(tmp_path: Path) -> None:
    path = database(tmp_path, trial())
    writer = Database.writing(tmp_path, "mill")
    for measured in ("local", "rpc"):
        writer.admit(measured)
    with pytest.raises(DatabaseError) as caught:
        writer.admit("emulated")
    assert str(caught.value) == (
        f"{path}: it has times of real boards, this one is emulated, and the one says nothing about the other. Give "
        f"--tuning-logs another folder."
    )
    with pytest.raises(DatabaseError, match="the file mixes clocks: it has times of real boards, this one is emulated"):
        writer.append(trial(measured="emulated"))
    writer.close()
    database(tmp_path, trial(measured="emulated"), key="pestle")
    writer = Database.writing(tmp_path, "pestle")
    with pytest.raises(DatabaseError, match="it has times of an emulated board, this one is real"):
        writer.admit("rpc")
    writer.close()


def test_a_database_without_records_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("there", "new"):
        Database.writing(tmp_path / folder, "mill").close()
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    searched = Database.writing(tmp_path / "new", "mill")
    searched.keep()
    searched.close()
    assert list((tmp_path / "new").rglob("*")) == [tmp_path / "new" / "mill"]


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """As on a full disk: a write that crosses this size is cut there, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_one_record_and_no_other(tmp_path: Path) -> None:
    writer = Database.writing(tmp_path, "mill")
    writer.append(trial())
    size = writer.path.stat().st_size
    with files_end_at(size + 40), pytest.raises(DatabaseError) as caught:
        writer.append(trial(knobs={"rows": 1, "ahead": 0}))
    assert str(caught.value) == (
        f"{writer.path}: cannot take another record: File too large. What it has is whole: make room and run the same "
        "command again, it goes on from there."
    )
    assert writer.path.stat().st_size == size and len(writer.records) == len(writer.names) == 1
    writer.append(trial(knobs={"rows": 2, "ahead": 0}))
    writer.close()
    assert [r["knobs"]["rows"] for r in Database.read(tmp_path, "mill").records] == [4, 2]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DatabaseError) as caught:
        Database.writing(tmp_path, "mill")
    assert str(caught.value) == (
        f"{tmp_path}/mill/tune.jsonl: cannot be locked: No locks available. Give --tuning-logs a folder on a local "
        "disk."
    )

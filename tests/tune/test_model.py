"""Tuning by a model: the same twice, resumed without new work, apart from all times, and named by a build."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from compiler import pipeline
from compiler.__main__ import main
from compiler.measure import cycles
from compiler.passes.lower_to_schedules import Decision, requests
from compiler.progress import Reporter
from compiler.tune import model, tasks
from compiler.tune.measure import MODEL
from compiler.tune.model import ModelMeasurer
from compiler.tune.records import FILE_NAME, MODEL_FILE_NAME, Database, DatabaseError, Tuned
from compiler.tune.search import Task
from runtime import info, manifest
from schedules import kernel
from schedules.kernel import Space
from tests.end_to_end.places import DEMO
from tests.schedules import emulated
from tests.schedules.kernels import ARM
from tests.tune.test_records import choice, database, linear, trial

REQUEST = linear(8, ARM)


@pytest.fixture(autouse=True)
def _restore_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", os.environ.get("TVM_NUM_THREADS", "1"))  # tune sets it for its process


def room() -> Space:
    found = kernel.space(REQUEST)
    assert found is not None
    return found


def modelled(of: dict[str, Any]) -> dict[str, Any]:
    """A record of times as the model would have written it."""
    times = ("seconds", "default_seconds", "runs", "wins", "rounds", "gb_s", "gmac_s", "read_gb_s", "rotated_bytes")
    cost: dict[str, Any] = {"measured": MODEL, "instructions": 9, "cycles": 4.5}
    if of["kind"] == "choice":
        cost |= {"default_instructions": 9, "default_cycles": 5.5}
    return {key: value for key, value in of.items() if key not in times} | cost


def keep(folder: Path, *made: dict[str, Any], key: str = "mill") -> Database:
    """Write records of a model; gives the database."""
    writer = Database.writing(folder, key, MODEL_FILE_NAME)
    for record in made:
        writer.append(record)
    writer.close()
    return Database.read(folder, key, MODEL_FILE_NAME)


def test_costs_are_exact_and_wrong_candidates_fail() -> None:
    emulated.require("aarch64")
    space = room()
    other = next(point for point in space.points() if point["prefetch_bytes"])
    first, second = (ModelMeasurer.of(ARM).measure(REQUEST, space, [other, {**other, "tokens": 3}], 5) for _ in "12")
    assert first == second  # compiled, linked and run anew
    good, wrong = first.timings
    assert wrong.failure is not None and wrong.cost is None
    assert good.failure is None and good.cost is not None and first.default.cost is not None
    assert good.seconds == [] == first.default.seconds == first.reads
    assert good.speedups == [first.default.cost.cycles / good.cost.cycles]
    # A prefetch is one more instruction and nothing else; its cycle may hide behind others. 32 inputs of 8 rows: 2 * 16
    # multiplications of 8 bytes, one a cycle and no more.
    assert good.cost.instructions > first.default.cost.instructions > 8 * 32 / 8
    assert good.cost.cycles == pytest.approx(first.default.cost.cycles, rel=0.02)
    assert min(good.cost.cycles, first.default.cost.cycles) > 8 * 32 / 8


def test_other_results_are_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default's kernel is made to answer for a candidate, with one block of rows left out."""
    emulated.require("aarch64")
    measurer, space = ModelMeasurer.of(ARM), room()
    measurer.measure(REQUEST, space, [], 1)
    honest = model.run

    def dishonest(*asked: Any) -> Any:
        outs, cost = honest(*asked)
        outs = [out.copy() for out in outs]
        outs[0][0, 4:] = 0
        return outs, cost

    monkeypatch.setattr(model, "run", dishonest)
    (timing,) = measurer.measure(REQUEST, space, [next(space.points())], 1).timings
    assert timing.cost is None and timing.failure is not None
    assert timing.failure.startswith("ValueError: wrong results: off by ")


def test_tuning_resumes_and_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.require("aarch64")
    monkeypatch.setattr(tasks, "of", lambda options, target: [Task(REQUEST, room())])
    asked = ["tune", "--target", "rpi4", "--cost", "model", "--shapes", "a72-count", "--trials", "2", "--tuning-logs"]

    def tuned() -> dict[str, Any]:
        assert main([*asked, str(tmp_path), "--json"]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        return said

    said, path = tuned(), tmp_path / "rpi4" / MODEL_FILE_NAME
    assert (said["cost"], said["complete"], said["database"]) == ("model", True, str(path))
    (shape,) = said["shapes"]
    assert (shape["new"], shape["failed"]) == (2, 0)
    assert shape["choice"]["cycles"] > 0 and "seconds" not in shape["choice"]
    found = Database.read(tmp_path, "rpi4", MODEL_FILE_NAME).records
    assert [(r["kind"], r["measured"]) for r in found] == [("trial", MODEL), ("trial", MODEL), ("choice", MODEL)]
    whole = path.read_bytes()
    assert tuned()["shapes"][0]["new"] == 0
    assert path.read_bytes() == whole  # nothing left to do
    path.unlink()
    tuned()
    assert path.read_bytes() == whole  # from the start: the same points, costs and verdict
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:200])  # killed in the middle of a line
    assert tuned()["shapes"][0]["new"] == 1
    assert path.read_bytes().startswith(lines[0]) and path.read_bytes().count(b"\n") == 3
    assert not (path.parent / FILE_NAME).exists()
    assert main([*asked, str(tmp_path)]) == 0
    said_at_last = " ".join(capsys.readouterr().out.split())
    assert "Cycles of a model, not times: nothing was measured. 0 new trials." in said_at_last


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "x86-64"],
         "--cost model counts instructions under qemu-user, for aarch64 and riscv64; target 'x86-64' is x86_64."),
        (["--target", "aarch64"],
         "--cost model needs the pipeline of a core, and target 'aarch64' (aarch64, generic) has none that is modelled "
         "here. Name a target of one core: rpi3, rpi4, rpi5."),
        (["--target", "jetson-orin"],
         "jetson-orin: tune compares the kernels of CPUs, and this target computes on a GPU."),
        (["--target", "rpi4", "--ssh", "pi"], "--cost model asks no device and no clock: leave out --ssh."),
        (["--target", "rpi4", "--drift", "9"], "--cost model asks no device and no clock: leave out --drift."),
        (["--target", "rpi4", "--threads", "1"], "--cost model asks no device and no clock: leave out --threads."),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    emulated.require("aarch64")
    shape = ["--shapes", "a72-count", "--tuning-logs", str(tmp_path / "logs")]
    assert main(["tune", "--cost", "model", *shape, *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")
    assert not (tmp_path / "logs").exists()


def test_without_the_tools_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    emulated.require("aarch64")
    (tmp_path / "qemu-aarch64").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    cycles.tools.cache_clear()
    asked = ["tune", "--cost", "model", "--target", "rpi4", "--shapes", "a72-count"]
    assert main(asked) == 2
    assert capsys.readouterr().err == (
        "error: Cycles are modelled by llvm-mca, and there is no llvm-mca-N with its llvm-mc-N on PATH (N at least "
        "14): apt-get install llvm.\n"
    )
    (tmp_path / "qemu-aarch64").unlink()
    assert main(asked) == 2
    assert capsys.readouterr().err == (
        "error: --cost model needs qemu-aarch64, which is not installed: apt-get install qemu-user.\n"
    )
    cycles.tools.cache_clear()


def test_costs_and_times_never_share_a_file(tmp_path: Path) -> None:
    times, costs = Database.writing(tmp_path, "mill"), Database.writing(tmp_path, "mill", MODEL_FILE_NAME)
    with pytest.raises(DatabaseError, match="mixes clocks: it takes times alone, and this is the cost of a model"):
        times.append(modelled(trial()))
    for measured in ("local", "rpc", "emulated"):
        with pytest.raises(DatabaseError, match="mixes clocks: it takes costs of a model alone, and this is a time"):
            costs.append(trial(measured=measured))
    with pytest.raises(DatabaseError, match="key 'cycles' is missing"):
        costs.append(trial(measured=MODEL))
    times.append(trial())
    costs.append(modelled(trial()))
    times.close()
    costs.close()


def test_a_build_asks_the_model_only_where_nothing_was_measured(tmp_path: Path) -> None:
    space = room()
    points = list(space.points())
    about = {"schedule": space.schedule, "workload": dict(space.workload), "default": dict(space.default)}
    made = keep(tmp_path, modelled(choice(**about, knobs=points[0], threads=1)), key="rpi4")
    assert Tuned.of(tmp_path, ARM)(REQUEST) == Decision(points[0], made.names[0], modelled=True)
    assert Tuned.of(tmp_path, ARM)(linear(12, ARM)) is None
    database(tmp_path, choice(**about, knobs=points[1], measured="rpc"), key="rpi4")
    decision = Tuned.of(tmp_path, ARM)(REQUEST)
    assert decision is not None and (decision.knobs, decision.modelled) == (points[1], False)
    database(tmp_path, choice(**about, knobs=dict(space.default), gained=False, measured="rpc"), key="rpi4")
    assert Tuned.of(tmp_path, ARM)(REQUEST) is None  # a board found nothing better: the model has no say


@pytest.mark.slow
def test_a_bundle_says_that_a_model_chose(tmp_path: Path) -> None:
    asked = pipeline.Request(tmp_path / "out", ARM, context=64, chunks=(16,), tuning_logs=tmp_path)
    graph = pipeline.import_checkpoint(DEMO, asked).model.graph
    calls = requests(pipeline.fuse(graph.module(), asked), ARM)["decode"]
    space = next(s for r in calls if r.op.startswith("quern.linear_int8") and (s := kernel.space(r)) is not None)
    knobs = next(space.points())
    about = {"schedule": space.schedule, "workload": dict(space.workload), "default": dict(space.default)}
    (name,) = keep(tmp_path, modelled(choice(**about, knobs=knobs)), key="rpi4").names
    made = pipeline.build(DEMO, asked, Reporter(quiet=True))
    used = set(map(repr, made.tuning.values()))
    assert used == {repr(manifest.TunedKernel(name, knobs, modelled=True))}
    count = len(made.tuning)
    assert (
        f"tuning:       {count} kernels by records {name}; {count} of them chosen by a model's cycles, not measured\n"
    ) in info.as_text(tmp_path / "out")

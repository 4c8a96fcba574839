"""`tune` and `build` together: real records of the demo model, a kill in the middle, and a manifest that names them."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import targets
from compiler import pipeline
from compiler.__main__ import main
from compiler.cli import tune
from compiler.progress import Reporter
from compiler.tune import report
from compiler.tune.boards import BoardError
from compiler.tune.local import LocalMeasurer
from compiler.tune.measure import EMULATED, RPC, Device, Setting
from compiler.tune.records import DEFAULT_FOLDER, FILE_NAME, ID_DIGITS, Database
from compiler.tune.search import Outcome, Task, Tuner
from runtime import device, info, manifest
from schedules.kernel import Request, Space
from tests.end_to_end import commands
from tests.end_to_end.places import DEMO
from tests.tune.test_records import choice, database

NATIVE = targets.load("native")
CPUS = len(device.affinity())
PATIENCE_S = 240
TRIALS = 2
TUNE = ("compiler", "tune", "--model", DEMO, "--tokens", 1, "--operators", "linear_int8", "--trials", TRIALS)
SHAPE = ("--shapes", "a72-count", "--tokens", "1", "--target", "rpi4", "--tuning-logs", "logs")
QUICK = ("--threads", 1, "--drift", 10000, "--tuning-logs", "logs", "--json")


@pytest.fixture(autouse=True)
def _restore_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", os.environ.get("TVM_NUM_THREADS", "1"))  # tune sets it for its process


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "tune needs either a --model or --shapes: give one of the two."),
        (["--model", "a", "--shapes", "b"], "tune needs either a --model or --shapes: give one of the two."),
        (["--shapes", "gpt-9", "--tuning-logs", "logs"],
         "There is no shape 'gpt-9'. Known shapes: tinyllama-1.1b, llama-0.1b, llama-0.5b, qwen2.5-0.5b, llama-3.2-1b, "
         "llama-3.2-3b, llama-2-7b, llama-3-8b, qwen2.5-1.5b, a72-count."),
        (["--shapes", "a72-count", "--operators", "softmax", "--tuning-logs", "logs"],
         "--operators softmax: no kernel of that name is there to tune. There are attention, linear_int8, "
         "linear_int8_residual."),
        (["--shapes", "a72-count", "--operators", "attention", "rope", "--tokens", "1", "--tuning-logs", "logs"],
         "--operators rope: no kernel of that name is there to tune. There are attention, linear_int8, "
         "linear_int8_residual."),
        (["--shapes", "a72-count", "--threads", "100000", "--tuning-logs", "logs"],
         f"--threads is 100000, but this process has {CPUS} processors: threads that wait for each other say nothing "
         f"about kernels. Give at most {CPUS}."),
        (["--target", "aarch64" if NATIVE.arch == "x86_64" else "x86-64", "--shapes", "a72-count"],
         f"{'aarch64' if NATIVE.arch == 'x86_64' else 'x86-64'}: candidates are timed on this machine, and it cannot "
         f"run them: it is built for {'aarch64 (aarch64)' if NATIVE.arch == 'x86_64' else 'x86_64 (x86-64)'}, but this "
         f"machine is {NATIVE.arch}. Let a board time them: --ssh pi@host, or --rpc HOST:PORT."),
        ([*SHAPE, "--rpc", "pi:9190", "--ssh", "pi"],
         "--rpc takes boards from a tracker that runs already, --ssh starts one: give one of the two."),
        ([*SHAPE, "--boards", "2"], "--boards belongs to --rpc or --ssh, which is missing. Give one of them."),
        (["--shapes", "a72-count", "--patience", "1m"],
         "--patience belongs to --rpc or --ssh, which is missing. Give one of them."),
        *[([*SHAPE, "--rpc", "pi:9190", option, "22"],
           f"{option} belongs to --ssh: with --rpc, boards come by themselves. Leave it out.")
          for option in ("--port", "--identity")],
        ([*SHAPE, "--cost", "model", "--patience", "1m"],
         "--cost model asks no device and no clock: leave out --patience."),
        ([*SHAPE, "--rpc", ""],
         "--rpc: '' is not HOST:PORT. Give the address of `python -m tvm.exec.rpc_tracker`."),
        ([*SHAPE, "--rpc", "pi"],
         "--rpc: 'pi' is not HOST:PORT. Give the address of `python -m tvm.exec.rpc_tracker`."),
        ([*SHAPE, "--rpc", "127.0.0.1:1"],
         "--rpc 127.0.0.1:1: no tracker of TVM answers there: Connection refused. Start one with `python -m "
         "tvm.exec.rpc_tracker --host ADDRESS --port PORT`."),
        ([*SHAPE, "--ssh=-pi"],
         "'-pi' is no device. Write user@host or user@host:folder, such as pi@raspberrypi:story."),
        (["--target", "jetson-nano", "--shapes", "a72-count", "--threads", "2", "--ssh", "nano"],
         "jetson-nano: runs on a GPU, and threads are the CPU's. Leave --threads out."),
        ([*SHAPE, "--rpc", "pi:9190", "--activations", "float16"],
         "rpi4: --activations float16 is for targets with a GPU, and this one computes on its CPU. Leave --activations "
         "out, or give int8 or exact."),
    ],
    ids=str,
)  # fmt: skip
def test_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_tells_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tuned(tuner: Tuner, task: Task) -> Outcome:
        if tuned.calls:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        tuned.calls = 1  # type: ignore[attr-defined]
        return Outcome(task, 2, 2, 0, 9, None)

    tuned.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Tuner, "tune", tuned)
    monkeypatch.setattr(LocalMeasurer, "start", lambda self: None)
    options = ["--shapes", "a72-count", "--tokens", "1", "--threads", "1", "--tuning-logs", str(tmp_path), "--json"]
    assert main(["tune", *options]) == 130
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (len(said["shapes"]), said["shapes"][0]["new"], said["complete"], err) == (1, 2, False, "interrupted\n")


def test_a_summary_says_what_gained_and_what_did_not(capsys: pytest.CaptureFixture[str]) -> None:
    space = Space.around({"rows": 2}, {"rows": (1, 2, 4)}, schedule="mill.stone", workload={"m": 1, "n": 8})
    task = Task(Request("quern.linear_int8", (), (), {}, NATIVE), space)
    spread = {"median": 1.25, "min": 0.875, "max": 1.5}
    seconds = {"median": 2e-6, "min": 1e-6, "max": 4e-6}
    better = choice(
        workload={"m": 1, "n": 8}, default={"rows": 2}, best={"rows": 4}, knobs={"rows": 4}, speedup=spread,
        seconds=seconds, default_seconds={**seconds, "median": 2.5e-6}, gb_s=5.0, read_gb_s=30.0,
    )  # fmt: skip
    outcomes = [
        Outcome(task, 2, 1, 0, 2, better),
        Outcome(task, 2, 1, 1, 2, {**better, "gained": False}),
        Outcome(task, 2, 1, 0, 2, {**better, "gained": False, "speedup": {**spread, "median": 0.9}}),
        Outcome(task, 0, 0, 0, 2, None, "other processes take 50% of the processors"),
        Outcome(task, 1, 1, 0, 2, None),
    ]
    options = argparse.Namespace(json=False, cost="time", trials=2)
    report.summary(options, NATIVE, 2, Path("tune.jsonl"), outcomes, 6)
    both = "2.5 us 4.0 of 30.0 GB/s -> 2 us 5.0 of 30.0 GB/s"
    assert capsys.readouterr().out.splitlines() == [
        "mill.stone m=1 n=8", f"  2 of 2 tried: {both}, 1.25x (0.88 to 1.50): rows=4",
        "mill.stone m=1 n=8",
        f"  2 of 2 tried, 1 failed: {both}, 1.25x (0.88 to 1.50): default stays: the gain is inside the noise",
        "mill.stone m=1 n=8", f"  2 of 2 tried: {both}, 0.90x (0.88 to 1.50): default stays: nothing was faster",
        "mill.stone m=1 n=8", "  0 of 2 tried: nothing measured",
        "mill.stone m=1 n=8", "  1 of 2 tried: not decided yet",
        "1 shape was left: other processes take 50% of the processors. Nothing of such batches is recorded. Mend that "
        "and run the same command again: it goes on where it stopped.",
        "tune.jsonl: 1 of 6 shapes gained, 2 keep the default because nothing beat it beyond the noise, 3 are not "
        "complete. 2 threads, 4 new trials.",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 200])
def test_a_narrow_terminal_cuts_names_and_no_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = partial(Console, file=shown, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(report, "Console", lambda **_: terminal())
    with report.bar(quiet=False) as progress:
        assert progress is not None
        progress.add_task("1/11 linear_int8.avx512_vnni m=128 n=11264 k=2048 bits=4 group=128 kind=zero", total=528)
        progress.refresh()
        line = shown.getvalue().rstrip().splitlines()[-1]
    assert "  0/528 0:00:00 1/11 linear_int8.avx512_vnni m=1" in line
    assert ("kind=zero" in line) == (width == 200)


@pytest.mark.parametrize("text", ["ssh", "0", "65536", "\u0664"])
@pytest.mark.parametrize("verb", [["tune"], ["deploy", "story", "pi"], ["bench", "story"]], ids="-".join)
def test_a_port_that_is_none(verb: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb, "--port", text])
    help_ = f"For what there is: python -m compiler {verb[0]} --help"
    assert capsys.readouterr().err == f"error: argument --port: {text!r} is not a port: 1 to 65535. {help_}\n"


@pytest.mark.parametrize("text", ["0s", "soon", "5d", "-3"])
def test_a_time_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", f"--time-budget={text}"])
    assert f"{text} is not a time like 90s, 10m or 2h" in capsys.readouterr().err


def test_emulated_times_stay_out_of_the_repository(tmp_path: Path) -> None:
    setting, pi = Setting(1, "0xd08", "", "", EMULATED), targets.load("rpi4")
    with pytest.raises(BoardError) as caught:
        tune._admit(Database(DEFAULT_FOLDER / "rpi4" / FILE_NAME, "rpi4"), pi, setting)
    assert str(caught.value) == (
        "This board is emulated: its times say nothing about a real one and never go into tuning_logs/. Give them a "
        "folder of their own with --tuning-logs DIR."
    )
    tune._admit(Database(tmp_path / "rpi4" / FILE_NAME, "rpi4"), pi, setting)
    tune._admit(Database(DEFAULT_FOLDER / "rpi4" / FILE_NAME, "rpi4"), pi, replace(setting, measured=RPC))


def test_a_gpu_of_another_size_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs, agx = Database(tmp_path / "jetson-orin" / FILE_NAME, "jetson-orin"), Device("Orin", 16)
    setting = Setting(1, "0xd42", "", "", RPC, agx)
    for orin in (targets.load("jetson-orin"), targets.load("jetson-orin"), targets.load("jetson-orin").sized(16)):
        tune._admit(logs, orin, setting)
    assert capsys.readouterr().err == (
        "This GPU is Orin with 16 multiprocessors; defaults are for 8. --multiprocessors 16, here and in `build`, is "
        "for this one.\n"
    )


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Any], list[int]]:
    """A tuning of the demo model, killed after some records, then run to its end.

    The database, its bytes after the kill, the second run's JSON, and worker processes that outlived the kill.
    """
    place = tmp_path_factory.mktemp("tune")
    path = place / "logs" / NATIVE.tuning_key / FILE_NAME
    process = subprocess.Popen(
        commands.command(*TUNE, *QUICK), cwd=place, env=commands.environment({}), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + PATIENCE_S
    while not path.is_file() or path.read_bytes().count(b"\n") < TRIALS + 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    path.write_bytes(whole + whole.splitlines()[0][:200])  # the worst moment: half a line
    done = commands.run(*TUNE, *QUICK, cwd=place)
    assert done.returncode == 0, done.stderr
    alive = [int(child) for child in children if Path(f"/proc/{child}").exists()]
    return path, whole, json.loads(done.stdout), alive


@pytest.mark.slow
def test_a_killed_tuning_goes_on(resumed: tuple[Path, bytes, dict[str, Any], list[int]]) -> None:
    path, whole, said, alive = resumed
    assert alive == []
    assert path.read_bytes().startswith(whole)
    records = Database.read(path.parents[1], NATIVE.tuning_key).records
    points = [json.dumps([r["workload"], r["knobs"]]) for r in records if r["kind"] != "choice"]
    kept = sum(json.loads(line)["kind"] != "choice" for line in whole.splitlines())
    assert len(points) == len(set(points)) == 5 * TRIALS  # qkv, o, gate and up, down, head
    assert sum(shape["new"] for shape in said["shapes"]) == 5 * TRIALS - kept
    assert (said["complete"], said["threads"], said["key"]) == (True, 1, NATIVE.tuning_key)
    assert all(shape["choice"]["rounds"] == 16 for shape in said["shapes"])


@pytest.fixture(scope="module")
def linears() -> list[Any]:
    """Spaces of the demo model's linear layers in decoding."""
    from compiler.passes.lower_to_schedules import requests
    from schedules.kernel import space

    request = pipeline.Request(Path(), NATIVE, chunks=(16,), context=64)
    graph = pipeline.import_checkpoint(DEMO, request).model.graph
    asked = requests(pipeline.fuse(graph.module(), request), NATIVE)["decode"]
    return [space(r) for r in asked if r.op.startswith("quern.linear_int8")]


@pytest.mark.slow
def test_build_uses_a_record_and_says_so(tmp_path: Path, linears: list[Any]) -> None:
    asked = linears[0]
    knobs = next(p for p in asked.points() if p["row_blocks"] != asked.default["row_blocks"])
    about = {"schedule": asked.schedule, "workload": dict(asked.workload), "default": dict(asked.default)}
    database(tmp_path / "logs", choice(**about, knobs=knobs), key=NATIVE.tuning_key)
    (name,) = Database.read(tmp_path / "logs", NATIVE.tuning_key).names

    def build(out: str, logs: str) -> manifest.Manifest:
        request = pipeline.Request(tmp_path / out, NATIVE, context=64, chunks=(16,), tuning_logs=tmp_path / logs)
        return pipeline.build(DEMO, request, Reporter(quiet=True))

    tuned, again, plain = build("tuned", "logs"), build("again", "logs"), build("plain", "none")
    assert len(name) == ID_DIGITS
    ((kernel, used),) = tuned.tuning.items()
    assert used == manifest.TunedKernel(name, knobs)
    workload = asked.workload
    assert f"_m1_n{workload['n']}_k{workload['k']}_" in kernel
    assert f"tuning:       1 kernels by records {name}\n" in info.as_text(tmp_path / "tuned")
    assert plain.tuning == {}
    assert "tuning:       none: every kernel has its schedule's default knobs\n" in info.as_text(tmp_path / "plain")
    assert tuned == again and tuned.files["model.so"] != plain.files["model.so"]
    assert tuned.files["weights.bin"] == plain.files["weights.bin"]


def test_build_refuses_a_damaged_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = database(tmp_path, choice(), key=NATIVE.tuning_key)
    path.write_bytes(path.read_bytes() + b"{}\n")
    assert main(["build", "--out", str(tmp_path / "story"), "--quiet", "--tuning-logs", str(tmp_path)]) == 2
    said = (
        f"error: {path}:2: not a tuning record of {NATIVE.tuning_key}: kind is None, but must be one of trial, "
        f"failure, choice. Remove the line, or restore the file; 'compiler tune' measures again what is missing.\n"
    )
    assert capsys.readouterr() == ("", said)
    assert sorted(p.name for p in tmp_path.iterdir()) == [NATIVE.tuning_key]

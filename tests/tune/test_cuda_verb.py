"""`tune --target cuda-sm90` on the machine with the GPU, which a mock driver is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import targets
from compiler.tune.measure import EMULATED
from compiler.tune.records import FILE_NAME
from tests.end_to_end import commands
from tests.end_to_end.places import DEMO
from tests.mock import cuda as mock

SM90 = targets.load("cuda-sm90")
TUNE = ("compiler", "tune", "--target", "cuda-sm90", "--model", DEMO, "--tokens", 1, "--operators", "attention",
        "--trials", 2, "--drift", 10**12, "--json")  # fmt: skip


@pytest.mark.slow
def test_the_verb_tunes_this_machines_gpu_and_goes_on(tmp_path: Path) -> None:
    """Without emulated kernels: what counts here is who is started, recorded, and not measured twice."""
    environment = mock.environment(arch=90)
    into = ("--tuning-logs", tmp_path / "logs")
    first = commands.run(*TUNE, *into, env=environment)
    assert (first.returncode, first.stderr) == (0, "")
    path = tmp_path / "logs" / SM90.tuning_key / FILE_NAME
    before = path.read_bytes()
    records = [json.loads(line) for line in before.splitlines()]
    assert [r["kind"] for r in records].count("trial") == 2 and records[-1]["kind"] == "choice"
    assert {(r["measured"], r["threads"]) for r in records} == {(EMULATED, 1)}
    assert all(r["gpu"] == {"name": "Mock GPU", "multiprocessors": 2} for r in records)
    (shape,) = json.loads(first.stdout)["shapes"]
    assert (shape["schedule"], shape["new"]) == ("cuda.attention_decode.sm_90", 2)
    path.write_bytes(before + before.splitlines()[0][:200])  # the worst moment to be killed: half a line
    again = commands.run(*TUNE, *into, env=environment)
    assert (again.returncode, json.loads(again.stdout)["shapes"][0]["new"], path.read_bytes()) == (0, 0, before)


def test_the_verb_needs_a_gpu_here(tmp_path: Path) -> None:
    into = ("--tuning-logs", tmp_path / "logs")
    done = commands.run(*TUNE, *into, env={"QUERN_LIBCUDA": f"{tmp_path}/none.so"})
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        f"cuda-sm90: candidates are timed on this machine, and it cannot run them: it runs on an NVIDIA GPU, but the "
        f"NVIDIA driver is not there: {tmp_path}/none.so: cannot open shared object file: No such file or directory. "
        f"Let a board time them: --ssh pi@host, or --rpc HOST:PORT."
    )

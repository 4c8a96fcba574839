"""`tune --ssh` against a real OpenSSH server on loopback: what it starts, a kill in the middle, and what it ends."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler.__main__ import main
from compiler.codegen.link import cache_dir
from compiler.tune import ssh
from compiler.tune.records import FILE_NAME, Database, frozen
from tests.deploy import sshd
from tests.end_to_end import commands
from tests.mock import cuda as mock
from tests.waiting import wait_for

pytestmark = pytest.mark.slow
NATIVE = targets.load("native")
TRIALS = 2
PATIENCE_S = 240  # of an emulated board: the kernels are compiled first
MEMORY = 256 << 20  # a quarter of it is for copies of the arguments
MODEL = Path(__file__).parents[1] / "models" / "stories260k"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    if sshd.SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("there is no sshd: apt-get install openssh-server")
    with sshd.serve(tmp_path_factory.mktemp("sshd")) as found:
        yield found


def serving(folder: Path) -> list[int]:
    """Processes of the rpc-server whose code lies in that folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = b"rpc-server" in (process / "cmdline").read_bytes() and (process / "cwd").resolve()
        except OSError:
            continue
        if here and here.is_relative_to(folder):
            found.append(int(process.name))
    return found


def test_a_board_over_ssh(server: sshd.Server, tmp_path: Path) -> None:
    there = tmp_path / "board"
    tune: list[Any] = ["compiler", "tune", "--target", "native", "--model", MODEL, "--bits", "4", "--tokens", "1"]
    tune += ["--operators", "linear_int8", "--trials", TRIALS, "--threads", "1", "--drift", "10000", "--json"]
    tune += ["--tuning-logs", "logs", "--ssh", f"127.0.0.1:{there}", "--port", server.port, "--identity", server.key]
    own = {"HOME": str(server.home), "QUERN_CACHE": str(cache_dir())}
    environment = {k: v for k, v in commands.environment(own).items() if k != "SSH_AUTH_SOCK"}
    database = tmp_path / "logs" / NATIVE.tuning_key / FILE_NAME
    with subprocess.Popen(commands.command(*tune), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as killed:
        wait_for(lambda: database.is_file() and database.read_bytes().count(b"\n") > TRIALS)
        assert serving(there)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
    wait_for(lambda: serving(there) == [])  # the connection was its life
    before = database.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    done = subprocess.run(
        commands.command(*tune), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert serving(there) == []
    said = json.loads(done.stdout)
    records = Database.read(tmp_path / "logs", NATIVE.tuning_key).records
    points = [(json.dumps(r["workload"]), frozen(r["knobs"])) for r in records if r["kind"] != "choice"]
    assert said["complete"] and len(points) == len(set(points)) == 5 * TRIALS
    assert database.read_bytes().startswith(whole)
    assert {r["measured"] for r in records} == {"rpc"}
    (release,) = there.iterdir()
    assert sorted(p.name for p in release.iterdir()) == ["libtvm_ffi.so", "libtvm_runtime.so", "runtime.zip"]


@pytest.mark.board
def test_a_jetson_over_ssh(board: Any, tmp_path: Path) -> None:
    """arm64 code of server and candidates under qemu, a mock driver of a board. Killed after a trial, it goes on."""
    if sshd.SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("there is no sshd: apt-get install openssh-server")
    programs, there, logs = tmp_path / "programs", tmp_path / "board", tmp_path / "logs"
    programs.mkdir()
    for name, line in (("python3", f'exec {board.root() / "python3"} "$@"'), ("uname", "echo aarch64")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    driver = mock.environment(triple="aarch64-linux-gnu.2.27", arch=87, driver=11040, integrated=1, memory=MEMORY)
    (tmp_path / "sshd").mkdir()
    database = logs / "jetson-orin" / FILE_NAME
    tune: list[Any] = ["compiler", "tune", "--target", "jetson-orin", "--model", MODEL, "--bits", "4", "--tokens", "1"]
    tune += ["--operators", "attention", "--trials", "1", "--drift", 10**12, "--json", "--tuning-logs", logs]
    with sshd.serve(tmp_path / "sshd", programs, driver) as server:
        tune += ["--ssh", f"127.0.0.1:{there}", "--port", server.port, "--identity", server.key]
        own = {"HOME": str(server.home), "QUERN_CACHE": str(cache_dir())}
        how: dict[str, Any] = {"cwd": tmp_path}
        how["env"] = {k: v for k, v in commands.environment(own).items() if k != "SSH_AUTH_SOCK"}
        with subprocess.Popen(commands.command(*tune), stdout=subprocess.DEVNULL, **how) as killed:
            wait_for(lambda: database.is_file() and database.read_bytes().count(b"\n") > 0, PATIENCE_S)
            assert serving(there)
            killed.kill()
            assert killed.wait() == -signal.SIGKILL
        wait_for(lambda: serving(there) == [])
        before = database.read_bytes()
        done = subprocess.run(commands.command(*tune), capture_output=True, text=True, check=False, **how)
    assert (done.returncode, done.stderr, serving(there)) == (0, "", [])
    records = [json.loads(line) for line in database.read_bytes().splitlines()]
    assert [r["kind"] for r in records] == ["trial", "choice"]
    assert database.read_bytes().startswith(before.splitlines(keepends=True)[0])
    assert records[0]["rotated_bytes"] <= MEMORY // 4
    assert json.loads(done.stdout)["shapes"][0]["new"] == 0
    assert {r["measured"] for r in records} == {"emulated"}
    assert [r["gpu"] for r in records] == [{"name": "Mock GPU", "multiprocessors": 2}] * 2


@pytest.mark.parametrize("new", [False, True])
def test_a_board_whose_python3_is_too_old(new: bool, tmp_path: Path) -> None:
    """JetPack 4: python3 is 3.6, and python3.8 may have been installed."""
    for name, line in (("python3", "exit 1"), *([("python3.8", 'echo "$0 $@"')] if new else [])):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    command = ["/bin/sh", "-c", ssh._START, "sh", str(tmp_path), "9190", "nano"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    if new:
        asked = f"{tmp_path}/python3.8 -m runtime rpc-server --tracker 127.0.0.1:9190 --key nano --port 0 --tunnel"
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == asked
    else:
        said = "it has no Python 3.8 or later. On Ubuntu and JetPack: sudo apt install python3.8\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_a_board_that_cannot_be_reached(
    server: sshd.Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = ["tune", "--target", "native", "--model", str(MODEL), "--bits", "4", "--tuning-logs", str(tmp_path)]
    own = ["--tokens", "1", "--ssh", "127.0.0.1", "--port", "1", "--identity", str(server.key)]
    assert main([*tune, *own]) == 2
    assert capsys.readouterr().err == (
        "error: 127.0.0.1: cannot be reached: Connection refused. Is it on, does its SSH "
        "server run, are --port and the name right?\n"
    )
    assert list(tmp_path.glob("*/*")) == []

"""`bench BUNDLE --host`: forecast beside measurement, over SSH, from a Raspberry Pi 4 that is emulated here."""
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import sshd
from tests.end_to_end.bundles import Bundles
from tests.end_to_end.places import DEMO, REPO

pytestmark = [pytest.mark.slow, pytest.mark.board]
WORK = ("--prompt-tokens", "16", "--decode-tokens", "2", "--context", "8", "--rounds", "2")


def programs(board: Any, folder: Path) -> Path:
    """What a shell on the board would find: its Python, and tools that say what the board is."""
    folder.mkdir()
    settings = " ".join(f"{k}={shlex.quote(v)}" for k, v in board.environment().items() if k.startswith("PYTHON"))
    cpuinfo = shlex.quote(str(board.root() / "proc/cpuinfo"))
    scripts = {
        "python3": f'{settings} exec {board.root()}/python3 "$@"',
        "uname": "echo aarch64",
        "cat": f'[ "$1" != /proc/cpuinfo ] || set -- {cpuinfo}; exec /bin/cat "$@"',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def test_forecast_beside_measurement(board: Any, bundles: Bundles, tmp_path: Path) -> None:
    if sshd.SSHD is None:
        pytest.skip("needs an SSH server: apt-get install openssh-server (on Debian or Ubuntu)")
    bundle, home = bundles(DEMO, "rpi4", self_contained=True), tmp_path / "home"
    home.mkdir()
    with sshd.serve(home, programs(board, tmp_path / "programs")) as server:
        command = [sys.executable, "-m", "compiler", "bench", str(bundle), *WORK, "--record", str(tmp_path / "r.jsonl")]
        command += ["--host", f"127.0.0.1:{tmp_path}/there", "--port", str(server.port), "--identity", str(server.key)]
        environment = {**os.environ, "HOME": str(home), "QUERN_CACHE": str(board.root().parent)}
        done = subprocess.run(
            command, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=300
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    assert (record["cost"], record["target"], record["host"]) == ("time", "rpi4", "127.0.0.1")
    assert (record["prompt_tokens"], record["context"], record["decode_tokens"]) == (16, 8, 2)
    for name in ("decode_tok_s", "prefill_tok_s"):
        assert len(record[name]) == 2 and min(record[name]) > 0
        modelled = record["forecast"][name]
        assert 0 < modelled["low"] < modelled["expected"] < modelled["high"]
    assert record["instructions"] < record["prefill_instructions"] < 16 * record["instructions"]
    assert (tmp_path / "there" / "current" / "model.so").read_bytes() == (bundle / "model.so").read_bytes()
    header, *rows = done.stdout.splitlines()
    assert " ".join(header.split()) == "measured min max forecast (a model) low high measured / forecast"
    starts = ("decode after 8 (tokens/s)", "prefill of 16 (tokens/s)", "peak memory (MiB)", "ready after (s; ",
              "measured on 127.0.0.1: ", "counted on an emulated Cortex-A72: ", "forecast at ")  # fmt: skip
    assert [row.startswith(start) for row, start in zip(rows, starts, strict=True)] == [True] * len(starts)

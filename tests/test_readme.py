"""Every command that README.md shows works: make targets exist, the others run in their order in an empty folder."""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCK.findall((REPO / "README.md").read_text()) for line in block.splitlines() if line]


def test_readme_shows_commands() -> None:
    assert "make demo" in COMMANDS
    assert sum(line.startswith("python -m ") for line in COMMANDS) >= 8


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_commands_in_order(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(REPO / "tests")
    np.save(tmp_path / "ids.npy", np.arange(3, 9))
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    for command in COMMANDS:
        first, *rest = shlex.split(command)
        if first != "python":
            continue
        done = subprocess.run(
            [sys.executable, *rest], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert np.load(tmp_path / "logits.npy").shape == (6, 512)

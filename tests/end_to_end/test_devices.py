"""The same text on an emulated Raspberry Pi 4, on any x86-64 with AVX2, and from a runtime copied out alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import device
from runtime.manifest import FILE_NAME, load
from tests.end_to_end import commands
from tests.end_to_end.bundles import Bundles
from tests.end_to_end.places import DEMO, REPO

pytestmark = pytest.mark.slow
# int8 paths differ in the order of their sums, which may move a logit by 0.14 (test_chunks.py): every token here
# is ahead of the next best by 0.22 or more.
PROMPT = "Lily and Tom"
STEPS = 48
GENERATE = ("--prompt", PROMPT, "--max-new-tokens", str(STEPS), "--ignore-eos", "--json")
STORY = " were playing in the park. They saw a big, red ball."
NOTHING_ELSE = """
import importlib.util, sys
found = [name for name in ("compiler", "schedules", "targets", "tests") if importlib.util.find_spec(name)]
raise SystemExit(f"importable: {found}" if found else 0)
"""


def generated(text: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(text)
    assert (len(said["tokens"]), said["stop_reason"], said["prompt_tokens"]) == (STEPS, "length", 4)
    assert said["text"].startswith(STORY)
    return said


@pytest.fixture(scope="module")
def here(demo: Path) -> dict[str, Any]:
    """What this machine's bundle says, with as many threads as the runtime takes by itself."""
    done = commands.run("runtime", "generate", demo, *GENERATE)
    assert (done.returncode, done.stderr) == (0, "")
    return generated(done.stdout)


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A folder with a copy of runtime/ and nothing else."""
    shutil.copytree(REPO / "runtime", tmp_path / "device" / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "device"


@pytest.mark.board
def test_the_board_tells_the_same_story(board: Any, bundles: Bundles, alone: Path, here: dict[str, Any]) -> None:
    shutil.copytree(bundles(DEMO, "rpi4"), alone / "bundle")
    board.run(["-c", NOTHING_ELSE], pythonpath=[alone], cwd=alone)
    done = board.run(["-m", "runtime", "generate", "bundle", *GENERATE], pythonpath=[alone], cwd=alone)
    there = generated(done.stdout)
    assert done.stderr == ""
    assert (there["text"], there["tokens"]) == (here["text"], here["tokens"])
    written = [path.name for path in alone.rglob("*") if path.name != "__pycache__" and path.suffix != ".pyc"]
    assert sorted(written) == sorted(["bundle", "runtime", *names(alone / "bundle"), *names(REPO / "runtime")])


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "__pycache__"]


def test_the_bundle_of_any_x86_64_tells_the_same_story(bundles: Bundles, here: dict[str, Any]) -> None:
    bundle = bundles(DEMO, "x86-64")
    if refusals := device.refusals(load(bundle / FILE_NAME).target):
        pytest.skip(f"this CPU lacks what x86-64 needs: {'; '.join(refusals)}")
    done = commands.run("runtime", "generate", bundle, *GENERATE)
    assert (done.returncode, done.stderr) == (0, "")
    there = generated(done.stdout)
    assert (there["text"], there["tokens"]) == (here["text"], here["tokens"])


def test_threads_change_nothing(demo: Path, here: dict[str, Any]) -> None:
    done = commands.run("runtime", "generate", demo, *GENERATE, "--threads", 3)
    assert (done.returncode, done.stderr) == (0, "")
    there = generated(done.stdout)
    assert there["threads"] == 3
    assert (there["text"], there["tokens"]) == (here["text"], here["tokens"])


def test_the_runtime_needs_nothing_else_of_the_repository(demo: Path, alone: Path, here: dict[str, Any]) -> None:
    """-S leaves out the import hook of an editable install, which would bring the repository back."""
    shutil.copytree(demo, alone / "bundle")
    site = Path(np.__file__).parents[1]
    python = [sys.executable, "-S"]
    settings = commands.environment({"PYTHONPATH": f"{alone}:{site}"})
    subprocess.run([*python, "-c", NOTHING_ELSE], cwd=alone, env=settings, check=True)
    command = [*python, "-m", "runtime", "generate", "bundle", *GENERATE]
    done = subprocess.run(command, cwd=alone, env=settings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    there = generated(done.stdout)
    assert (there["text"], there["tokens"]) == (here["text"], here["tokens"])

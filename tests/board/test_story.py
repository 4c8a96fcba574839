"""The whole way: checkpoint, bundle for a Raspberry Pi 4, and the deployed runtime telling a story on the board."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.board, pytest.mark.slow]
REPO = Path(__file__).parents[2]
PROMPT = "Once upon a time"
# What the storyteller of tests/models says first, greedily, as the x86-64 build of this compiler gave it too.
STORY = ", there was a little girl named Lily. She loved to play with her toys"


def test_a_bundle_for_rpi4_tells_its_story(board: Any, tmp_path: Path) -> None:
    bundle, device = tmp_path / "bundle", tmp_path / "device"
    build = [sys.executable, "-m", "compiler", "build", "--target", "rpi4", "--out", str(bundle), "--quiet"]
    subprocess.run(build, cwd=REPO, check=True)
    device.mkdir()
    (device / "runtime").symlink_to(REPO / "runtime")  # the runtime is deployed alone
    told = ["-m", "runtime", "generate", bundle, "--prompt", PROMPT, "--max-new-tokens", "20"]
    said = board.run(told, pythonpath=[device], cwd=device)
    assert said.stdout.startswith(STORY)
    assert "20 tokens" in said.stderr + said.stdout

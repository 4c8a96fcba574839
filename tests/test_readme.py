"""Every command that README.md and three pages of docs/ show works: make targets exist, the others run in their order.

A block that begins with ```sh is run; one without needs a device that is not here. A command with & at its end is a
server, which stays until the end, on another port.
"""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
# In the order in which they are read.
PAGES = ("README.md", "docs/serving.md", "docs/deploying.md", "docs/measuring.md")
COMMANDS = [line for page in PAGES for block in BLOCK.findall((REPO / page).read_text()) for line in block.splitlines()]
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


def test_readme_shows_commands() -> None:
    assert "make demo" in COMMANDS
    assert sum(line.startswith("python -m ") for line in COMMANDS) >= 8


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, "docs/boards.md"])
def test_links_lead_somewhere(page: str) -> None:
    for file, heading in LINK.findall((REPO / page).read_text()):
        found = (REPO / page).parent / file if file else REPO / page
        assert found.is_file(), file
        titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], heading


@contextmanager
def _serving(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The port of a server that has begun to listen."""
    with subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r":([0-9]+)/v1$", line.rstrip())
        assert found, line
        try:
            yield found[1]
        finally:
            process.terminate()


@pytest.mark.slow
def test_commands_in_order(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(REPO / "tests")
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    ports: dict[str, str] = {}  # of servers, as shown: as taken
    with ExitStack() as servers:
        for command in COMMANDS:
            words = [sys.executable if word == "python" else word for word in shlex.split(command)]
            if words[-1] == "&":
                shown = words[words.index("--port") + 1]
                words[words.index(shown)] = "0"
                ports[shown] = servers.enter_context(_serving(words[:-1], tmp_path, environment))
                continue
            if words[0] not in (sys.executable, "curl"):
                continue
            for shown, taken in ports.items():
                words = [word.replace(f":{shown}/", f":{taken}/") for word in words]
            done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            assert words[0] != "curl" or '"finish_reason": "' in done.stdout, done.stdout
    assert np.load(tmp_path / "logits.npy").shape == (6, 512)

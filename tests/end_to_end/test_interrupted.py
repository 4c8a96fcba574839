"""A build that is killed or interrupted while it writes: no bundle, no half of one, and the older one unharmed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from compiler import pipeline
from compiler.codegen.bundle import PARTIAL
from compiler.progress import Reporter
from runtime import manifest
from targets import load
from tests.end_to_end import commands
from tests.end_to_end.bundles import Bundles
from tests.end_to_end.places import STORIES260K

pytestmark = pytest.mark.slow
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE_S = 120


@dataclass(frozen=True)
class Interrupted:
    """A build that got a signal while its files were being written. `before` and `after`: listings of its folder."""

    place: Path
    code: int
    out: str
    err: str
    before: dict[str, bytes]
    after: dict[str, bytes]


@pytest.fixture(scope="module")
def older(bundles: Bundles) -> Path:
    """The bundle that is there already."""
    return bundles(STORIES260K, activations="exact", context=64)


@pytest.fixture(scope="module")
def interrupted(older: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[signal.Signals, Interrupted]:
    """One build for each signal, all at the same time."""
    builds = {}
    for number in SIGNALS:
        place = tmp_path_factory.mktemp(number.name)
        shutil.copytree(older, place / "bundle")
        (place / "temporary").mkdir()
        before = commands.listing(place)
        process = subprocess.Popen(
            commands.command("compiler", "build", "--model", STORIES260K, "--activations", "exact", "--out", "bundle"),
            cwd=place,
            env=commands.environment({"TMPDIR": str(place / "temporary")}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        builds[number] = (place, before, process)
    with ThreadPoolExecutor(len(builds)) as pool:  # each waits for its own moment
        ends = {number: pool.submit(interrupt, number, *build) for number, build in builds.items()}
    return {number: end.result() for number, end in ends.items()}


def interrupt(
    number: signal.Signals, place: Path, before: dict[str, bytes], process: subprocess.Popen[str]
) -> Interrupted:
    """Wait for the hidden folder, send the signal, wait for the end of the process and of what it had started."""
    deadline = time.monotonic() + PATIENCE_S
    while not list(place.glob(f".bundle{PARTIAL}*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the build never began to write"
        time.sleep(0.005)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the linker, too
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    while running(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return Interrupted(place, process.returncode, out, err, before, commands.listing(place))


def running(group: int) -> bool:
    """Whether a process of the group is alive: a linker whose parent was killed works on for a moment."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "code", "last"), [(signal.SIGTERM, 143, None), (signal.SIGINT, 130, "interrupted")])
def test_a_polite_end_leaves_everything_as_it_was(
    interrupted: dict[signal.Signals, Interrupted], number: signal.Signals, code: int, last: str | None
) -> None:
    build = interrupted[number]
    assert (build.code, build.out) == (code, "")
    assert "Traceback" not in build.err
    assert last is None or build.err.splitlines()[-1] == last
    assert build.after == build.before


def test_a_killed_build_leaves_no_bundle_and_the_next_one_cleans_up(
    interrupted: dict[signal.Signals, Interrupted],
) -> None:
    build = interrupted[signal.SIGKILL]
    assert (build.code, build.out) == (-signal.SIGKILL, "")
    left = {name: content for name, content in build.after.items() if name not in build.before}
    assert {name: build.after[name] for name in build.before} == build.before
    assert left, "the build was killed before it wrote, or after: the test shows nothing"
    ours = [name for name in left if name.startswith(f".bundle{PARTIAL}")]
    assert all(name in ours or name.startswith("temporary/") for name in left)
    assert not any(name.endswith(manifest.FILE_NAME) for name in left)
    (partial,) = build.place.glob(f".bundle{PARTIAL}*")
    done = commands.run("runtime", "info", partial)
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        f"{partial}: has no manifest.json, so it is not a bundle. Point at a directory that quern built."
    )
    request = pipeline.Request(
        out=build.place / "bundle", target=load("native"), activations="exact", context=80
    )
    pipeline.build(STORIES260K, request, Reporter(quiet=True))
    assert sorted(path.name for path in build.place.iterdir()) == ["bundle", "temporary"]
    assert manifest.load(build.place / "bundle" / manifest.FILE_NAME).model.context == 80

"""Bundles that carry all a device lacks: the same text from a bare Python, here and on an emulated Raspberry Pi 4."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler.codegen import bundle, carried, elf
from compiler.tune import tracker
from compiler.tune.boards import BoardMeasurer
from compiler.tune.measure import Setting
from runtime import device, manifest, run
from runtime.manifest import FILE_NAME
from schedules.kernel import space
from tests.end_to_end import commands
from tests.end_to_end.bundles import Bundles
from tests.end_to_end.places import DEMO
from tests.tune.test_records import linear

pytestmark = pytest.mark.slow
PROMPT = "Lily and Tom"  # every greedy token is ahead of the next best by 0.22 or more: see test_devices.py
LONG = "Once upon a time there was a little girl named Lily. She had a big red ball and a small dog. " * 2
RPI4 = targets.load("rpi4")
OPTIONS = ("--max-new-tokens", "48", "--ignore-eos", "--json")
BARE = """
import importlib.util
found = [name for name in ("numpy", "tokenizers", "tvm", "tvm_ffi", "runtime") if importlib.util.find_spec(name)]
raise SystemExit(f"importable: {found}" if found else 0)
"""


def pythons() -> dict[str, str]:
    """Version -> program, of all Pythons from 3.9 on that this machine has; the tests' own is always one."""
    found = {"{}.{}".format(*sys.version_info): sys.executable}
    places = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted(Path.home().glob(".pyenv/versions/*/bin"))
    for place in places:
        for program in place.glob("python3.*") if "shims" not in place.parts else ():
            named = re.fullmatch(r"python3\.([0-9]+)", program.name)
            if named and int(named[1]) >= 9:
                found.setdefault(program.name.removeprefix("python"), str(program))
    return found


PYTHONS = pythons()


@pytest.fixture(scope="module")
def here(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle of this machine with all it needs."""
    folder = tmp_path_factory.mktemp("self-contained") / "bundle"
    shutil.copytree(demo, folder)
    sealed = manifest.load(folder / FILE_NAME)
    carried.write(carried.fetch(device.arch()), folder)
    manifest.dump(replace(sealed, files=bundle.digests(folder, {})), folder / FILE_NAME)
    return folder


def bare(folder: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """-S: without installed packages. From another folder, with next to no environment."""
    command = [python, "-S", str(folder / "run"), *arguments]
    settings = {"PATH": os.defpath, "LANG": "C.UTF-8"}
    return subprocess.run(command, cwd="/", env=settings, capture_output=True, text=True, timeout=120, check=False)


def said(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return {key: found[key] for key in ("text", "tokens", "prompt_tokens", "stop_reason")}


def expected(demo: Path, prompt: str) -> dict[str, Any]:
    """With numpy, and with the compiler's own version of tokenizers."""
    return said(commands.run("runtime", "generate", demo, "--prompt", prompt, *OPTIONS))


@pytest.mark.parametrize("version", sorted(PYTHONS))
def test_one_bundle_serves_every_python(here: Path, demo: Path, version: str) -> None:
    before = commands.listing(here)
    subprocess.run([PYTHONS[version], "-S", "-E", "-c", BARE], cwd="/", check=True)
    for prompt in (PROMPT, LONG):
        assert said(bare(here, prompt, *OPTIONS, python=PYTHONS[version])) == expected(demo, prompt)
    assert commands.listing(here) == before  # nothing is written into a bundle


def test_sampling_without_numpy(here: Path, demo: Path) -> None:
    settings = ("--temperature", "0.8", "--top-k", "50", "--top-p", "0.95", "--seed", "3")
    penalty = ("--repetition-penalty", "1.1")
    there = said(bare(here, PROMPT, *OPTIONS, *settings, *penalty))
    assert there == said(commands.run("runtime", "generate", demo, "--prompt", PROMPT, *OPTIONS, *settings, *penalty))


@pytest.mark.parametrize(("version", "old", "minor"), [((3, 8), False, 9), ((3, 6), False, 9), ((3, 6), True, 8)])
def test_a_python_that_is_too_old_says_so(
    version: tuple[int, int], old: bool, minor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A bundle that carries the tokenizer for 3.8 needs no 3.9."""
    if old:
        (tmp_path / carried.OLD_PYTHON["aarch64"].name).touch()
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run"))
    monkeypatch.setattr(sys, "version_info", (*version, 9, "final", 0))
    assert run.main([PROMPT]) == 2
    assert capsys.readouterr().err == (
        f"error: this is Python 3.{version[1]}, but 3.{minor} or later is needed. Start it with another one, like "
        f"python3.{minor}; on Ubuntu and JetPack: sudo apt install python3.{minor}.\n"
    )


def test_info_and_usage(here: Path) -> None:
    done = bare(here, "--info")
    assert done.returncode == 0 and "runs here:    yes\n" in done.stdout
    done = bare(here)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"usage: python3 {here / 'run'} PROMPT")
    done = bare(here, "-starts with a dash", "--max-new-tokens", "1")
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["runtime.zip", "libtvm_ffi.so", "libtvm_runtime.so", "tokenizers.abi3.so", "run"])
def test_a_damaged_part_is_not_loaded(here: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(here, tmp_path / "bundle"))
    content = bytearray((folder / name).read_bytes())
    content[-30 if name == "run" else len(content) // 2] ^= 1
    if name == "run":
        content = bytearray((folder / name).read_bytes().replace(b"Needs Python", b"Wants Python"))
    (folder / name).write_bytes(content)
    done = bare(folder, PROMPT)
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        f"{folder / name}: is damaged: its SHA-256 is not the manifest's. Copy the bundle again or rebuild it."
    )


@pytest.mark.board
def test_a_board_with_python_alone_tells_the_same_story(
    board: Any, bundles: Bundles, demo: Path, tmp_path: Path
) -> None:
    built = bundles(DEMO, "rpi4", self_contained=True)
    shutil.copytree(built, tmp_path / "bundle")
    before = commands.listing(tmp_path)
    nothing = {"PYTHONPATH": ""}
    board.run(["-c", BARE], env=nothing, cwd=tmp_path)
    done = board.run(["bundle/run", PROMPT, *OPTIONS], env=nothing, cwd=tmp_path)
    assert said(done) == expected(demo, PROMPT)
    assert commands.listing(tmp_path) == before
    sealed, names = manifest.load(built / FILE_NAME), [part.name for part in carried.PARTS["aarch64"]]
    assert sum(sealed.files[name].bytes for name in (*names, carried.RUN, carried.RUNTIME)) < carried.MAX_BYTES
    for name in names:
        found = elf.read(built / name)
        newer = [v for v in found.versions if v.startswith("GLIBC_") and number(v) > number(sealed.target.glibc)]
        assert (found.arch, newer) == ("aarch64", [])


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.removeprefix("GLIBC_").split("."))


@pytest.mark.board
def test_a_bundle_offers_its_board_for_tuning(board: Any, bundles: Bundles, tmp_path: Path) -> None:
    """Nothing there but Python: no numpy, and of TVM what the bundle carries."""
    built, log, request = bundles(DEMO, "rpi4", self_contained=True), tmp_path / "log", linear(64, RPI4)
    asked, before = space(request), commands.listing(built)
    assert asked is not None
    candidates = [{**asked.default, "unroll": 32}, {**asked.default, "prefetch_bytes": 512}]
    with tracker.running() as address, log.open("w") as file:
        options = ["--tracker", str(address), "--key", "bare", "--port", "0"]
        server = board.start_bundle(built, "rpc-server", options, stderr=file)
        measurer = BoardMeasurer(
            Setting(1, "unknown", "", "", "rpc"), most_drift=1000, tracker=str(address), key="bare", target=RPI4,
            folder=tmp_path, least_bytes=1 << 16,
        )  # fmt: skip
        try:
            measurer.ready(60)
            batch = measurer.measure(request, asked, candidates, rounds=2)
        finally:
            measurer.close()
            server.kill()
            server.wait()
    assert [timing.failure for timing in batch.timings] == [None, None], log.read_text()
    assert all(len(timing.speedups) == 2 for timing in batch.timings)
    assert measurer.setting.measured == "emulated" and commands.listing(built) == before

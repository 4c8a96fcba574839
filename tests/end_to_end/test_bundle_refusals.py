"""Bundles that must not run: damaged in any file, built for another machine, or asked for more than they hold."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from runtime import device, manifest
from runtime.__main__ import main
from tests.end_to_end import commands
from tests.end_to_end.bundles import Bundles
from tests.end_to_end.places import DEMO

OTHER_ARCH = {"x86_64": "aarch64", "aarch64": "x86-64"}
AGAIN = "Copy the bundle again or rebuild it."
REBUILD = "Rebuild the bundle for this machine's target (python -m compiler targets)."
DIGEST = "is damaged: its SHA-256 is not the manifest's. " + AGAIN
DAMAGE = {
    "manifest.json": f"is damaged or was changed by hand: its sha256 is not that of its other keys. {AGAIN}",
    "model.so": DIGEST,
    "tokenizer.json": DIGEST,
    "tokenizer_config.json": DIGEST,
    "weights.bin": "is damaged: the SHA-256 of bytes 0 to LAST is not the manifest's. " + AGAIN,
}


@pytest.fixture
def bundle(demo: Path, tmp_path: Path) -> Path:
    """A copy, to damage."""
    return Path(shutil.copytree(demo, tmp_path / "bundle"))


def refusal(capsys: pytest.CaptureFixture[str], bundle: Path) -> str:
    """What `generate` says of it, here and as a process of its own."""
    before = commands.listing(bundle)
    said = commands.message(main(["generate", str(bundle), "--prompt", "Once"]), *capsys.readouterr())
    done = commands.run("runtime", "generate", bundle, "--prompt", "Once", cwd=bundle.parent)
    assert commands.message(done.returncode, done.stdout, done.stderr) == said
    assert commands.listing(bundle) == before
    return said


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_every_file_of_a_bundle_is_listed_above(demo: Path) -> None:
    assert {path.name for path in demo.iterdir()} == set(DAMAGE)


@pytest.mark.parametrize("name", DAMAGE)
def test_one_flipped_bit(name: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = bundle / name
    size = file.stat().st_size
    digit = re.search(rb'"nbytes": [0-9]+([0-9])', file.read_bytes())  # the manifest stays JSON
    flip(file, digit.start(1) if digit else size // 2)
    assert refusal(capsys, bundle) == f"{file}: {DAMAGE[name].replace('LAST', str(size - 1))}"


@pytest.mark.parametrize("name", DAMAGE)
def test_every_place_of_a_file_counts(name: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first byte, the last, and some between: refused, whatever the words."""
    file = bundle / name
    size = file.stat().st_size
    for at in (0, size // 7, size // 3, size - 2, size - 1):
        flip(file, at)
        assert main(["generate", str(bundle), "--prompt", "Once"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {file}: ")
        flip(file, at)
    assert main(["info", str(bundle)]) == 0


def test_a_cpu_that_lacks_something(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = manifest.load(bundle / manifest.FILE_NAME)
    target = dataclasses.replace(made.target, features=(*made.target.features, "avx9_quern"))
    manifest.dump(dataclasses.replace(made, target=target), bundle / manifest.FILE_NAME)
    assert refusal(capsys, bundle) == (
        f"{bundle}: cannot run here: it is built for native ({target.cpu}), but this CPU lacks avx9_quern. {REBUILD}"
    )


def test_another_architecture(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    name = {"aarch64": "rpi4", "x86-64": "x86-64"}[OTHER_ARCH[device.arch()]]
    bundle = bundles(DEMO, name)
    arch = manifest.load(bundle / manifest.FILE_NAME).target.arch
    assert refusal(capsys, bundle) == (
        f"{bundle}: cannot run here: it is built for {arch} ({name}), but this machine is {device.arch()}. {REBUILD}"
    )


def test_a_prompt_longer_than_the_context(demo: Path) -> None:
    done = commands.run("runtime", "generate", demo, "--prompt", "word " * 600)
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        "603 tokens do not fit into the context of 512, which holds 0 already. Use a shorter prompt, or rebuild the "
        "bundle with a longer context (python -m compiler build --context)."
    )


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, tmp_path) == (
        f"{tmp_path}: has no manifest.json, so it is not a bundle. Point at a directory that quern built."
    )

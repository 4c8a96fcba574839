"""What is said where an emulated board cannot be had."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compiler.__main__ import main
from compiler.board import root
from runtime import manifest
from tests.runtime import tiny


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, made while there are programs."""
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    tiny.build(folder)
    return folder


@pytest.fixture
def programs(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder with programs; qemu and dpkg are in it."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("qemu-aarch64", "dpkg"):
        program(folder / name, "exit 0")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("QUERN_CACHE", str(tmp_path / "cache"))
    root.root.cache_clear()
    yield folder
    root.root.cache_clear()


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_bundle_for_another_machine_than_the_board(
    programs: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.edit_manifest(toy, target={**vars(manifest.load(toy / manifest.FILE_NAME).target), "arch": "x86_64"})
    assert main(["run", str(toy), "One day", "--board", "qemu"]) == 2
    assert capsys.readouterr().err == (
        f"error: {toy}: is built for x86_64 (native), but the board is arm64. Build it with --target rpi4; here, "
        "`python -m runtime generate` runs what is built for this machine.\n"
    )


def test_without_apt(programs: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.edit_manifest(toy, target={**vars(manifest.load(toy / manifest.FILE_NAME).target), "arch": "aarch64"})
    assert main(["run", str(toy), "One day", "--board", "qemu"]) == 2
    assert capsys.readouterr().err == (
        "error: --board qemu needs apt-get, which this machine lacks: it fetches Debian's arm64 packages with apt-get, "
        "so it needs Debian or Ubuntu here.\n"
    )


def test_without_qemu(programs: Path) -> None:
    (programs / "qemu-aarch64").unlink()
    program(programs / "apt-get", "exit 0")
    with pytest.raises(root.BoardError) as caught:
        root.root()
    assert str(caught.value) == (
        "--board qemu needs qemu-aarch64, which this machine lacks: apt-get install qemu-user."
    )


def test_without_a_network(programs: Path, tmp_path: Path) -> None:
    program(programs / "apt-get", "echo 'Err:1 there'; echo 'E: Failed to fetch it' >&2; exit 100")
    told: list[str] = []
    with pytest.raises(root.BoardError) as caught:
        root.root(told.append)
    assert str(caught.value) == (
        "--board qemu: apt's lists for arm64 cannot be had: E: Failed to fetch it. Check the network, and that apt's "
        "sources have arm64 packages: Debian's do, Ubuntu's are on another server."
    )
    assert told == [told[0]] and told[0].startswith(f"Making an arm64 root in {tmp_path / 'cache'}/arm64-root-")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["arm64-root.lock"]  # nothing half-made

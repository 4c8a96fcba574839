"""The list of targets."""

from __future__ import annotations

import pytest

import targets
from compiler.__main__ import main
from targets import TargetError


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Line by target."""
    assert main(["targets"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    header, *lines = out.splitlines()
    assert header.split() == ["target", "cpu", "glibc", "tier", "what", "it", "is"]
    return {line.split()[0]: line for line in lines}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # else the table wraps


def test_a_line_a_target_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS")
    assert list(listed(capsys)) == targets.names()


def test_a_narrow_terminal_cuts_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["targets"]) == 0
    words = capsys.readouterr().out.split()
    assert all(name in words for name in targets.names())


def test_every_target_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert list(found) == targets.names()
    for name, line in found.items():
        target = targets.load(name)
        assert target.mcpu in line
        assert f">= {target.glibc}" in line
        assert line.rstrip().endswith(target.description)
    assert found["rpi4"].split(None, 5)[5].startswith("runs it")


def test_where_native_is_none_the_others_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = targets.load

    def elsewhere(name: str) -> targets.Target:
        if name == "native":
            raise TargetError("This machine is Darwin on arm64. Name a target with --target instead.")
        return load(name)

    monkeypatch.setattr(targets, "load", elsewhere)
    found = listed(capsys)
    assert list(found) == targets.names()
    assert found["native"].split(None, 1)[1].rstrip() == (
        "This machine is Darwin on arm64. Name a target with --target instead."
    )


def test_a_broken_target_file_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    load = targets.load

    def broken(name: str) -> targets.Target:
        if name == "rpi4":
            raise TargetError("rpi4.toml: not a TOML file: line 1.")
        return load(name)

    monkeypatch.setattr(targets, "load", broken)
    assert main(["targets"]) == 2
    assert capsys.readouterr() == ("", "error: rpi4.toml: not a TOML file: line 1.\n")

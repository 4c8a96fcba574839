"""The checks for a machine with a GPU, run against the mock: what holds there must be what a card is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compiler.__main__ import main
from compiler.cli import card
from compiler.errors import UserError
from tests.mock import cuda as mock


def test_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QUERN_LIBCUDA", str(tmp_path / "none.so"))
    assert main(["card"]) == 2
    assert capsys.readouterr().err == (
        f"error: card: the NVIDIA driver is not there: {tmp_path}/none.so: cannot open shared object file: No such "
        f"file or directory. Run it on a machine with an NVIDIA GPU and its driver.\n"
    )


def test_wrong_logits_and_failed_commands_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in mock.environment(arch=90).items():
        monkeypatch.setenv(name, value)
    wrong = {"check": "numerics", "target": "cuda-sm90", "good": False}
    monkeypatch.setattr(card, "_numerics", lambda *_: wrong)
    monkeypatch.setattr(card, "_speed", lambda shape, target: {"check": "speed", "shape": shape, "target": target})
    assert main(["card", "--targets", "cuda-sm90", "--activations", "exact", "--shapes", "llama-2-7b"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{**found[0], **wrong}, found[1]["shape"]] == [found[0], "llama-2-7b"]
    monkeypatch.undo()
    with pytest.raises(UserError) as caught:
        card._python("compiler", "build", "--target", "rpi6", "--out", "nowhere")
    said = "compiler build --target rpi6 --out nowhere failed:\nThere is no target 'rpi6'."
    assert str(caught.value).startswith(said)

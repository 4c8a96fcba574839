"""Perplexity through the measured process against the same sum over the runtime's own logits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from compiler.__main__ import main
from compiler.errors import UserError
from compiler.measure import perplexity, speed
from compiler.measure.peers import openvino
from compiler.measure.process import Process
from runtime.bundle import open_bundle
from runtime.session import Session
from tests.measure.conftest import CONTEXT
from tests.measure.test_compare import Scripted

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3


def test_second_halves_are_scored(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    bundle = open_bundle(stories)
    parts = perplexity.windows(bundle, tmp_path / "text.txt")
    assert {len(part) for part in parts} == {CONTEXT} and len(parts) >= 2
    with Process(sys.executable, "compiler.measure.bundle_process", [str(stories), "1"]) as process:
        found = perplexity.perplexity(process, parts)
    session, losses = Session(bundle, threads=1), []
    for part in parts:
        session.reset()
        rows = np.concatenate([block.copy() for block in session.logits(part)]).astype(np.float64)
        chances = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        losses += [-np.log(chances[j, part[j + 1]]) for j in range(CONTEXT // 2, CONTEXT - 1)]
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert found < 20  # a story model on a story; 512 for one that knows nothing
    assert perplexity.windows(bundle, tmp_path / "text.txt", 2) == parts[:2]


def test_an_engine_that_cannot_say_is_left_empty(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = Scripted("quern", [], [], []), openvino.OpenVino.__new__(openvino.OpenVino)
    ours.perplexity = lambda windows: 7.5  # type: ignore[method-assign]
    assert perplexity.beside([ours, theirs], [[1, 2]]) == [7.5, None]
    assert capsys.readouterr() == ("", "no perplexity of openvino: runs random weights here, which have none\n")


def test_a_text_that_is_not_there_is_told_before_anything_is_measured(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "open_side", None)
    assert main(["bench", str(stories), "--context", "4", "--perplexity", str(tmp_path / "gone.txt")]) == 2
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'gone.txt'}: No such file or directory.\n")


def test_a_text_too_short(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once")
    bundle = open_bundle(stories)
    with pytest.raises(UserError) as caught:
        perplexity.windows(bundle, tmp_path / "text.txt")
    assert str(caught.value) == (
        f"{tmp_path / 'text.txt'}: has 2 tokens, but perplexity needs at least 2 windows of 32. Take a longer text."
    )
    (tmp_path / "text.txt").write_bytes(b"Once\xff")
    with pytest.raises(UserError) as caught:
        perplexity.windows(bundle, tmp_path / "text.txt")
    assert str(caught.value) == f"{tmp_path / 'text.txt'}: is no UTF-8 text: invalid start byte at byte 4."

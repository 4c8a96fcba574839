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
    wrong = {"check": "numerics", "target": "cuda-sm90", "good": False, "worst": 0.5, "bound": 0.3}
    speed = {"decode_tok_s": 210.0, "decode_plain_tok_s": 150.5, "decode_bandwidth_ratio": 0.8, "prefill_tok_s": 9000.0}
    monkeypatch.setattr(card, "_numerics", lambda *_: wrong)
    speed |= {"prefill_tflop_s": 99.5}
    monkeypatch.setattr(card, "_speed", lambda shape, _: {"check": "speed", "shape": shape, **speed})
    assert main(["card", "--targets", "cuda-sm90", "--activations", "exact", "--shapes", "llama-2-7b"]) == 1
    out, err = capsys.readouterr()
    _, *found = [json.loads(line) for line in out.splitlines()]
    assert [{**found[0], **wrong}, found[1]["shape"]] == [found[0], "llama-2-7b"]
    assert "failed after 0 s: worst logit off by 0.5 (bound 0.3)\n" in err
    assert (
        "passed after 0 s: decode 210.0 tokens/s (80% of a copy; 150.5 without graphs), prefill 9000 tokens/s, 99.5 "
        "TFLOP/s\n1 passed, 1 failed, 0 skipped\n"
    ) in err
    monkeypatch.undo()
    with pytest.raises(UserError) as caught:
        card._python("compiler", "build", "--target", "rpi6", "--out", "nowhere")
    said = "compiler build --target rpi6 --out nowhere failed: There is no target 'rpi6'."
    assert str(caught.value).startswith(said)

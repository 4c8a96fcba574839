"""What bench refuses before it compiles anything; tests/measure/ has the measuring."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compiler.__main__ import main


@pytest.fixture(autouse=True)
def _restore_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", os.environ.get("TVM_NUM_THREADS", "1"))  # bench sets it for its process


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "bench measures either a BUNDLE or a --shape: give one of the two."),
        (["story", "--shape", "a72-count"], "bench measures either a BUNDLE or a --shape: give one of the two."),
        (["story", "--rounds", "0"], "--rounds is 0, but it must be at least 1."),
        (["story", "--prompt-tokens", "-3"], "--prompt-tokens is -3, but it must be at least 1."),
        (["story", "--decode-tokens", "0"], "--decode-tokens is 0, but it must be at least 1."),
        (["story", "--threads", "0"], "--threads is 0, but it must be at least 1."),
        (["--shape", "a72-count", "--group-size", "0"], "--group-size is 0, but it must be at least 1."),
        (["--shape", "gpt-9"], "There is no shape 'gpt-9'. Known shapes: tinyllama-1.1b, llama-3.2-1b, llama-3.2-3b, "
         "llama-2-7b, qwen2.5-1.5b, a72-count."),
        (["--shape", "a72-count", "--target", "rpi"],
         "There is no target 'rpi'. Did you mean 'rpi5'? Known targets: native, aarch64, riscv64-v, rpi3, rpi4, rpi5, "
         "snapdragon-8gen2, x86-64."),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_a_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "story")]) == 2
    said = f"error: {tmp_path / 'story'}: there is no such directory. Point at a directory that quern built.\n"
    assert capsys.readouterr() == ("", said)

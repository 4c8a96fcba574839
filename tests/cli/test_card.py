"""The checks for a machine with a GPU, run against the mock: what holds there must be what a card is asked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.__main__ import main
from compiler.errors import UserError
from compiler.measure import commands
from compiler.measure.gpu_checks import Checks, compared
from tests.mock import cuda as mock
from tests.waiting import wait_for


def test_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QUERN_LIBCUDA", str(tmp_path / "none.so"))
    assert main(["card"]) == 2
    assert capsys.readouterr().err == (
        f"error: card: the NVIDIA driver is not there: {tmp_path}/none.so: cannot open shared object file: No such "
        f"file or directory. Run it on a machine with an NVIDIA GPU and its driver.\n"
    )


SPEED = {
    "decode_tok_s": 210.0, "decode_plain_tok_s": 150.5, "decode_bandwidth_ratio": 0.8, "prefill_tok_s": 9000.0,
    "prefill_tflop_s": 99.5, "code": "cubin",
}  # fmt: skip
NUMERICS = {"worst": 0.5, "bound": 0.3, "not_finite": 0}


def asked(monkeypatch: pytest.MonkeyPatch, numerics: Any, *options: str) -> int:
    for name, value in mock.environment(arch=90).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Checks, "numerics", numerics)
    monkeypatch.setattr(Checks, "speed", lambda *_: SPEED)
    return main(["card", "--targets", "cuda-sm90", "--activations", "exact", "--shapes", "llama-2-7b", *options])


def test_wrong_logits_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(monkeypatch, lambda *_: {**NUMERICS, "good": False}) == 1
    out, err = capsys.readouterr()
    about, wrong, speed = (json.loads(line) for line in out.splitlines())
    assert {"device", "driver", "commit", "time", "cpu"} <= about.keys()
    assert (wrong["good"], wrong["target"], wrong["asked"]) == (False, "cuda-sm90", "exact")
    assert speed["shape"] == "llama-2-7b"
    assert "failed after 0 s: worst logit off by 0.5 (bound 0.3)\n" in err
    assert (
        "passed after 0 s: decode 210.0 tokens/s (80% of a copy; 150.5 without graphs), prefill 9000 tokens/s, 99.5 "
        "TFLOP/s, code: cubin\n1 passed, 1 failed, 0 skipped\n"
    ) in err


def test_a_mistake_of_ours_fails_its_part_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken(*_: object) -> Any:
        raise KeyError("spans")

    assert asked(monkeypatch, mistaken) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[1])["error"] == "KeyError: 'spans'"
    assert err.endswith("\n1 passed, 1 failed, 0 skipped\n")


def test_what_does_not_begin_in_time_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, lambda *_: NUMERICS, "--time-budget", "80s") == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["why"] for line in out.splitlines()[1:]] == ["the time budget is used up"] * 2
    assert err.endswith("\n0 passed, 0 failed, 2 skipped\n")


def test_a_shape_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "--shapes", "llama-2-7b:33"]) == 2
    assert capsys.readouterr().err == (
        "error: The shape 'llama-2-7b:33' would have 33 layers, but llama-2-7b has 1 to 32.\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--activations", "exact,int9"],
         "--activations int9: there are no such numerics. Take some of exact, int8, float16, default."),
        (["--targets", ","],
         "--targets names none, and card checks one after the other. Give some, or leave it out."),
    ],
)  # fmt: skip
def test_options_that_name_nothing(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "--model", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/gone: is not there, and card compares the logits of a model. Give --model a checkpoint "
        f"folder; a clone of quern brings one.\n"
    )


def test_logits_are_compared_row_by_row() -> None:
    want = np.eye(4, 8, dtype=np.float32)
    good = compared(want + np.float32(1e-4), want, 5e-4)
    assert (good["good"], good["wrong_rows"], good["first_wrong_row"]) == (True, 0, None)
    broken = want.copy()
    broken[2, 5], broken[3, 0] = 2, np.nan
    found = compared(broken, want, 5e-4)
    assert (found["good"], found["worst"], found["not_finite"]) == (False, 2.0, 1)
    assert (found["wrong_rows"], found["first_wrong_row"], found["same_tokens"]) == (2, 2, 0.5)


def test_commands_end_with_all_that_they_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child holds the pipes: who only ended the command itself would wait for that one."""
    (tmp_path / "sleeper.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    looks: list[float] = []
    monkeypatch.setattr(commands, "LOOK_S", 0.2)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        commands.run("sleeper", "now", limit_s=2, look=looks.append)
    assert str(caught.value) == "sleeper now was ended after 2 s: it hangs, or the machine is too slow."
    assert time.monotonic() - started < 30 and len(looks) > 2
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    wait_for(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_command_that_fails_has_the_last_word() -> None:
    with pytest.raises(UserError) as caught:
        commands.run("compiler", "build", "--target", "rpi6", "--out", "nowhere", limit_s=60, look=lambda _: None)
    said = "compiler build --target rpi6 --out nowhere failed: There is no target 'rpi6'."
    assert str(caught.value).startswith(said)

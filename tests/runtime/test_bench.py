"""The runtime's stopwatch: what it runs, what it says, what it refuses."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime import bench, device
from runtime.errors import InputError
from runtime.session import Session
from tests.runtime import tiny

REPO = Path(__file__).parents[2]


def test_taking_tokens_is_prefill_without_logits(session: Session) -> None:
    ids = list(range(2, 25))
    session.take(ids)
    assert session.position == len(ids)
    assert np.array_equal(session.step(3), tiny.reference([*ids, 3])[-1])


def test_the_past_of_decoded_tokens_is_filled_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = Session.prefill

    def prefill(self: Session, ids: list[int]) -> object:
        taken.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(Session, "prefill", prefill)
    timed = bench.Timed(session)
    assert timed.decode(8, 4) > 0 and timed.decode(8, 4) > 0
    assert taken == [8]
    assert timed.prefill(16) > 0 and timed.decode(16, 2) > 0  # the prompt's tokens are the ones before
    assert taken == [8, 16]
    assert np.array_equal(session.step(3), tiny.reference([*timed.ids[:18], 3])[-1])


def test_defaults_fit_into_any_context() -> None:
    none = (None, None, None, None)
    assert bench.fitting(4096, *none) == (512, 128, 16, 5)
    assert bench.fitting(48, *none) == (48, 32, 16, 5)
    assert bench.fitting(2, *none) == (2, 1, 1, 5)
    assert bench.fitting(48, 64, None, None, 1) == (64, 32, 16, 1)  # what was asked for is measured or refused


def test_what_is_measured(session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = {"model": "Raspberry Pi 4 Model B Rev 1.4\0", "heat": "48312\n"}
    texts |= {f"cpu0/cpufreq/{name}": f"{khz}\n" for name, khz in
              (("scaling_cur_freq", 600000), ("cpuinfo_max_freq", 1800000))}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(bench, "MODEL", tmp_path / "model")
    monkeypatch.setattr(bench, "HEAT", tmp_path / "heat")
    monkeypatch.setattr(device, "CPU_FOLDER", tmp_path)
    said: list[str] = []
    found = bench.measure(session, 16, 4, 2, rounds=3, load_s=0.25, told=said.append)
    assert len(found["prefill_tok_s"]) == len(found["decode_tok_s"]) == len(said) == 3
    assert min(*found["prefill_tok_s"], *found["decode_tok_s"]) > 0
    named = {name: found[name] for name in ("device", "mhz", "celsius", "max_mhz", "load_s", "prompt_tokens", "rounds")}
    assert named == {"device": "Raspberry Pi 4 Model B Rev 1.4", "mhz": [600, 600], "celsius": [48, 48],
                     "max_mhz": 1800, "load_s": 0.25, "prompt_tokens": 16, "rounds": 3}  # fmt: skip


@pytest.mark.parametrize(
    "work", [(0, 4, 2, 1), (49, 4, 2, 1), (4, 47, 2, 1), (4, -1, 2, 1), (4, 4, 0, 1), (4, 4, 2, 0)]
)
def test_what_does_not_fit_is_refused(session: Session, work: tuple[int, int, int, int]) -> None:
    prompt, context, steps, rounds = work
    with pytest.raises(InputError) as caught:
        bench.measure(session, prompt, context, steps, rounds, 0, lambda _: None)
    assert str(caught.value) == (
        f"a prompt of {prompt} tokens and {steps} tokens after {context}, {rounds} times: all but the tokens before "
        f"must be at least 1, and this bundle has a context of 48."
    )


def test_the_verb_answers(tmp_path: Path) -> None:
    tiny.build(tmp_path / "toy")
    command = [sys.executable, "-m", "runtime", "bench", str(tmp_path / "toy"), "--prompt-tokens", "16"]
    command += ["--context", "4", "--decode-tokens", "2", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json"], cwd=REPO, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["threads"], found["context"], done.stderr) == (1, 4, "")
    assert found["load_s"] > 0 and found["peak_rss_mib"] > 0
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    first, last = done.stdout.splitlines()
    assert first.startswith("round 1: prefill ") and last.startswith(f"{found['device']}: prefill of 16 tokens ")

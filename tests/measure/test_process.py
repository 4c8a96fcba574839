"""The measured process: what it has loaded, what it says when it refuses, and what is said when it dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compiler.errors import UserError
from compiler.measure.bundle_process import nll
from compiler.measure.process import REPO, Process
from tests.runtime import tiny
from tests.waiting import wait_for


def test_it_has_the_runtime_and_nothing_else_of_quern() -> None:
    """As on the device: neither TVM's Python nor the compiler's stages may warm a cache or start a thread there."""
    code = (
        "import sys, compiler.measure.bundle_process\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'tvm', 'tvm_ffi', 'torch', 'schedules', 'rich'}))\n"
        "print(sorted(m for m in sys.modules if m.startswith('compiler.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['compiler.measure', 'compiler.measure.bundle_process']"]


def test_a_refusal_of_the_runtime_comes_back_as_it_is(tmp_path: Path) -> None:
    with Process(sys.executable, "compiler.measure.bundle_process", [str(tmp_path / "story"), "1"]) as process:
        with pytest.raises(UserError) as caught:
            process.ask("about")
    assert str(caught.value) == (
        f"{tmp_path / 'story'}: there is no such directory. Point at a directory that quern built."
    )


def test_a_process_that_dies_says_its_last_words(tmp_path: Path) -> None:
    tiny.build(tmp_path / "toy")
    with Process(sys.executable, "compiler.measure.bundle_process", [str(tmp_path / "toy"), "many"]) as process:
        with pytest.raises(UserError) as caught:
            process.ask("about")
    first, *_, last = str(caught.value).splitlines()
    assert first == "The measured process bundle_process ended with status 1."
    assert last == "ValueError: invalid literal for int() with base 10: 'many'"


def test_it_is_stopped_between_answers_and_gone_with_whoever_asks(tmp_path: Path) -> None:
    """Even when that is killed: a stopped process sees no end of its stdin."""
    tiny.build(tmp_path / "toy")
    code = (
        "import os, signal, sys\n"
        "from compiler.measure.process import Process\n"
        "with Process(sys.executable, 'compiler.measure.bundle_process', [sys.argv[1], '1']) as process:\n"
        "    assert process.ask('about') == process.ask('about')\n"
        "    print(process._child.pid, flush=True)\n"
        "    sys.stdin.readline()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "toy")], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as asking:  # fmt: skip
        assert asking.stdin is not None and asking.stdout is not None
        status = Path(f"/proc/{int(asking.stdout.readline())}/status")
        wait_for(lambda: "State:\tT (stopped)" in status.read_text())
        asking.stdin.write("\n")
        asking.stdin.close()
        # Who adopts it may leave it a zombie.
        wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text())


def test_log_likelihood_by_hand() -> None:
    """Logits log 1, log 3: probabilities 1/4 and 3/4."""
    logits = np.log(np.array([[1, 3], [1, 3]], np.float32))
    assert nll(logits, [0, 1]) == pytest.approx(np.log(4) + np.log(4 / 3), rel=1e-6)
    assert nll(logits + 100, [0, 1]) == pytest.approx(np.log(4) + np.log(4 / 3), rel=1e-5)  # float32's rounding of 100

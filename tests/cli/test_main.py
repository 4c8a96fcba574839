"""The command line as a whole: its verbs, its exit codes, and that a verb costs nothing until it is asked for."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compiler.__main__ import INTERRUPTED, main, verbs
from compiler.cli import targets as a_verb
from compiler.errors import UnsupportedError
from runtime.errors import BundleError
from targets import TargetError
from tests.waiting import wait_for

REPO = Path(__file__).parents[2]
VERBS = sorted(path.stem for path in (REPO / "compiler" / "cli").glob("*.py") if path.stem != "__init__")


def exits(*arguments: str) -> int | str | None:
    """Exit code of a run that argparse ends."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return caught.value.code


def test_every_file_is_a_verb_with_a_summary() -> None:
    assert sorted(verbs()) == VERBS
    assert {"build", "bench", "targets"} <= set(VERBS)
    for summary in verbs().values():
        assert summary.endswith(".")
        assert summary[0].isupper()


def test_help_lists_every_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert exits("--help") == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert [[verb, summary] for verb, summary in verbs().items()] == [
        line for line in lines if line[:1] and line[0] in VERBS
    ]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert exits(verb, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m compiler {verb} ")
    assert verbs()[verb] in said


@pytest.mark.parametrize(
    ("arguments", "said", "verb"),
    [
        ([], "the following arguments are required: VERB", ""),
        (["grind"], f"argument VERB: invalid choice: 'grind' (choose from {', '.join(map(repr, VERBS))})", ""),
        (["--verbose", "targets"], "unrecognized arguments: --verbose", " targets"),
        (["targets", "extra"], "unrecognized arguments: extra", " targets"),
        (["build"], "the following arguments are required: --out", " build"),
        (["build", "--out", "x", "--context", "0"], "argument --context: 0 is not a positive number", " build"),
        (["build", "--out", "x", "--context", "4k"], "argument --context: '4k' is not a whole number", " build"),
    ],
    ids=str,
)
def test_a_command_that_is_none(
    arguments: list[str], said: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits(*arguments) == 2
    help_ = f"For what there is: python -m compiler{verb} --help"
    assert capsys.readouterr() == ("", f"error: {said}. {help_}\n")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (
            UnsupportedError("model.bin: is a tractor.\nTake a model."),
            2,
            "error: model.bin: is a tractor.\nTake a model.\n",
        ),
        (BundleError("story: is no bundle."), 2, "error: story: is no bundle.\n"),
        (TargetError("There is no target 'x'."), 2, "error: There is no target 'x'.\n"),
        (PermissionError(13, "Permission denied", "out"), 2, "error: out: Permission denied.\n"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_a_verb_ends(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: argparse.Namespace) -> int:
        raise raised

    monkeypatch.setattr(a_verb, "run", run)
    assert main(["targets"]) == code
    assert capsys.readouterr() == ("", said)


def test_an_interrupt_while_the_options_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(parser: argparse.ArgumentParser) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(a_verb, "arguments", run)
    assert main(["targets"]) == INTERRUPTED
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("bug", [AssertionError("ours"), KeyError("ours"), OSError("no file")], ids=repr)
def test_our_own_bugs_keep_their_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: argparse.Namespace) -> int:
        raise bug

    monkeypatch.setattr(a_verb, "run", run)
    with pytest.raises(type(bug)) as caught:
        main(["targets"])
    assert caught.value is bug


def test_an_output_that_is_full() -> None:
    command = [sys.executable, "-m", "compiler", "targets"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=REPO, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: cannot write: No space left on device. Make room where the output goes.\n",
    )  # fmt: skip


def test_the_exit_code_of_a_verb_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a_verb, "run", lambda options: 7)
    assert main(["targets"]) == 7


def test_neither_help_nor_listing_loads_the_compiler() -> None:
    code = (
        "import sys; from compiler.__main__ import main; main(['targets']); "
        "print(sorted({'tvm', 'numpy', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compiler", "bench"], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: bench measures either a BUNDLE or a --shape: give one of the two.\n"


def test_kill_cleans_up_as_an_interrupt_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compiler", "bench", "--shape", "a72-count:1"]
    settings = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=settings, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(tmp_path.iterdir()) or process.poll() is not None)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in said, list(tmp_path.iterdir())) == (143, False, [])

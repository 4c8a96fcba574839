"""Run Python programs on the emulated board: a Cortex-A72 with what root.py put there, and this machine's files.

qemu-aarch64 refuses instructions that a Cortex-A72 lacks, so an `Illegal instruction` here is one there. Its speed says
nothing about a real board: no time that was taken here may be recorded as one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import runtime as runtime_package
from compiler.board.root import CPUINFO, BoardError, missing_tools, require_tools, root
from compiler.codegen.link import cache_dir

__all__ = [
    "CPUINFO", "BoardError", "environment", "missing_tools", "require_tools", "root", "run", "runtime_folder", "start",
    "start_bundle", "start_runtime",
]  # fmt: skip
RUN = "run"  # in a self-contained bundle: compiler/codegen/carried.py
SHOWN = 4000  # characters of a program's output in a message


def start(
    args: Sequence[str | Path],
    *,
    pythonpath: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    **streams: Any,
) -> subprocess.Popen[str]:
    """Start the board's Python in the background: start(["-c", "print(1)"], stdout=subprocess.PIPE).

    `pythonpath` comes before the board's own packages; `streams` are Popen's. The process is the program itself:
    terminate it, and the program gets the signal.
    """
    command = [str(root() / "python3"), *map(str, args)]
    return subprocess.Popen(command, env=environment(pythonpath, env), cwd=cwd, text=True, **streams)


def start_runtime(args: Sequence[str | Path], **how: Any) -> subprocess.Popen[str]:
    """Start a verb of the runtime in the background: start_runtime(["info", "story"]). `how`: as for `start`."""
    return start(["-m", "runtime", *args], pythonpath=[runtime_folder()], **how)


def start_bundle(
    bundle: Path, verb: str, options: Sequence[str | Path] = (), prompt: str | None = None, **how: Any
) -> subprocess.Popen[str]:
    """Start a verb of the runtime with a bundle: start_bundle(story, "generate", prompt="One day").

    A self-contained bundle runs what it carries and sees nothing else but Python, as on a bare board.
    """
    if (bundle / RUN).is_file():
        first = f"--{verb}" if prompt is None else prompt
        return start([bundle / RUN, first, *options], env={"PYTHONPATH": ""}, **how)
    given = [] if prompt is None else [f"--prompt={prompt}"]
    return start_runtime([verb, bundle, *given, *options], **how)


def run(
    args: Sequence[str | Path],
    *,
    pythonpath: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 300,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run the board's Python to its end, nothing on its stdin; stdout and stderr are in the result.

    With `check`, a non-zero exit raises BoardError with what the program wrote.
    """
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(args, pythonpath=pythonpath, env=env, cwd=cwd, **streams) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        said = f"{out[-SHOWN:]}{err[-SHOWN:]}"
        raise BoardError(f"On the board, python3 {' '.join(map(str, args))}\nleft with {process.returncode}\n{said}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def environment(pythonpath: Sequence[Path] = (), more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a program on the board sees: next to nothing of this machine's. `python3` on its PATH is the board's."""
    top = root()
    return {
        "HOME": str(top),
        "LANG": "C.UTF-8",
        "PATH": os.pathsep.join([str(top), os.environ.get("PATH", os.defpath)]),
        "PYTHONHOME": str(top / "usr"),
        "PYTHONPATH": os.pathsep.join(map(str, [*pythonpath, top / "site"])),
        **(more or {}),
    }


def runtime_folder() -> Path:
    """A folder with quern's `runtime` in it and nothing else, so that nothing else becomes importable on the board."""
    source = Path(runtime_package.__file__).parent
    folder = cache_dir() / f"board-runtime-{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / source.name
    if not link.is_symlink():
        try:
            link.symlink_to(source)
        except FileExistsError:  # another process made it just now
            assert link.is_symlink()
    return folder

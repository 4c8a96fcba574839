"""Run what was deployed, on the device: a prompt for a person, or a verb of the runtime whose answer is JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import asyncssh

from compiler.deploy.connection import DeployError, Remote

# What is missing to run `current`; $2: a Python package that the verb needs besides.
_READY = """
cd "$1" || exit 1
command -v python3 >/dev/null || { echo python3; exit; }
[ -f current/run ] || python3 -c '
import importlib.util, sys
print(*(m for m in sys.argv[1:] if m and importlib.util.find_spec(m) is None))' runtime "$2"
"""
_GENERATE = """
cd "$1" || exit 1
[ ! -f current/run ] || exec python3 current/run "$2"
exec python3 -m runtime generate current --prompt="$2"
"""
_VERB = """
cd "$1" && verb=$2 && shift 2 || exit 1
[ ! -f current/run ] || exec python3 current/run "--$verb" "$@"
exec python3 -m runtime "$verb" current "$@"
"""


async def generate(remote: Remote, prompt: str) -> int:
    """Let the current version continue a prompt; its output goes to ours. Gives its exit code."""
    await _require(remote, "tokenizers")
    async with remote.process(_GENERATE, remote.folder, prompt, stdin=asyncssh.DEVNULL) as process:
        await asyncio.gather(_pump(process.stdout, sys.stdout), _pump(process.stderr, sys.stderr))
        await process.wait()
        if process.exit_status is None and process.exit_signal is None:
            raise remote.lost(None)
    return process.exit_status if process.exit_status is not None and process.exit_status >= 0 else 1


async def ask(remote: Remote, verb: str, options: Sequence[str]) -> dict[str, Any]:
    """A verb of the runtime that answers with one JSON object. Raises DeployError with what it says instead."""
    await _require(remote, "")
    said = await remote.output(_VERB, remote.folder, verb, *options)
    try:
        found: dict[str, Any] = json.loads(said)
    except ValueError:
        raise DeployError(
            f"{remote.name}: `{verb}` there did not answer with JSON but with {said[:80]!r}. Does its runtime/ belong "
            f"to this version of quern?"
        ) from None
    return found


async def _require(remote: Remote, package: str) -> None:
    """Raise DeployError when the device lacks what a bundle that is not self-contained needs."""
    lacking = (await remote.output(_READY, remote.folder, package)).split()
    if lacking:
        todo = [f"install {name}" for name in lacking if name != "runtime"]
        todo += ["copy quern's folder runtime/ beside `current`"] if "runtime" in lacking else []
        raise DeployError(
            f"{remote.name}: the bundle is in {remote.folder}/current, but cannot run there, for want of "
            f"{', '.join(lacking)}. To run it, {', '.join(todo)}; runtime/README.md says what else it needs."
        )


async def _pump(source: asyncssh.SSHReader[bytes], sink: TextIO) -> None:
    """Pass on what comes, when it comes."""
    while piece := await source.read(4096):
        sink.buffer.write(piece)
        sink.flush()

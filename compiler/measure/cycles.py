"""Cycles that executed instructions take on a core, as LLVM's model of its pipelines has it: llvm-mca.

A model, not a measurement. Every stretch between branches counts with the steady state of its repetition; loads hit the
first-level cache, branches are foreseen, and a stretch never overlaps with the next one. LLVM schedules a Cortex-A72
with its model of the Cortex-A57, and a Cortex-A76 with the one that its own `-mcpu` names.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compiler.errors import UserError
from compiler.measure.emulator import Executed
from targets import Target

TOOLS = ("llvm-mca", "llvm-mc")
ITERATIONS = 100
BRANCH = re.compile(r"(b|bl|br|blr|b\.\w+|cbn?z|tbn?z|ret|svc|brk)\b")
OLDEST = 14  # Debian 12's; its figures for a Cortex-A72 are up to 3 % above those of LLVM 22


@dataclass(frozen=True)
class Stretch:
    """Instructions that ran one after another, all equally often, up to a branch."""

    address: int
    words: tuple[int, ...]
    count: int


@functools.cache
def tools() -> tuple[int, str, str]:
    """(LLVM release, llvm-mca, llvm-mc): the newest release on PATH that has both. Raises UserError if none has."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    releases = {int(m[1]) for f in folders for p in f.glob("llvm-mca-*") if (m := re.search(r"-(\d+)$", p.name))}
    for release in sorted(releases, reverse=True):
        mca, mc = (shutil.which(f"{tool}-{release}") for tool in TOOLS)
        if mca and mc and release >= OLDEST:
            return release, mca, mc
    raise UserError(
        f"Cycles are modelled by llvm-mca, and there is no llvm-mca-N with its llvm-mc-N on PATH (N at least "
        f"{OLDEST}): apt-get install llvm."
    )


def stretches(executed: Sequence[Executed], assembly: dict[int, str]) -> list[Stretch]:
    """Cut at branches, at gaps and where the count changes. `executed` ascends by address."""
    found: list[Stretch] = []
    words: list[int] = []
    for i, now in enumerate(executed):
        words.append(now.word)
        following = executed[i + 1] if i + 1 < len(executed) else None
        straight = following and following.address == now.address + 4 and following.count == now.count
        if not straight or BRANCH.match(assembly[now.word]):
            found.append(Stretch(now.address + 4 - 4 * len(words), tuple(words), now.count))
            words = []
    return found


def disassemble(words: set[int], target: Target) -> dict[int, str]:
    """The text of every instruction word, all of which the target must have."""
    found = decode(words, target)
    assert len(found) == len(words), "an instruction that the target lacks"
    return found


def decode(words: set[int], target: Target) -> dict[int, str]:
    """The text of those instruction words that the target's features have."""
    ordered = sorted(words)
    lines = "\n".join(" ".join(f"{byte:#04x}" for byte in word.to_bytes(4, "little")) for word in ordered)
    _, _, mc = tools()
    command = [mc, "--disassemble", "--show-encoding", f"-triple={target.triple}"]
    said = _run([*command, f"-mattr={','.join(target.features)}"], lines)
    found = {}
    for line in said.splitlines():
        text, mark, encoding = line.partition("// encoding: [")
        if mark:
            word = bytes(int(byte, 16) for byte in encoding.rstrip("]").split(","))
            found[int.from_bytes(word, "little")] = text.strip()
    return found


def of(executed: Mapping[str, Sequence[Executed]], target: Target) -> dict[str, float]:
    """Cycles of what each kernel executed, all repetitions together. For aarch64."""
    assembly = disassemble({e.word for part in executed.values() for e in part}, target)
    parts = [(name, part) for name, run in executed.items() for part in stretches(run, assembly)]
    text = []
    for i, (_, part) in enumerate(parts):
        text += [f"# LLVM-MCA-BEGIN {i}", *(assembly[word] for word in part.words), f"# LLVM-MCA-END {i}"]
    _, mca, _ = tools()
    settings = [f"-mtriple={target.triple}", f"-mcpu={target.mcpu}", f"-mattr={','.join(target.features)}"]
    wanted = ["-instruction-info=0", "-resource-pressure=0", f"-iterations={ITERATIONS}"]
    totals = re.findall(r"^Total Cycles:\s+(\d+)$", _run([mca, *settings, *wanted], "\n".join(text)), re.MULTILINE)
    assert len(totals) == len(parts), f"llvm-mca gave {len(totals)} results for {len(parts)} stretches"
    found = dict.fromkeys(executed, 0.0)
    for (name, part), total in zip(parts, totals, strict=True):
        found[name] += int(total) / ITERATIONS * part.count
    return found


def _run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text + "\n", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nleft with {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout

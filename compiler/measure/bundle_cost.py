"""What one call of a finished bundle costs on a Cortex-A72: its own library runs on the emulated board and is counted.

A plugin of qemu counts every instruction of the process; those that lie in the library are the kernels'. A body that
threads share is known by its address: the library starts it through a variable that holds TVM's launcher, and into
which a counter is put. What Python, the virtual machine and the C library execute is left out of the cost. Counts are
exact; cycles are llvm-mca's, a model.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from compiler.board import qemu
from compiler.codegen import elf
from compiler.errors import UserError
from compiler.measure import cycles, emulator
from compiler.measure.emulator import Executed
from runtime import device
from runtime.bundle import read_manifest
from runtime.manifest import Manifest

HOUR_S = 3600
# Run on the board behind a program that sets `more`: prints that, and where each file was mapped, from where to where.
MAPS = """
import json
maps = {}
for line in open("/proc/self/maps"):
    words = line.split()
    if len(words) == 6 and words[5].startswith("/"):
        low, high = (int(number, 16) for number in words[0].split("-"))
        first, last = maps.get(words[5], (low, high))
        maps[words[5]] = min(first, low), max(last, high)
print()
print(json.dumps({"maps": maps, **more}))
"""
# argv is bundle, tokens, position; `launches` are the bodies that threads would share, by address.
PROGRAM = """
import ctypes, sys
from pathlib import Path
from runtime.bundle import open_bundle
from runtime.session import Session
bundle = open_bundle(Path(sys.argv[1]), verify_weights=False)
tokens, position = int(sys.argv[2]), int(sys.argv[3])
session = Session(bundle, 1)
launches = {}
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
def launch(body, data, tasks):
    launches[body] = launches.get(body, 0) + 1
    return original(body, data, tasks)
try:
    slot = ctypes.c_void_p.in_dll(ctypes.CDLL(str(bundle.library)), "__TVMBackendParallelLaunch")
except ValueError:
    pass  # no kernel has a parallel loop
else:
    original, counter = LAUNCH(slot.value), LAUNCH(launch)
    slot.value = ctypes.cast(counter, ctypes.c_void_p).value
session.position = position
if tokens == 1:
    session.step(0)
else:
    session.take([0] * tokens)
more = {"launches": launches}
"""


@dataclass(frozen=True)
class Cost:
    """One call of `tokens` tokens after `position` others, by one thread.

    shared: what threads would share; own: the kernels' other code. executed: the whole process, by mapped file.
    """

    tokens: int
    position: int
    shared_instructions: int
    own_instructions: int
    shared_cycles: float
    own_cycles: float
    launches: int
    executed: dict[str, list[Executed]]

    @property
    def instructions(self) -> int:
        """What the kernels executed."""
        return self.shared_instructions + self.own_instructions

    @property
    def cycles(self) -> float:
        """What llvm-mca makes of it."""
        return self.shared_cycles + self.own_cycles


def refusal(manifest: Manifest) -> str | None:
    """Why the emulated board does not run this bundle, or None."""
    board = device.listed_features(qemu.CPUINFO, "aarch64")
    if manifest.target.arch == "aarch64" and set(manifest.target.features) <= board:
        return None
    return (
        f"the emulated board is a Raspberry Pi 4, but the bundle is for {manifest.target.name} "
        f"({manifest.target.arch}, {manifest.target.cpu}): build it with --target rpi4"
    )


def require(bundle: Path, manifest: Manifest, tell: Callable[[str], object]) -> None:
    """Raise UserError unless the bundle can be counted here; make the board if there is none, of which `tell` tells."""
    if (why := refusal(manifest)) is not None:
        raise UserError(f"{bundle}: {why}.")
    if targets.load(manifest.target.name).mcpu != "generic":
        cycles.tools()
    qemu.root(tell)


def measure(bundle: Path, tokens: int, position: int) -> Cost:
    """Run one call on the board: the session's plan for so many tokens. `require` comes first. Raises UserError."""
    manifest = read_manifest(bundle)
    target, library = targets.load(manifest.target.name), bundle.resolve() / manifest.library
    arguments: list[str | Path] = [bundle.resolve(), str(tokens), str(position)]
    said, executed = counted(PROGRAM, arguments, pythonpath=[qemu.runtime_folder()])
    launches = {int(address): count for address, count in said["launches"].items()}
    base = said["maps"][str(library)][0]
    parts = _parts(executed[str(library)], [base + at for at in elf.function_starts(library)], set(launches))
    modelled = cycles.of(parts, target) if target.mcpu != "generic" else dict.fromkeys(parts, 0.0)
    counts = {name: sum(e.count for e in part) for name, part in parts.items()}
    return Cost(
        tokens, position, counts["shared"], counts["own"], modelled["shared"], modelled["own"],
        sum(launches.values()), executed,
    )  # fmt: skip


def counted(
    program: str, arguments: Sequence[str | Path], **how: Any
) -> tuple[dict[str, Any], dict[str, list[Executed]]]:
    """Run a program on the board under the counter: what MAPS printed at its end, and what was executed, by file."""
    with tempfile.TemporaryDirectory(prefix="quern-count-") as folder:
        out = Path(folder) / "counts"
        environment = {"QEMU_PLUGIN": f"{emulator.counter()},out={out}", **how.pop("env", {})}
        done = qemu.run(["-c", program + MAPS, *arguments], env=environment, timeout_s=HOUR_S, **how)
        said = json.loads(done.stdout.splitlines()[-1])
        return said, _by_file(emulator.read_counts(out), said["maps"])


def _by_file(executed: list[Executed], maps: dict[str, tuple[int, int]]) -> dict[str, list[Executed]]:
    """What lies in each mapped file."""
    places = sorted((low, high, path) for path, (low, high) in maps.items())
    found: dict[str, list[Executed]] = {}
    for one in executed:
        at = bisect_right(places, (one.address, 1 << 64, "")) - 1
        if at >= 0 and one.address < places[at][1]:
            found.setdefault(places[at][2], []).append(one)
    return found


def _parts(executed: list[Executed], starts: list[int], bodies: set[int]) -> dict[str, list[Executed]]:
    """"shared": what lies in functions that were launched; "own": the rest."""
    found: dict[str, list[Executed]] = {"shared": [], "own": []}
    for one in executed:
        at = bisect_right(starts, one.address) - 1
        found["shared" if at >= 0 and starts[at] in bodies else "own"].append(one)
    return found

"""A device as it describes itself over SSH, and why a bundle would not run there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compiler.deploy.connection import DeployError, Remote
from runtime import device
from runtime.manifest import Manifest

MIB = 1 << 20
DISK_SPARE_BYTES = 8 * MIB  # folders, the manifest, and the blocks that files do not fill
MARK = "--quern--"
# One section a line of MARK NAME. df looks at the nearest folder that exists already.
PROBE = rf"""
at() {{ echo '{MARK}' "$1"; }}
at arch; uname -m
at bits; getconf LONG_BIT
at glibc; getconf GNU_LIBC_VERSION 2>/dev/null
at memory; cat /proc/meminfo
at disk; d=$1; while [ ! -d "$d" ]; do d=$(dirname "$d"); done; LC_ALL=C df -Pk "$d"
at writable; [ -w "$d" ] && echo yes
at sha256; command -v sha256sum || command -v python3
at cpuinfo; cat /proc/cpuinfo
:
"""


@dataclass(frozen=True)
class Machine:
    """What the device says. bits: of its user space; a 64-bit kernel may carry a 32-bit one. glibc None: not glibc."""

    arch: str
    bits: int
    glibc: str | None
    features: frozenset[str]
    available_bytes: int
    free_disk_bytes: int
    writable: bool
    hashes: bool


async def look(remote: Remote, folder: str) -> Machine:
    """Ask the device; raises DeployError when its answer makes no sense."""
    return parse(await remote.output(PROBE, folder), remote.name)


def parse(text: str, name: str) -> Machine:
    """The probe's output."""
    parts = {}
    for part in text.split(f"{MARK} ")[1:]:
        key, _, value = part.partition("\n")
        parts[key] = value.strip()
    memory = re.search(r"^MemAvailable:\s*([0-9]+) kB", parts.get("memory", ""), re.MULTILINE)
    disk = re.search(r"\s([0-9]+)\s+[0-9]+%\s", parts.get("disk", ""))
    if memory is None or disk is None or not parts.get("bits", "").isdigit():
        lacking = next(key for key, got in (("memory", memory), ("disk", disk), ("bits", None)) if got is None)
        raise DeployError(f"{name}: does not tell its {lacking} as Linux does. Bundles run on Linux with glibc only.")
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(parts["arch"], parts["arch"])
    libc, _, version = parts["glibc"].partition(" ")
    return Machine(
        arch=arch,
        bits=int(parts["bits"]),
        glibc=version if libc == "glibc" else None,
        features=device.listed_features(parts.get("cpuinfo", ""), arch),
        available_bytes=int(memory[1]) * 1024,
        free_disk_bytes=int(disk[1]) * 1024,
        writable=parts["writable"] == "yes",
        hashes=bool(parts["sha256"]),
    )


def require(machine: Machine, manifest: Manifest, copy_bytes: int, name: str, folder: str) -> None:
    """Raise DeployError, with all reasons in one message, when the bundle does not fit. copy_bytes: still to copy."""
    found = refusals(machine, manifest, copy_bytes, folder)
    if found:
        raise DeployError(f"{name}: the bundle does not fit: {'; '.join(found)}. Nothing was copied.")


def refusals(machine: Machine, manifest: Manifest, copy_bytes: int, folder: str) -> list[str]:
    """Why not; empty when it fits."""
    target = manifest.target
    if machine.arch != target.arch:
        return [f"it is built for {target.arch} ({target.name}), but the device is {machine.arch}"]
    if machine.bits != 64:
        return [f"it needs a 64-bit system, but the device runs a {machine.bits}-bit one: install its 64-bit edition"]
    found = []
    missing = sorted(set(target.features) - machine.features)
    if missing:
        found.append(f"it is built for {target.name} ({target.cpu}), but the device's CPU lacks {', '.join(missing)}")
    if machine.glibc is None or device.version(machine.glibc) < device.version(target.glibc):
        has = "no glibc" if machine.glibc is None else f"glibc {machine.glibc}"
        found.append(f"it needs glibc {target.glibc} or later, but the device has {has}")
    if machine.available_bytes < manifest.memory.planned_peak_bytes:
        found.append(
            f"it needs {_mib(manifest.memory.planned_peak_bytes)} of memory, but {_mib(machine.available_bytes)} are "
            f"available there: end other programs, or build with a smaller --context or --kv-cache int8"
        )
    if machine.free_disk_bytes < copy_bytes + DISK_SPARE_BYTES:
        found.append(
            f"it needs {_mib(copy_bytes + DISK_SPARE_BYTES)} on the disk of {folder}, but "
            f"{_mib(machine.free_disk_bytes)} are free there"
        )
    if not machine.writable:
        found.append(f"{folder} cannot be written by this user: choose another folder (user@host:folder)")
    if not machine.hashes:
        found.append("the device has neither sha256sum nor python3 to check the copy with: install coreutils")
    return found


def _mib(count: int) -> str:
    return f"{-(-count // MIB)} MiB"

"""Builds x86.c and loads it here, so that code for AMX and AVX-VNNI runs on x86-64 machines without them.

On a machine that has an instruction nothing is emulated: its code runs on the hardware and the counters stay 0.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import targets
from compiler.codegen import link
from runtime import device

SOURCE = Path(__file__).with_name("x86.c")
EMULATED = {"amx_tile", "amx_int8", "avx_vnni"}  # /proc/cpuinfo's names
COUNTERS = ("configurations", "releases", "products", "vnni")


def missing() -> frozenset[str]:
    """Features that this machine's CPU lacks and the emulator has; none on another architecture."""
    return frozenset(EMULATED - device.cpu_features()) if device.arch() == "x86_64" else frozenset()


@cache
def library() -> Path:
    """The compiled emulator: built once for its text, beside zig's own cache."""
    out = link.cache_dir() / f"emulator-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        made = out.with_suffix(f".{id(out):x}")
        triple = targets.load("x86-64").zig_triple
        flags = ["-target", triple, "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(made)]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, str(SOURCE)], check=True)
        made.replace(out)
    return out


@cache
def enable() -> frozenset[str]:
    """From now on this process runs what the CPU lacks or the kernel refuses; gives cpuinfo's names of that."""
    found = missing()
    if device.arch() == "x86_64" and not device.allow_tiles():
        found |= device.TILE_FEATURES  # where the kernel refuses them, tiles are a SIGILL as well
    if found:
        assert _loaded().emulated_arch_prctl(device.ARCH_REQ_XCOMP_PERM, device.XTILEDATA) == 0
    return found


@cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(str(library()))


def counts() -> dict[str, int]:
    """How many instructions of each kind have been emulated in this process."""
    return {name: ctypes.c_uint64.in_dll(_loaded(), f"emulated_{name}").value for name in COUNTERS}

"""The target `native`: this machine's CPU, from /proc/cpuinfo, with every feature that a kernel can use."""
from __future__ import annotations

import ctypes
import dataclasses
import platform
from pathlib import Path

from targets.features import (
    AARCH64_BASE,
    AARCH64_EXTRAS,
    ARM_OPTIONAL,
    ARM_PARTS,
    X86_64_LEVELS,
    X86_64_V2,
    cpuinfo_names,
)
from targets.target import Target, TargetError

BASES = {"x86_64": "x86-64", "aarch64": "aarch64"}  # machine -> target that gives the triple and the glibc floor
CPUINFO = Path("/proc/cpuinfo")
ARCH_GET_XCOMP_SUPP, TILE_STATE = 0x1021, 3 << 17  # Linux arch/x86/include/uapi/asm/prctl.h; XTILECFG and XTILEDATA
ARM_LTD = "0x41"  # "CPU implementer"


def machine() -> str:
    """This machine's architecture by LLVM's name. Raises TargetError for one that quern does not compile for."""
    name = platform.machine()
    if name not in BASES or platform.system() != "Linux":
        raise TargetError(
            f"This machine is {platform.system()} on {name}, but 'native' needs Linux on {' or '.join(BASES)}. "
            f"Name a target with --target instead; 'python -m compiler targets' lists them."
        )
    return name


def read_cpuinfo() -> str:
    """/proc/cpuinfo as text."""
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        advice = "Name a target with --target instead."
        raise TargetError(f"{CPUINFO}: cannot be read ({error.strerror}). {advice}") from error


def arch_of(cpuinfo: str) -> str:
    """Which architecture wrote this text: arm64 kernels write "Features", x86 ones "flags"."""
    return "aarch64" if _values(cpuinfo, "Features") else "x86_64"


def l1d_kib(cpu: Path = Path("/sys/devices/system/cpu/cpu0")) -> int | None:
    """Size of this machine's first-level data cache, or None where the kernel does not tell (containers, emulators)."""
    for index in sorted(cpu.glob("cache/index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind == "Data" and level == "1" and size.endswith("K") and size[:-1].isdigit():
            return int(size[:-1])
    return None


def kernel_has_tiles() -> bool:
    """Whether this machine's kernel gives AMX tiles to who asks. cpuinfo's flags are older than that (Linux 5.16)."""
    supported = ctypes.c_uint64()
    try:
        failed = ctypes.CDLL(None).arch_prctl(ARCH_GET_XCOMP_SUPP, ctypes.byref(supported))
    except AttributeError:  # not x86, or not glibc
        return False
    return not failed and supported.value & TILE_STATE == TILE_STATE


def detect(cpuinfo: str, base: Target, l1d_kib_per_core: int | None = None, tiles: bool = True) -> Target:
    """The `native` target of the machine that wrote `cpuinfo`; `base` gives what a CPU cannot tell (triple, glibc).

    tiles: False leaves out what the operating system grants and this one does not.
    """
    if base.arch == "x86_64":
        mcpu, features, vector_bits = _detect_x86(cpuinfo)
    else:
        mcpu, features, vector_bits = _detect_arm(cpuinfo)
    models = _values(cpuinfo, "model name") or [mcpu]
    found = dataclasses.replace(
        base,
        name="native",
        description=f"this machine: {models[0]}",
        mcpu=mcpu,
        features=features,
        cpuinfo=cpuinfo_names(base.arch, features, str(CPUINFO)),
        vector_bits=vector_bits,
        cores=max(1, len(_values(cpuinfo, "processor"))),
        tier=1,
        clock_mhz=None,
        l1d_kib_per_core=l1d_kib_per_core,
        l2_kib=None,
        dram_read_mb_per_s=None,
        storage_read_mb_per_s=None,
    )
    return found if tiles else found.plain


def _detect_x86(cpuinfo: str) -> tuple[str, tuple[str, ...], int]:
    flags = _common(_values(cpuinfo, "flags"))
    for mcpu, (vector_bits, level, extras) in X86_64_LEVELS.items():
        if flags.issuperset(level.values()):
            found = [f"+{llvm}" for llvm, name in (level | extras).items() if name in flags]
            # Without this LLVM splits 512-bit vectors into 256-bit halves on CPUs that slow down for them.
            return mcpu, tuple(found + (["-prefer-256-bit"] if vector_bits == 512 else [])), vector_bits
    missing = ", ".join(name for name in X86_64_V2.values() if name not in flags)
    raise TargetError(f"{CPUINFO}: this CPU lacks {missing}; quern needs at least x86-64-v2 (SSE4.2, about 2009).")


def _detect_arm(cpuinfo: str) -> tuple[str, tuple[str, ...], int]:
    have = _common(_values(cpuinfo, "Features"))
    if missing := [name for name in AARCH64_BASE.values() if name not in have]:
        raise TargetError(f"{CPUINFO}: this CPU lacks {', '.join(missing)}; quern needs NEON.")
    features = [f"+{llvm}" for llvm, name in (AARCH64_BASE | AARCH64_EXTRAS).items() if name in have]
    return _arm_model(cpuinfo, have, features)


def _arm_model(cpuinfo: str, have: set[str], features: list[str]) -> tuple[str, tuple[str, ...], int]:
    """LLVM's model when all cores are of one kind and have what LLVM expects of it, else `generic`."""
    parts = set(_values(cpuinfo, "CPU part"))
    model, implied = ARM_PARTS.get(parts.pop() if len(parts) == 1 else "", ("generic", ()))
    lacking = [llvm for llvm in implied if AARCH64_EXTRAS[llvm] not in have]
    if set(_values(cpuinfo, "CPU implementer")) != {ARM_LTD} or not set(lacking) <= set(ARM_OPTIONAL):
        return "generic", tuple(features), 128
    return model, tuple(features + [f"-{llvm}" for llvm in lacking]), 128


def _values(cpuinfo: str, key: str) -> list[str]:
    """What stands after `key :` on each line that has it, one for each processor."""
    pairs = (line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    return [value.strip() for name, value in pairs if name.strip() == key]


def _common(flag_lines: list[str]) -> set[str]:
    """The flags that every processor has: a thread may run on any of them."""
    return set.intersection(*(set(line.split()) for line in flag_lines)) if flag_lines else set()

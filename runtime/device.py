"""The machine we run on: architecture, CPU features, C library, memory, and how many threads are worth starting.

Everything is read from the kernel's text files, so that it can be asked before any compiled code is loaded.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from .errors import DeviceError
from .manifest import Target

if TYPE_CHECKING:
    import socket

CLAIM = "\0quern-bound-to-cpus"
CPUINFO, CGROUP, CPU_FOLDER = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup"), Path("/sys/devices/system/cpu")
TILE_FEATURES = frozenset(("amx_tile", "amx_int8"))
# Linux arch/x86/include/uapi/asm/prctl.h, and the number of the state component that tiles take in XSAVE areas.
ARCH_REQ_XCOMP_PERM, XTILEDATA = 0x1023, 18

# Linux arch/arm64/include/uapi/asm/hwcap.h: the names /proc/cpuinfo prints, by bit of AT_HWCAP and AT_HWCAP2.
_HWCAP = (  # noqa: SIM905
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
    "sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
).split()
_HWCAP2 = (  # noqa: SIM905
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 "
    "dgh rng bti"
).split()


def arch() -> str:
    """Architecture of this process, as manifests spell it."""
    name = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)


def cpu_features(cpuinfo: Optional[str] = None) -> frozenset[str]:
    """Names under "flags" (x86) or "Features" (arm64) that every core has.

    An arm64 emulator may show the host's cpuinfo, without such a line: the kernel's hardware capabilities answer then.
    """
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    return listed_features(cpuinfo, arch()) or (_arm64_capabilities() if arch() == "aarch64" else frozenset())


def listed_features(cpuinfo: str, machine: str) -> frozenset[str]:
    """What this text of /proc/cpuinfo lists for every core, on a machine of that architecture."""
    key = "Features" if machine == "aarch64" else "flags"
    cores = [frozenset(line.split()) for line in re.findall(rf"^{key}\s*:(.*)$", cpuinfo, re.MULTILINE)]
    return frozenset.intersection(*cores) if cores else frozenset()


def _arm64_capabilities() -> frozenset[str]:
    import ctypes

    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return frozenset(
        name
        for key, names in ((16, _HWCAP), (26, _HWCAP2))
        for bit, name in enumerate(names)
        if getauxval(key) >> bit & 1
    )


def allow_tiles() -> bool:
    """Ask the kernel for AMX tiles, for this process and threads it starts from now on; False where there are none.

    The answer holds for the process, so asking again costs a system call and changes nothing. Without it the first tile
    instruction is a SIGILL (Linux: Documentation/arch/x86/xstate.rst).
    """
    if arch() != "x86_64" or not cpu_features() >= TILE_FEATURES:
        return False
    import ctypes

    try:
        ask = ctypes.CDLL(None).arch_prctl
    except (AttributeError, OSError):
        return False
    ask.restype, ask.argtypes = ctypes.c_int, [ctypes.c_int, ctypes.c_ulong]
    return bool(ask(ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0)


def glibc() -> Optional[str]:
    """Version of the C library like "2.36", None where it is not glibc."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    return version if name == "glibc" else None


def refusals(target: Target) -> list[str]:
    """Why this machine cannot run code for `target`; empty when it can."""
    if arch() != target.arch:
        return [f"it is built for {target.arch} ({target.name}), but this machine is {arch()}"]
    found = []
    missing = sorted(set(target.features) - cpu_features())
    if missing:
        found.append(f"it is built for {target.name} ({target.cpu}), but this CPU lacks {', '.join(missing)}")
    have = glibc()
    if have is None or version(have) < version(target.glibc):
        found.append(
            f"it needs glibc {target.glibc} or later, but this machine has "
            f"{'no glibc' if have is None else 'glibc ' + have}"
        )
    if target.gpu is not None:
        from . import cuda_driver

        found += cuda_driver.refusals(target.gpu)
    return found


def require(target: Target, where: str) -> None:
    """Raise DeviceError when this machine cannot run code for `target`."""
    found = refusals(target)
    if found:
        raise DeviceError(
            f"{where}: cannot run here: {'; '.join(found)}. "
            "Rebuild the bundle for this machine's target (python -m compiler targets)."
        )


def version(text: str) -> tuple[int, ...]:
    """Text like "2.36" as (2, 36), which compares as versions do."""
    return tuple(int(n) for n in re.findall(r"[0-9]+", text)[:2])


def memory_bytes() -> Optional[int]:
    """Memory this process may use: installed, or the tightest limit of its cgroups (v2 or v1). None when unknown."""
    limits = []
    with contextlib.suppress(ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in cgroups("memory"):
        texts = (read_text(place / name) for name in ("memory.max", "memory.limit_in_bytes"))
        limits += [int(text) for text in texts if text.isdigit()]
    return min(limits) if limits else None


def peak_rss_mib() -> float:
    """Most memory this process ever held, in MiB. VmHWM, because ru_maxrss also remembers the parent's before exec."""
    found = re.search(r"^VmHWM:\s*([0-9]+) kB", read_text(Path("/proc/self/status")), re.MULTILINE)
    if found:
        return int(found[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def default_threads() -> int:
    """As many as there are physical cores in our affinity, but no more than the cgroup's CPU quota, at least one.

    Where all our CPUs call themselves one core, each of them counts: two such CPUs of a virtual machine (Sapphire
    Rapids) read memory 1.7 times as fast as one, and decoding is reading.
    """
    cpus = affinity()
    cores = physical_cores(cpus)
    cores = len(cpus) if cores == 1 else cores
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota + 0.5)))


def claim_cpus() -> Optional[socket.socket]:
    """The right to bind threads to CPUs, held as long as the result lives; None while another process has it.

    Two processes that are bound to the same CPUs wait for each other's waiting: on 2 CPUs a small model fell from 4200
    tokens/s to twice 300, and with one of the two left unbound made twice 2400. The right is a name in Linux's abstract
    socket namespace, which goes with its process, whatever kills that.
    """
    import socket

    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind(CLAIM)
    except OSError:
        holder.close()
        return None
    return holder


def affinity() -> frozenset[int]:
    """Logical CPUs this process may run on."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int]) -> int:
    """How many cores these logical CPUs make; hyper-threads of one core count once."""
    cpus = list(cpus)
    cores = set()
    for cpu in cpus:
        siblings = read_text(CPU_FOLDER / f"cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings or str(cpu))
    return len(cores)


def cpu_quota() -> Optional[float]:
    """CPUs of time that cgroup v2 (cpu.max) or v1 (cfs quota) grants, the tightest up the tree. None: no limit."""
    return min(filter(None, map(_quota_of, cgroups("cpu"))), default=None)


def cgroups(controller: str) -> list[Path]:
    """Folders of this process's cgroups that may limit it, v2 and v1, each with all above it.

    The mounts' own folders are among them: in a container they are the process's, whatever /proc says its path is.
    """
    found = [CGROUP, CGROUP / controller]
    for line in read_text(Path("/proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controllers
        folder = root / path.lstrip("/")
        inside = (place for place in (folder, *folder.parents) if root in (place, *place.parents))
        found += [place for place in inside if place not in found]
    return found


def _quota_of(folder: Path) -> Optional[float]:
    text = read_text(folder / "cpu.max").split()
    if len(text) != 2:
        text = [read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")]
    if text[0].isdigit() and text[1].isdigit() and int(text[1]):
        return int(text[0]) / int(text[1])
    return None


def read_text(path: Path) -> str:
    """Contents of a small kernel file, "" when there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def fastest(cpus: Iterable[int]) -> int:
    """The CPU that TVM reserves for its caller: the highest clock, then the lowest number (threading_backend.cc)."""

    def rank(cpu: int) -> tuple[int, int]:
        text = read_text(CPU_FOLDER / f"cpu{cpu}/cpufreq/cpuinfo_max_freq")
        return -int(text) if text.isdigit() else 0, cpu

    return min(cpus, key=rank)

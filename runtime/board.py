"""What a board tells tuning about itself: processor, caches, whether it is emulated, whether it throttles."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from pathlib import Path
from typing import Optional

from . import device

CPUINFO, CPU0 = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0")
# The link of a thread's own program. qemu-user shows a program its own file under /proc/self/exe, but not here.
OWN_PROGRAM, KERNEL_ARCH = Path("/proc/thread-self/exe"), Path("/proc/sys/kernel/arch")
TREE = Path("/proc/device-tree/compatible")  # QEMU's arm64 machine calls itself linux,dummy-virt, whatever runs it
# A Raspberry Pi's firmware: bit 0 low voltage, 1 clock capped, 2 throttled, 3 soft temperature limit, all of them now.
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
FIRMWARE = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
NOW = 0b1111
# Jetsons from JetPack 5 on: one device of this kind for every part whose clock is held down for heat. NVIDIA, Jetson
# Linux Developer Guide, "Platform Power and Performance".
COOLING, ALERT = Path("/sys/class/thermal"), "-throttle-alert"
_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64"}  # e_machine of an ELF header


def about(threads: int) -> dict[str, object]:
    """Facts for the client of a session, as JSON has them."""
    return {
        "name": socket.gethostname(),
        "arch": device.arch(),
        "features": sorted(device.cpu_features()),
        "glibc": device.glibc(),
        "cpu": cpu_model(),
        "processors": os.cpu_count() or 1,
        "threads": threads,
        "memory_bytes": device.memory_bytes(),
        "cache_bytes": last_level_cache_bytes(),
        "emulator": emulator(),
    }


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The CPU as the kernel names it; on Arm the part number, because names there say little."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    named = (line for key in ("CPU part", "model name") for line in lines if line.startswith(key))
    return next(named, ": unknown").partition(":")[2].strip()


def last_level_cache_bytes(cpu: Path = CPU0) -> int:
    """Size of the largest cache that the kernel tells of, 0 where it tells of none."""
    sizes = [0]
    for path in cpu.glob("cache/index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().rstrip("K")) << 10)
    return max(sizes)


def emulator(program: Path = OWN_PROGRAM, kernel: Path = KERNEL_ARCH, tree: Path = TREE) -> Optional[str]:
    """Who pretends to be this machine: qemu-user is a program or on a kernel of another architecture, a virtual machine
    has a virtual machine's name. None on a board.
    """
    with contextlib.suppress(OSError):
        with program.open("rb") as file:
            head = file.read(20)
        machine = struct.unpack_from("<H", head, 18)[0] if head[:4] == b"\x7fELF" else 0
        if _MACHINES.get(machine, device.arch()) != device.arch():
            return program.resolve().name
    with contextlib.suppress(OSError):
        if kernel.read_text().strip() in set(_MACHINES.values()) - {device.arch()}:
            return "an emulator"
    with contextlib.suppress(OSError):
        if b"dummy-virt" in tree.read_bytes():
            return "a virtual machine"
    return None


def throttled(firmware: Path = FIRMWARE, cooling: Path = COOLING) -> bool:
    """Whether a Raspberry Pi's firmware or a Jetson's kernel holds a clock down, for heat or want of voltage.

    Elsewhere nobody says.
    """
    with contextlib.suppress(OSError, ValueError):
        return bool(int(firmware.read_text().strip(), 16) & NOW)
    for device_ in cooling.glob("cooling_device*"):
        with contextlib.suppress(OSError, ValueError):
            if (device_ / "type").read_text().strip().endswith(ALERT) and int((device_ / "cur_state").read_text()):
                return True
    return False

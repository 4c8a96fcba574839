"""What a card is at and may be at: the driver's peak clocks, and nvidia-smi's view of now, where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

from runtime import cuda_driver

# CUdevice_attribute: peak clocks in kHz, bits of the memory bus, bytes of the second-level cache.
ATTRIBUTES = {"clock_khz": 13, "memory_clock_khz": 36, "memory_bus_bits": 37, "l2_bytes": 38}
# Jetsons have no nvidia-smi. MHz, W, degrees Celsius.
ABOUT = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "persistence_mode", "mig.mode.current")
NOW = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
SMI_S = 20  # a driver in trouble may keep nvidia-smi waiting for ever
BUS_ID_BYTES = 32


def about() -> dict[str, object]:
    """Of the first GPU, once; what is not told is left out."""
    driver, found = ctypes.CDLL(cuda_driver.path()), dict[str, object]()
    for name, attribute in ATTRIBUTES.items():
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0:
            found[name] = value.value
    said = _smi(ABOUT + NOW)
    return {**found, "nvidia_smi": said} if said else found


class Busy:
    """The highest of each value that nvidia-smi showed while something ran."""

    def __init__(self) -> None:
        self._most: dict[str, float] = {}

    def look(self) -> None:
        """Ask now."""
        for name, text in _smi(NOW).items():
            if text.replace(".", "", 1).isdecimal():  # not "[N/A]"
                self._most[name] = max(float(text), self._most.get(name, 0.0))

    def record(self) -> dict[str, object]:
        """Nothing where there is no nvidia-smi."""
        return {"busy": self._most} if self._most else {}


def _smi(names: tuple[str, ...]) -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--id={_bus_id()}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _bus_id() -> str:
    """Of CUDA's first GPU, which CUDA_VISIBLE_DEVICES may have made another one than nvidia-smi's first."""
    driver, text = ctypes.CDLL(cuda_driver.path()), ctypes.create_string_buffer(BUS_ID_BYTES)
    if not hasattr(driver, "cuDeviceGetPCIBusId") or driver.cuDeviceGetPCIBusId(text, BUS_ID_BYTES, 0):
        return "0"
    return text.value.decode()

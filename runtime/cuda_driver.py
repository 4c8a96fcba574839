"""What the NVIDIA driver says of itself and of its first GPU, asked before any code of a bundle is loaded."""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple, Union

from .manifest import Gpu

ENVIRONMENT, LIBRARY = "QUERN_LIBCUDA", "libcuda.so.1"
MAJOR, MINOR, MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute: compute capability, size
EMULATED = "quern_emulated"


class Found(NamedTuple):
    """The GPU that programs get as number 0. driver: the CUDA version it supports, 11040 for 11.4.

    emulated: the driver has no GPU but acts as if; it says so by a symbol that no driver of NVIDIA's has.
    """

    name: str
    arch: int
    driver: int
    multiprocessors: int = 0
    emulated: bool = False


def path() -> str:
    """The driver's library: as the dynamic linker finds it, or where QUERN_LIBCUDA says."""
    return os.environ.get(ENVIRONMENT) or LIBRARY


def find() -> Union[Found, str]:
    """The GPU, or why there is none."""
    try:
        driver = ctypes.CDLL(path())
        started, version, device = driver.cuInit(0), ctypes.c_int(), ctypes.c_int()
    except (OSError, AttributeError) as error:
        return f"the NVIDIA driver is not there: {error}"
    if started:
        return f"the NVIDIA driver does not start: {_name(driver, started)}"
    name, numbers = ctypes.create_string_buffer(128), [ctypes.c_int() for _ in range(3)]
    code = driver.cuDriverGetVersion(ctypes.byref(version)) or driver.cuDeviceGet(ctypes.byref(device), 0)
    code = code or driver.cuDeviceGetName(name, len(name), device)
    for attribute, number in zip((MAJOR, MINOR, MULTIPROCESSORS), numbers):  # noqa: B905 strict is Python 3.10's
        code = code or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if code:
        return f"the NVIDIA driver shows no GPU: {_name(driver, code)}"
    major, minor, multiprocessors = (number.value for number in numbers)
    return Found(
        name.value.decode(errors="replace"), 10 * major + minor, version.value, multiprocessors,
        hasattr(driver, EMULATED),
    )  # fmt: skip


def refusals(gpu: Gpu) -> list[str]:
    """Why code for `gpu` cannot run here; empty when it can. A later architecture compiles the PTX."""
    found = find()
    if isinstance(found, str):
        return [f"it runs on an NVIDIA GPU, but {found}"]
    needed = int(gpu.arch.partition("_")[2])
    if found.arch < needed:
        return [f"it is built for {gpu.arch} and later GPUs, but {found.name} is sm_{found.arch}"]
    major, minor = map(int, gpu.driver.split("."))
    if found.driver < 1000 * major + 10 * minor:
        have = f"{found.driver // 1000}.{found.driver % 1000 // 10}"
        return [f"it needs an NVIDIA driver of CUDA {gpu.driver} or later, but this one is of CUDA {have}"]
    return []


def _name(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return f"{(text.value or b'an unknown error').decode(errors='replace')} ({code})"

"""Find and load libtvm_ffi.so and libtvm_runtime.so, without importing the `tvm` or `tvm_ffi` Python packages.

Looked for in this order: the folder in QUERN_TVM_LIBS, the folder `lib` beside this file (a copied-out runtime), the
installed wheels apache-tvm-ffi and apache-tvm. A folder may hold `versions.json`, an object of wheel name to version,
which `quern deploy` writes; for installed wheels the versions come from their dist-info folders.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from . import device
from .errors import InputError, LibraryError
from .manifest import TvmVersions

if TYPE_CHECKING:
    import socket

FFI, RUNTIME = "libtvm_ffi.so", "libtvm_runtime.so"
ENVIRONMENT = "QUERN_TVM_LIBS"
MAX_THREADS = 1024
SPINS = "TVM_THREAD_POOL_SPIN_COUNT"

_loaded: Optional[Libraries] = None


@dataclass(frozen=True)
class Found:
    """Where the two libraries are, and the wheel versions as far as they are known."""

    ffi: Path
    runtime: Path
    versions: dict[str, str]


@dataclass(frozen=True)
class Libraries:
    """The loaded libraries of this process; `threads` is what TVM's pool was told.

    claim: kept while the process lives, so that no second one binds threads to the same CPUs.
    """

    ffi: ctypes.CDLL
    found: Found
    threads: int
    claim: Optional[socket.socket] = None


def find() -> Found:
    """The first place that has the libraries; LibraryError names every place that was looked at."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        folder = Path(given)
        for name in (FFI, RUNTIME):
            if not (folder / name).is_file():
                raise LibraryError(
                    f"{ENVIRONMENT} is {given}, but there is no {name} in it. "
                    f"Point it at a folder with {FFI} and {RUNTIME}, or unset it."
                )
        return _in_folder(folder)
    beside = Path(__file__).resolve().parent / "lib"
    if (beside / FFI).is_file() and (beside / RUNTIME).is_file():
        return _in_folder(beside)
    ffi, tvm = _package("tvm_ffi"), _package("tvm")
    if ffi and tvm and (ffi / "lib" / FFI).is_file() and (tvm / "lib" / RUNTIME).is_file():
        versions = {**_dist_info(ffi, "apache-tvm-ffi"), **_dist_info(tvm, "apache-tvm")}
        return Found(ffi / "lib" / FFI, tvm / "lib" / RUNTIME, versions)
    raise LibraryError(
        f"{FFI} and {RUNTIME} were not found: {ENVIRONMENT} is not set, {beside} does not have them, and the "
        "wheels apache-tvm-ffi and apache-tvm are not installed. Put both files in that folder, or "
        "install the wheels."
    )


def _in_folder(folder: Path) -> Found:
    try:
        versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        versions = {}
    except (OSError, ValueError) as error:
        raise LibraryError(f"{folder / 'versions.json'}: cannot be read: {error}. Copy the runtime again.") from None
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise LibraryError(
            f"{folder / 'versions.json'}: must be an object of wheel name to version. Copy the runtime again."
        )
    return Found(folder / FFI, folder / RUNTIME, versions)


def _package(name: str) -> Optional[Path]:
    """Folder of an installed package. Finding a top-level package does not import it."""
    import importlib.util

    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _dist_info(package: Path, wheel: str) -> dict[str, str]:
    """The version in the name of the wheel's dist-info folder; importlib.metadata takes longer than all the rest."""
    stem = wheel.replace("-", "_")
    for path in package.parent.glob(f"{stem}-*.dist-info"):
        return {wheel: path.name[len(stem) + 1 : -len(".dist-info")]}
    return {}


def check_threads(threads: Optional[int]) -> None:
    """Raise InputError for a number that TVM's pool does not take."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads is {threads}, but must lie in 1..{MAX_THREADS}.")


def load(built_with: Optional[TvmVersions], threads: Optional[int] = None) -> Libraries:
    """Load both libraries once a process, with TVM's thread count set before; check that they fit the bundle.

    `built_with` None: there is no bundle, and whoever sends code compares `abi_version`.
    `threads` None: TVM_NUM_THREADS if set, else device.default_threads(). A second call cannot change the count.
    """
    global _loaded  # noqa: PLW0603  one process has one TVM
    check_threads(threads)
    if _loaded is None:
        found = find()
        if built_with is not None:
            _check_versions(found, built_with)
        _loaded = _open(found, threads or _wished_threads())
    elif built_with is not None:
        _check_versions(_loaded.found, built_with)
    if threads not in (None, _loaded.threads):
        raise InputError(
            f"threads is {threads}, but TVM already runs with {_loaded.threads} in this process. "
            "Start a new process to change it."
        )
    if built_with is not None:
        _check_abi(_loaded, built_with)
    return _loaded


def _wished_threads() -> int:
    text = os.environ.get("TVM_NUM_THREADS", "")
    return min(int(text), MAX_THREADS) if re.fullmatch(r"[1-9][0-9]{0,5}", text) else device.default_threads()


def _open(found: Found, threads: int) -> Libraries:
    os.environ["TVM_NUM_THREADS"] = str(threads)
    if threads > len(device.affinity()):
        # TVM's workers ask 300 000 times for work before they sleep, also when the process wants to end. Where they
        # outnumber the CPUs that takes them from whoever has work: 16 threads on 2 CPUs needed 17 s to exit.
        os.environ.setdefault(SPINS, "0")
    claim = _bind(threads)
    try:
        ffi = ctypes.CDLL(str(found.ffi), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(found.runtime), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise LibraryError(
            f"{found.runtime.parent}: the TVM libraries do not load: {error}. "
            f"Install the wheels for this machine ({device.arch()})."
        ) from None
    return Libraries(ffi, found, threads, claim)


def _bind(threads: int) -> Optional[socket.socket]:
    """Whether TVM shall bind its threads to CPUs: not when it would take the wrong ones, or another process's.

    TVM binds worker i to CPU i whatever our affinity says, so it would leave the CPUs that the user gave us.
    """
    if threads == 1 or "TVM_BIND_THREADS" in os.environ:
        return None
    cpus = device.affinity()
    claim = None if threads > len(cpus) or len(cpus) < (os.cpu_count() or 1) else device.claim_cpus()
    if claim is None:
        os.environ["TVM_BIND_THREADS"] = "0"
    return claim


def _check_versions(found: Found, built_with: TvmVersions) -> None:
    """Major and minor version of the wheels must be the builder's: bytecode and ABI change between minor versions."""
    for wheel, needed in (("apache-tvm", built_with.version), ("apache-tvm-ffi", built_with.ffi_version)):
        have = found.versions.get(wheel)
        if have is not None and have.split(".")[:2] != needed.split(".")[:2]:
            raise LibraryError(
                f"{found.runtime.parent}: {wheel} is {have}, but the bundle was built with {needed}. "
                f"Install {wheel}=={needed}."
            )


def abi_version(libraries: Libraries) -> tuple[int, int, int]:
    """The version compiled into libtvm_ffi.so. Its patch number runs ahead of the wheel's."""
    numbers = (ctypes.c_uint32 * 3)()
    libraries.ffi.TVMFFIGetVersion(numbers)
    return numbers[0], numbers[1], numbers[2]


def _check_abi(libraries: Libraries, built_with: TvmVersions) -> None:
    """The same for the number compiled into libtvm_ffi.so."""
    try:
        numbers = abi_version(libraries)
    except AttributeError:
        raise LibraryError(
            f"{libraries.found.ffi}: is no TVM FFI library (no TVMFFIGetVersion). "
            f"Install apache-tvm-ffi=={built_with.ffi_version}."
        ) from None
    if [str(n) for n in numbers[:2]] != built_with.ffi_version.split(".")[:2]:
        raise LibraryError(
            f"{libraries.found.ffi}: has ABI version {'.'.join(map(str, numbers))}, but the bundle was built "
            f"with apache-tvm-ffi {built_with.ffi_version}. Install apache-tvm-ffi=={built_with.ffi_version}."
        )

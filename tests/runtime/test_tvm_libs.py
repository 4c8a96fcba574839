"""Finding and refusing the TVM libraries."""
from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from runtime import device, tvm_libs
from runtime.errors import InputError, LibraryError
from runtime.manifest import TvmVersions

BUILT_WITH = TvmVersions("0.27.0.post1", "0.1.14.post1")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, without QUERN_TVM_LIBS."""
    monkeypatch.setattr(tvm_libs, "_loaded", None)
    monkeypatch.delenv("QUERN_TVM_LIBS", raising=False)
    for name in ("TVM_NUM_THREADS", "TVM_BIND_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv(tvm_libs.SPINS, "")  # so that it is put back
    monkeypatch.delenv(tvm_libs.SPINS)


def folder_with(folder: Path, versions: str | None = None, empty: bool = False) -> Path:
    """A folder with links to the installed libraries, or with empty files of their names."""
    folder.mkdir()
    found = tvm_libs.find()
    for path in (found.ffi, found.runtime):
        if empty:
            (folder / path.name).write_bytes(b"")
        else:
            (folder / path.name).symlink_to(path)
    if versions is not None:
        (folder / "versions.json").write_text(versions)
    return folder


def refusal(built_with: TvmVersions = BUILT_WITH) -> str:
    with pytest.raises(LibraryError) as caught:
        tvm_libs.load(built_with)
    return str(caught.value)


def test_installed_wheels_are_found_with_their_versions() -> None:
    found = tvm_libs.find()
    assert found.ffi.name == "libtvm_ffi.so"
    assert found.versions == {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def test_the_environment_comes_first_and_must_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "libs")
    monkeypatch.setenv("QUERN_TVM_LIBS", str(folder))
    assert tvm_libs.find().runtime == folder / "libtvm_runtime.so"
    (folder / "libtvm_runtime.so").unlink()
    assert refusal() == (
        f"QUERN_TVM_LIBS is {folder}, but there is no libtvm_runtime.so in it. "
        "Point it at a folder with libtvm_ffi.so and libtvm_runtime.so, or unset it."
    )


def test_lib_beside_the_runtime_comes_before_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "lib", '{"apache-tvm": "0.27.9"}')
    monkeypatch.setattr(tvm_libs, "__file__", str(tmp_path / "tvm_libs.py"))
    found = tvm_libs.find()
    assert found.ffi == tmp_path / "lib" / "libtvm_ffi.so"
    assert found.versions == {"apache-tvm": "0.27.9"}
    assert tvm_libs.load(BUILT_WITH).found == found


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_libs, "__file__", str(tmp_path / "tvm_libs.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal() == (
        f"libtvm_ffi.so and libtvm_runtime.so were not found: QUERN_TVM_LIBS is not set, {tmp_path / 'lib'} does not "
        "have them, and the wheels apache-tvm-ffi and apache-tvm are not installed. Put both files in that folder, or "
        "install the wheels."
    )


def test_another_tvm_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "libs", '{"apache-tvm": "0.26.0"}')
    monkeypatch.setenv("QUERN_TVM_LIBS", str(folder))
    assert refusal() == (
        f"{folder}: apache-tvm is 0.26.0, but the bundle was built with 0.27.0.post1. Install apache-tvm==0.27.0.post1."
    )


def test_another_ffi_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without versions.json the number inside the library still tells."""
    folder = folder_with(tmp_path / "libs")
    monkeypatch.setenv("QUERN_TVM_LIBS", str(folder))
    assert refusal(TvmVersions("0.27.0", "0.2.0")) == (
        f"{folder / 'libtvm_ffi.so'}: has ABI version 0.1.15, but the bundle was built with apache-tvm-ffi 0.2.0. "
        "Install apache-tvm-ffi==0.2.0."
    )


@pytest.mark.parametrize("text", ["[]", '{"apache-tvm": 1}'])
def test_versions_of_the_wrong_kind(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "libs", text)
    monkeypatch.setenv("QUERN_TVM_LIBS", str(folder))
    assert refusal() == (
        f"{folder / 'versions.json'}: must be an object of wheel name to version. Copy the runtime again."
    )


def test_libraries_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path / "libs", empty=True)
    monkeypatch.setenv("QUERN_TVM_LIBS", str(folder))
    reason = f"{folder / 'libtvm_ffi.so'}: file too short"
    assert refusal().startswith(f"{folder}: the TVM libraries do not load: {reason}. Install the wheels for ")


def test_a_library_that_is_not_tvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import _ctypes

    folder = tmp_path / "libs"
    folder.mkdir()
    for name in ("libtvm_ffi.so", "libtvm_runtime.so"):
        shutil.copy(_ctypes.__file__, folder / name)
    monkeypatch.setenv("QUERN_TVM_LIBS", str(folder))
    # dlopen gives no symbol of its own: what other libraries of this process offer is not looked at
    assert refusal() == (
        f"{folder / 'libtvm_ffi.so'}: is no TVM FFI library (no TVMFFIGetVersion). "
        "Install apache-tvm-ffi==0.1.14.post1."
    )


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_counts_out_of_bounds(threads: int) -> None:
    with pytest.raises(InputError) as caught:
        tvm_libs.load(BUILT_WITH, threads)
    assert str(caught.value) == f"threads is {threads}, but must lie in 1..1024."


def test_the_thread_count_is_settled_once() -> None:
    assert tvm_libs.load(BUILT_WITH, 1).threads == 1
    assert tvm_libs.load(BUILT_WITH).threads == 1
    with pytest.raises(InputError) as caught:
        tvm_libs.load(BUILT_WITH, 2)
    assert str(caught.value) == (
        "threads is 2, but TVM already runs with 1 in this process. Start a new process to change it."
    )


def test_the_environment_may_set_the_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert tvm_libs._wished_threads() == 3
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    assert tvm_libs._wished_threads() >= 1


def test_workers_that_outnumber_the_cpus_do_not_wait_for_work_busily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "affinity", lambda: {0, 1})
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: None)  # this process has one TVM already
    found = tvm_libs.find()
    tvm_libs._open(found, 2)
    assert tvm_libs.SPINS not in os.environ
    tvm_libs._open(found, 3)
    assert os.environ[tvm_libs.SPINS] == "0"
    os.environ[tvm_libs.SPINS] = "5"  # the user's word
    tvm_libs._open(found, 3)
    assert os.environ[tvm_libs.SPINS] == "5"

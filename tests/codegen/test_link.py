"""Linking: the same bytes everywhere, for both architectures, and no library that the device could not load."""
from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm

import targets
from compiler.codegen import elf, link
from tests.codegen.exp_matmul import EXP_MATMUL_RTOL, compiled
from tests.codegen.test_elf import by_hand

RPI4 = targets.load("rpi4")


@pytest.mark.parametrize("name", targets.names())
def test_export_gives_the_same_bytes_in_any_folder(tmp_path: Path, name: str) -> None:
    target, libraries = targets.load(name), [tmp_path / "a" / "model.so", tmp_path / "b" / "c" / "model.so"]
    for library in libraries:
        library.parent.mkdir(parents=True)
        link.export(compiled(target), library, target)  # compiled anew each time, too
    first, second = (library.read_bytes() for library in libraries)
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    assert str(tmp_path).encode() not in first
    assert sorted(tmp_path.rglob("*.*")) == libraries  # nothing else is left behind


@pytest.mark.slow
def test_export_does_not_depend_on_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = [tmp_path / "1.so", tmp_path / "2.so"]
    for number, library in enumerate(libraries):
        link.export(compiled(RPI4), library, RPI4)
        monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path / f"cache-{number}"))
    assert libraries[0].read_bytes() == libraries[1].read_bytes()
    assert (tmp_path / "cache-0").is_dir()


@pytest.mark.parametrize("name", targets.names())
def test_what_the_library_needs(tmp_path: Path, name: str) -> None:
    target = targets.load(name)
    link.export(compiled(target), tmp_path / "model.so", target)
    found = elf.read(tmp_path / "model.so")
    assert (found.arch, found.needed) == (target.arch, ("libm.so.6",))
    assert found.versions  # expf comes from libm, with a version
    assert all(symbol.startswith("TVMFFI") for symbol in found.unversioned)


def test_the_native_library_runs(tmp_path: Path) -> None:
    target = targets.load("native")
    link.export(compiled(target), tmp_path / "model.so", target)
    vm = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "model.so")), tvm.cpu())
    x, w = (np.linspace(-1, 1, n * k, dtype=np.float32).reshape(n, k) for n, k in ((4, 8), (8, 3)))
    got = vm["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(w)).numpy()
    np.testing.assert_allclose(got, np.exp(x @ w), rtol=EXP_MATMUL_RTOL)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    link.export(compiled(RPI4), Path("below/model.so"), RPI4)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["below/model.so"]


@pytest.mark.parametrize("temporary", [True, False])
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: bool) -> None:
    """LLVM would end the process, and leave what is half-written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if temporary else tmp_path / "elsewhere"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(8 << 20) - 1))
    with pytest.raises(link.LinkError) as caught:
        link.export(None, tmp_path / "read.so", RPI4)
    more = ", or set TMPDIR to another place" if temporary else ""
    assert str(caught.value) == (
        f"{tmp_path / 'read.so'}: linking takes up to 8 MiB, but its disk has 7 MiB left. Make room{more}."
    )


def test_an_older_library_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.so").write_text("old")
    link.export(compiled(RPI4), tmp_path / "model.so", RPI4)
    assert elf.read(tmp_path / "model.so").arch == "aarch64"


def test_a_failing_linker_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.o").write_text("no object")
    with pytest.raises(link.LinkError) as caught:
        link.link([tmp_path / "broken.o"], tmp_path / "model.so", RPI4)
    first, _, rest = str(caught.value).partition("\n")
    assert first == f"{tmp_path / 'model.so'}: linking for aarch64-linux-gnu.2.28 failed (zig cc left with 1):"
    assert "broken.o" in rest
    assert [path.name for path in tmp_path.iterdir()] == ["broken.o"]


def test_a_linker_that_says_much_has_the_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: a warning for every file of zig's cache."""
    said = "".join(f"warning: {i}\n" for i in range(1000)) + "error: no space left\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(link.LinkError) as caught:
        link.link([tmp_path / "a.o"], tmp_path / "model.so", RPI4)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[1], lines[-1]) == (13, "warning: 989", "error: no space left")


def test_ziglang_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(link.LinkError) as caught:
        link.link([tmp_path / "a.o"], tmp_path / "model.so", RPI4)
    assert str(caught.value) == (
        f"{tmp_path / 'model.so'}: cannot link, because the Python package 'ziglang' is not installed. "
        f"It is one of quern's dependencies: run 'make venv', or '{sys.executable} -m pip install ziglang'."
    )


@pytest.mark.parametrize(
    ("library", "target", "message"),
    [
        (by_hand(), targets.load("x86-64"), "is for aarch64, but target 'x86-64' is x86_64."),
        (by_hand(version=b"GLIBC_2.29\0"), RPI4, "needs GLIBC_2.29, but 'rpi4' promises glibc 2.28 only."),
        (by_hand(), replace(RPI4, glibc="2.9"), "needs GLIBC_2.27, but 'rpi4' promises glibc 2.9 only."),
        (by_hand(version=b"GLIBC_PRIVATE\0"), RPI4, "needs GLIBC_PRIVATE, but 'rpi4' promises glibc 2.28 only."),
        (by_hand().replace(b"libm.so.6", b"libx.so.6"), RPI4, "needs libx.so.6, which a device need not have."),
        (by_hand().replace(b"TVMFFIx", b"__floor"), RPI4,
         "nobody defines __floor: neither glibc 2.28 nor the TVM runtime has it."),
        (b"", RPI4, "not a little-endian 64-bit ELF file."),
    ],
)
def test_what_a_device_would_refuse(tmp_path: Path, library: bytes, target: targets.Target, message: str) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(library)
    with pytest.raises(link.LinkError) as caught:
        link.check(path, target)
    assert str(caught.value) == f"{path}: {message}"


def test_what_a_device_takes(tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(by_hand())
    link.check(tmp_path / "model.so", RPI4)


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QUERN_CACHE", raising=False)
    assert link.cache_dir() == tmp_path / "quern"
    monkeypatch.setenv("QUERN_CACHE", str(tmp_path / "own"))
    assert link.cache_dir() == tmp_path / "own"


def test_an_undefined_symbol_is_found_in_a_real_library(tmp_path: Path) -> None:
    source = tmp_path / "a.c"
    source.write_text("int nobody_has_this(void); int f(void) { return nobody_has_this(); }")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", RPI4.zig_triple, "-fPIC", "-c"]
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(link.cache_dir() / "zig")}
    subprocess.run([*zig, str(source), "-o", str(tmp_path / "a.o")], check=True, env=environment, cwd=tmp_path)
    with pytest.raises(link.LinkError, match=r"model\.so: nobody defines nobody_has_this: neither glibc 2\.28"):
        link.link([tmp_path / "a.o"], tmp_path / "model.so", RPI4)
    assert not (tmp_path / "model.so").exists()

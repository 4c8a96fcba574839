"""Device code: one version line, the same bytes each time, refusals, and what ptxas says."""

from __future__ import annotations

import locale
import sys
from importlib import metadata
from typing import Any

import pytest

import targets
from compiler.codegen import nvrtc
from compiler.errors import UserError
from tests.emulator.test_cuda import TOY

INSTALL = f"Install what building for CUDA needs: {sys.executable} -m pip install 'quern[cuda]'."


def gpu_of(name: str) -> Any:
    return targets.load(name).gpu


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90"])
def test_code_is_for_the_target_and_its_driver(name: str) -> None:
    gpu = gpu_of(name)
    code = nvrtc.compile(TOY, gpu)
    assert f".version {gpu.ptx}\n.target {gpu.arch}\n".encode() in code.ptx
    assert not code.ptx.endswith(b"\0")
    assert code.functions["toy"].spill_bytes == 0 and code.functions["toy"].shared_bytes == 8
    assert (code.cubin is not None) == gpu.cubin
    assert code.cubin is None or code.cubin.startswith(b"\x7fELF")
    assert b"block_sync" not in code.ptx + (code.cubin or b"")  # no source text
    nvrtc.compile.cache_clear()
    assert nvrtc.compile(TOY, gpu) == code


def test_ptxas_refuses_what_the_version_line_does_not_have() -> None:
    """cp.async came with PTX 7.0, so a driver that reads 6.5 could not load it."""
    raw, _ = nvrtc._nvrtc(
        '#include "quern.cuh"\nextern "C" __global__ void f(float* x) {\n  __shared__ float s[4];\n'
        "  async_copy16(s, x);\n  async_wait<0>();\n  x[threadIdx.x] = s[0];\n}\n", "compute_87", "PTX",
    )  # fmt: skip
    with pytest.raises(nvrtc.DeviceCodeError, match=r"requires PTX ISA \.version 7\.0 or later"):
        nvrtc._assemble(nvrtc.set_version(raw.rstrip(b"\0"), "6.5"), "sm_80")


def test_the_callers_locale_stays() -> None:
    """NVRTC leaves its thread in the locale "C", in which Python reads text files as ASCII."""
    before = locale.nl_langinfo(locale.CODESET)
    nvrtc._nvrtc(TOY, "compute_87", "PTX")
    assert locale.nl_langinfo(locale.CODESET) == before


def test_wrong_source() -> None:
    with pytest.raises(nvrtc.DeviceCodeError, match='identifier "nonsense" is undefined'):
        nvrtc.compile('extern "C" __global__ void f(int* x) { *x = nonsense; }', gpu_of("jetson-orin"))


def test_what_ptxas_reports() -> None:
    report = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function 'a' for 'sm_87'\n"
        "ptxas info    : Function properties for a\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem, 376 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_87'\n"
        "ptxas info    : Function properties for b\n"
        "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
        "ptxas info    : Used 255 registers, 376 bytes cmem[0]\n"
    )
    assert nvrtc._resources(report) == {"a": nvrtc.Resources(32, 0, 512), "b": nvrtc.Resources(255, 32, 0)}


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UserError) as caught:
        nvrtc._wheel_file(nvrtc.NVRTC)
    assert str(caught.value) == f"CUDA targets need nvidia-cuda-nvrtc-cu11 11.8.89 (a Python package). {INSTALL}"


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        version = "12.9.86"

    monkeypatch.setattr(metadata, "distribution", lambda name: Other())
    with pytest.raises(UserError) as caught:
        nvrtc._wheel_file(nvrtc.NVRTC)
    assert str(caught.value) == f"CUDA targets need nvidia-cuda-nvrtc-cu11 11.8.89, but 12.9.86 is installed. {INSTALL}"


def test_another_wheel_wrote_over_ptxas(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheels -cu11 and -cu12 of nvcc have files of the same names: the last one installed wins."""
    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    ptxas.chmod(0o755)
    monkeypatch.setattr(nvrtc, "_wheel_file", lambda wheel: ptxas)
    nvrtc._ptxas.cache_clear()
    with pytest.raises(UserError) as caught:
        nvrtc._ptxas()
    nvrtc._ptxas.cache_clear()
    assert str(caught.value) == (
        f"CUDA targets need ptxas 12.9.86 of nvidia-cuda-nvcc-cu12, but {ptxas} says: Cuda compilation tools, release "
        "11.8, V11.8.89. Another package, perhaps nvidia-cuda-nvcc-cu11, has a file of that name. Remove it, and "
        f"install the right one again: {sys.executable} -m pip install --force-reinstall "
        "nvidia-cuda-nvcc-cu12==12.9.86."
    )

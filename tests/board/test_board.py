"""The emulated board itself: its Python, its libraries, and a Relax library that we linked for it."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler.codegen import link
from runtime import device
from tests.codegen.exp_matmul import EXP_MATMUL_RTOL, compiled

pytestmark = pytest.mark.board
REPO = Path(__file__).parents[2]

NUMPY_AND_TVM = """
import ctypes, json, platform, sys
import numpy, tokenizers
tokenizers.Tokenizer(tokenizers.models.BPE())
site = sys.argv[1]
for library in ("tvm_ffi/lib/libtvm_ffi.so", "tvm/lib/libtvm_runtime.so"):
    ctypes.CDLL(f"{site}/{library}", ctypes.RTLD_GLOBAL)
print(json.dumps([platform.machine(), (numpy.arange(6.).reshape(2, 3) @ numpy.ones(3)).tolist(),
                  [m for m in ("tvm", "huggingface_hub") if m in sys.modules]]))
"""

RELAX = """
import ctypes, json, sys
import numpy as np, tvm_ffi
tvm_ffi.registry._SKIP_UNKNOWN_OBJECTS = True  # Python classes for TVM's objects are in the compiler's package
ctypes.CDLL(sys.argv[1] + "/tvm/lib/libtvm_runtime.so", ctypes.RTLD_GLOBAL)
vm = tvm_ffi.load_module(sys.argv[2])["vm_load_executable"]()
vm["vm_initialization"](1, 0, 2)
x, w = np.linspace(-1, 1, 32, dtype="float32").reshape(4, 8), np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
y = np.from_dlpack(vm["main"](tvm_ffi.from_dlpack(x), tvm_ffi.from_dlpack(w)))
print(json.dumps(float(abs(y / np.exp(x @ w) - 1).max())))
"""


def test_numpy_tokenizers_and_tvm_load(board: Any) -> None:
    said = board.run(["-c", NUMPY_AND_TVM, board.root() / "site"]).stdout
    assert json.loads(said) == ["aarch64", [3.0, 12.0], []]


def test_a_relax_library_for_rpi4_runs(board: Any, tmp_path: Path) -> None:
    target = targets.load("rpi4")
    link.export(compiled(target), tmp_path / "model.so", target)
    said = board.run(["-c", RELAX, board.root() / "site", tmp_path / "model.so"]).stdout
    assert json.loads(said) <= EXP_MATMUL_RTOL


def test_the_board_is_a_raspberry_pi_4(board: Any) -> None:
    code = "import json; from runtime import device; print(json.dumps([device.arch(), sorted(device.cpu_features())]))"
    arch, features = json.loads(board.run(["-c", code], pythonpath=[REPO]).stdout)
    assert (arch, features) == ("aarch64", ["asimd", "cpuid", "crc32", "evtstrm", "fp"])
    assert set(targets.load("rpi4").cpuinfo) <= set(features)
    assert device.arch()  # the same module, here


def test_an_instruction_of_armv8_2_is_refused(board: Any, tmp_path: Path) -> None:
    """A library for a Cortex-A76 must not pass here: that is what the emulated board is for."""
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write((0x4E829420).to_bytes(4, "little") + (0xD65F03C0).to_bytes(4, "little"))  # sdot v0.4s, v1.16b, v2.16b; ret
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    done = board.run(["-c", code], check=False)
    assert done.returncode == -4  # SIGILL


def test_a_program_on_the_board_starts_another(board: Any) -> None:
    inner = "import platform, sys; print(platform.machine(), sys.argv)"
    code = "import platform, subprocess, sys; print(platform.machine(), flush=True); "
    code += f"subprocess.run([sys.executable, '-c', {inner!r}, 'a b'], check=True)"
    assert board.run(["-c", code]).stdout == "aarch64\naarch64 ['-c', 'a b']\n"


def test_a_verb_of_the_runtime_in_the_background(board: Any, tmp_path: Path) -> None:
    """The signal goes to the program itself, and nothing but the runtime can be imported."""
    code = "import importlib.util, time; found = importlib.util.find_spec; "
    code += "print(*(bool(found(name)) for name in ('runtime', 'compiler')), flush=True); time.sleep(60)"
    how = {"pythonpath": [board.runtime_folder()], "cwd": tmp_path}
    with board.start(["-c", code], **how, stdout=-1) as process:
        assert process.stdout.readline() == "True False\n"
        process.terminate()
        assert process.wait(10) == -15
    with board.start_runtime(["info", "nowhere"], stdout=-1, stderr=-1) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "") and err.startswith("error: nowhere")


def test_a_failure_shows_what_the_program_wrote(board: Any) -> None:
    with pytest.raises(board.BoardError, match=r"left with 3\nhello\n"):
        board.run(["-c", "print('hello'); raise SystemExit(3)"])

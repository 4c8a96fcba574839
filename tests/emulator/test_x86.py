"""The emulator against plain C on instructions of another compiler, and everything that it must refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import targets
from runtime import device
from tests.emulator import x86

REFUSED = {
    "no permission": "tile instruction: SIGILL: before permission was asked for",
    "palette": "LDTILECFG: #GP: unknown palette",
    "reserved": "LDTILECFG: #GP: reserved bytes 2..15 are not zero",
    "too wide": "LDTILECFG: #GP: colsb above 64",
    "too high": "LDTILECFG: #GP: rows above 16",
    "tile 8": "LDTILECFG: #GP: colsb of tiles 8..15 is not zero",
    "rows only": "LDTILECFG: #GP: a tile with rows or columns, but not both",
    "colsb": "TDP: #UD: colsb is no multiple of 4",
    "rows of sum": "TDP: #UD: rows of the sum and the first factor differ",
    "columns of sum": "TDP: #UD: columns of the sum and the second factor differ",
    "inner": "TDP: #UD: columns of the first and rows of the second factor differ",
    "not configured": "TDP: #UD: tiles are not configured",
    "released": "TDP: #UD: tiles are not configured",
    "unused tile": "TILEZERO: #UD: a tile of size 0",
    "same tile": "TDP: #UD: the same tile twice",
    "foreign": "SIGILL: an instruction that is not emulated",
}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled tiles.c. The kernel has not been asked for tiles, so even a CPU that has them leaves them to us."""
    if device.arch() != "x86_64":
        pytest.skip("this CPU lacks x86_64")
    out = tmp_path_factory.mktemp("tiles") / "tiles"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", targets.load("x86-64").zig_triple, "-O1"]
    command += ["-mamx-tile", "-mamx-int8", "-o", str(out), str(Path(__file__).with_name("tiles.c"))]
    subprocess.run(command, check=True)
    return out


def run(tiles: Path, name: str, **env: str) -> subprocess.CompletedProcess[str]:
    preloaded = {"LD_PRELOAD": str(x86.library()), **env}
    return subprocess.run([str(tiles), name], env=preloaded, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["products", "vnni"])
def test_computes_what_plain_c_does(tiles: Path, name: str) -> None:
    done = run(tiles, name)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_a_cpu_refuses(tiles: Path, name: str) -> None:
    done = run(tiles, name)
    assert (done.returncode, done.stderr) == (99, f"emulator: {REFUSED[name]}\n")


def test_a_kernel_that_refuses(tiles: Path) -> None:
    assert run(tiles, "refused", QUERN_EMULATOR_REFUSES="1").returncode == 0
    assert run(tiles, "refused").returncode == 1

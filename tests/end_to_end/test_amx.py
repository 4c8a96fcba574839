"""One bundle with AMX code: equal logits with tiles, where the kernel refuses them, and where there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler import pipeline
from compiler.progress import Reporter
from runtime.manifest import FILE_NAME, Manifest, load
from targets.native import read_cpuinfo
from tests.emulator import x86
from tests.end_to_end.commands import environment
from tests.end_to_end.places import DEMO, OWN_TEXT, REPO
from tests.schedules.linears import require
from tests.schedules.test_linear_int8_amx import AMX

TOKENS, NEW = 110, 24
CHUNKS = (48,)  # three tiles of tokens: two steps, of which the second begins early; then calls of 31, which do not

WORKER = """
import ctypes, hashlib, json, sys
from pathlib import Path
import numpy as np
from runtime import device
bundle, cpuinfo, text, count, new = sys.argv[1:6]
device.CPUINFO = Path(cpuinfo)
from runtime.bundle import open_bundle
from runtime.session import Session
from runtime.tokenizer import Tokenizer
ids = Tokenizer(Path(bundle) / "tokenizer.json").encode(Path(text).read_text())[:int(count)]
session = Session(open_bundle(Path(bundle)), threads=2)
logits = np.concatenate([part.copy() for part in session.logits(ids)])
session.reset()
assert np.array_equal(session.prefill(ids[:9]), logits[8])  # fewer than a tile: without tiles
session.reset()
tokens = [int(session.prefill(ids).argmax())]
while len(tokens) < int(new):
    tokens.append(int(session.step(tokens[-1]).argmax()))
try:
    counts = [ctypes.c_uint64.in_dll(ctypes.CDLL(None), f"emulated_{name}").value for name in sys.argv[6:]]
except ValueError:
    counts = None
digest = hashlib.sha256(logits.tobytes()).hexdigest()
off = Session(open_bundle(Path(bundle)), threads=2, tiles=False)
assert np.array_equal(np.concatenate([part.copy() for part in off.logits(ids)]), logits)
print(json.dumps({"tiles": session.tiles, "off": off.tiles, "counts": counts, "logits": digest, "tokens": tokens}))
"""


@pytest.fixture(scope="module")
def cpuinfo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This machine's cpuinfo, with AMX."""
    require(AMX)
    text = read_cpuinfo()
    lines = [f"{line} amx_tile amx_int8" if line.startswith("flags") else line for line in text.splitlines()]
    path = tmp_path_factory.mktemp("amx") / "cpuinfo"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def bundle(cpuinfo: Path) -> Path:
    """The demo model for `native` on such a machine."""
    target = targets.load("native", cpuinfo.read_text())
    assert target.has("amx-int8")
    out = cpuinfo.with_name("bundle")
    pipeline.build(DEMO, pipeline.Request(out, target, chunks=CHUNKS), Reporter(quiet=True))
    return out


def run(bundle: Path, cpuinfo: Path, **env: str) -> Any:
    command = [sys.executable, "-c", WORKER, *map(str, (bundle, cpuinfo, OWN_TEXT, TOKENS, NEW, *x86.COUNTERS[:3]))]
    done = subprocess.run(command, env=environment(env), cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_the_manifest_says(bundle: Path) -> None:
    made: Manifest = load(bundle / FILE_NAME)
    tiled = {name: f.tiled for name, f in made.functions.items()}
    assert tiled == {
        "decode": None, "head_1": None,
        **{f"{kind}_{m}": f"{kind}_{m}_amx" for kind in ("prefill", "logits") for m in CHUNKS},
    }  # fmt: skip
    assert not [name for name in made.target.features if name.startswith("amx")]  # it runs without


def test_tiles_refused_tiles_and_no_tiles_give_equal_logits(bundle: Path, cpuinfo: Path) -> None:
    emulator = str(x86.library())
    tiled = run(bundle, cpuinfo, LD_PRELOAD=emulator)
    refused = run(bundle, cpuinfo, LD_PRELOAD=emulator, QUERN_EMULATOR_REFUSES="1")
    here = run(bundle, Path("/proc/cpuinfo"))
    assert (tiled["tiles"], refused["tiles"]) == (True, False)
    configured, released, products = tiled["counts"]
    assert configured == released > 0 and products > configured  # on two threads
    assert (refused["counts"], here["counts"]) == ([0, 0, 0], None)
    assert here["tiles"] == targets.load("native").has("amx-int8")
    assert [done["off"] for done in (tiled, refused, here)] == [False] * 3
    results = [(done["logits"], done["tokens"]) for done in (tiled, refused, here)]
    assert results[0] == results[1] == results[2]

"""Import streams: a sharded checkpoint from tests/make_checkpoint.py passes through a bounded amount of memory.

The full run, which no test makes (3.9 GB of disk, twice): python tests/make_checkpoint.py OUT, then
python -m compiler build --model OUT --out BUNDLE under /usr/bin/time -v. tuning_logs/LOG.md has its figures.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from compiler.checkpoint import open_checkpoint
from compiler.quant.formats import open_source
from compiler.quant.ir import DenseWeight, QuantWeight
from tests.make_checkpoint import Shape, write

REPO = Path(__file__).parents[2]
SHAPE = Shape(hidden=1024, ffn=2816, layers=16, heads=16, kv_heads=4, vocab=4000)
MAPPED = 16 << 20  # pages that may stay mapped in the test, instead of 256 MiB
# What decoding the largest module holds at its peak: codes u8 (2.9 MB), twice while they are checked, the words, their
# scales, and the working buffers of 512 K codes (about 3 MB). The allocator may keep as much again.
WORKING = 24 << 20
PROBE = """
import sys
from compiler.checkpoint import folder, open_checkpoint
from compiler.quant.formats import open_source

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

folder.MOST_MAPPED_BYTES = int(sys.argv[2])
source = open_source(open_checkpoint(sys.argv[1]))
modules = source.modules()
source.load(modules[1])
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
for module in modules:
    loaded = source.load(module)
    values = loaded.values if hasattr(loaded, "values") else loaded.codes
    values.max()
print((kib("VmHWM") - before) << 10)
"""


def test_memory_stays_far_below_the_file(tmp_path: Path) -> None:
    size = write(tmp_path / "model", SHAPE, 32 << 20)
    done = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path / "model"), str(MAPPED)], cwd=REPO, text=True,
                          capture_output=True, check=True)
    embedding = SHAPE.vocab * SHAPE.hidden * 2
    assert size > 2 * (MAPPED + WORKING + embedding)
    assert int(done.stdout) < MAPPED + WORKING + embedding


def test_views_survive_the_dropping_of_their_pages(tmp_path: Path) -> None:
    write(tmp_path / "model", Shape(64, 128, 2, 4, 4, 50, 32), 20_000)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert len({info.file for info in checkpoint.tensors.values()}) > 2
    held = checkpoint.array("lm_head.weight")
    copy = held.copy()
    checkpoint._drop_pages(1 << 40)
    assert np.array_equal(held, copy)


def test_the_made_checkpoint_decodes(tmp_path: Path) -> None:
    shape = Shape(64, 128, 2, 4, 2, 50, 32)
    write(tmp_path / "model", shape, 1 << 20)
    source = open_source(open_checkpoint(tmp_path / "model"))
    for name, (n, k) in shape.linears.items():
        w = source.load(f"model.layers.1.{name}")
        assert isinstance(w, QuantWeight)
        assert (w.codes.shape, w.group_size, int(w.zero.min()), w.permutation) == ((n, k), 32, 8, None)
    assert isinstance(source.load("model.embed_tokens"), DenseWeight)
    assert len(source.modules()) == 2 * 7 + 2

"""No instruction that a Raspberry Pi 4 lacks: in all of a library that we link, and in what executes of the others.

qemu's Cortex-A72 refuses what came with Armv8.1 and later, but it has the crypto extension, which the Pi leaves out.
LLVM's disassembler has just what the target says.
"""
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler import pipeline
from compiler.codegen import carried, elf
from compiler.measure import bundle_cost, cycles
from compiler.progress import Reporter
from tests.checkpoint.gguf_files import write_llama

pytestmark = [pytest.mark.board, pytest.mark.slow]
REPO = Path(__file__).parents[2]
PI = targets.load("rpi4")
SDOT, AESE = 0x4E829420, 0x4E284820
RUN = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
more = {}
"""


def words(library: Path) -> set[int]:
    """Every instruction word of a library."""
    return {word for _, code in elf.code(library) for (word,) in struct.iter_unpack("<I", code)}


def lacking(found: set[int]) -> set[str]:
    return {f"{word:08x}" for word in found - cycles.decode(found, PI).keys()}


def test_the_disassembler_knows_what_the_pi_lacks() -> None:
    assert lacking({SDOT, AESE, 0xD503201F}) == {f"{SDOT:08x}", f"{AESE:08x}"}  # a NOP is fine


def test_nothing_that_a_bundle_executes_is_foreign(board: Any, tmp_path: Path) -> None:
    """A model of many kernels (4, 6 and 8 bits, offsets, int8 cache); then a story, from Python to the last token."""
    model = write_llama(tmp_path / "model.gguf", "Q4_K", "Q6_K", "Q8_0", "Q6_K", None)
    request = pipeline.Request(tmp_path / "many", PI, kv_cache="int8", context=64, chunks=(16,))
    pipeline.build(model, request, Reporter(quiet=True))
    assert lacking(words(tmp_path / "many" / "model.so")) == set()
    story = tmp_path / "story"
    demo = REPO / "tests" / "models" / "storyteller-5m-gptq-4bit-g128"
    pipeline.build(demo, pipeline.Request(story, PI, self_contained=True, chunks=(16,)), Reporter(quiet=True))
    assert lacking(words(story / "model.so")) == set()
    program = RUN.replace("sys.argv[0], run", f"{str(story / 'run')!r}, run")
    arguments = ["Once upon a time, there was a little girl named Lily.", "--max-new-tokens", "4", "--json"]
    _, executed = bundle_cost.counted(program, arguments, env={"PYTHONPATH": ""})
    names = {part.name for part in carried.PARTS["aarch64"]}  # model.so is unmapped by then
    ours = {Path(path).name: {e.word for e in run} for path, run in executed.items() if Path(path).parent == story}
    assert ours.keys() == names
    assert {name: lacking(run) for name, run in ours.items()} == {name: set() for name in names}
    assert min(map(len, ours.values())) > 1000  # distinct instructions: the counter did look

"""The reader reads: every byte, in every variant, and with vector code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import targets
from compiler.measure import read_bandwidth as read
from tests.schedules.kernels import assert_no_heap

NATIVE = targets.load("native")
UNIT = 64 * 8 * 64  # slices x most streams x bytes of a line


@dataclass(frozen=True)
class Readers:
    nbytes: int
    names: list[str]
    vm: Any

    def __call__(self, data: np.ndarray) -> dict[str, np.ndarray]:
        tensor = tvm.runtime.tensor(data.view(np.int32))
        return {name: self.vm[name](tensor).numpy() for name in self.names}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    library = tmp_path_factory.mktemp("read") / "read.so"
    names = read.build(3 * UNIT, NATIVE, library)
    return Readers(3 * UNIT, names, relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu()))


def test_usable_by_hand() -> None:
    assert [read.usable(n) for n in (0, UNIT - 1, UNIT, 3 * UNIT + 5)] == [0, 0, UNIT, 3 * UNIT]


def test_a_variant_of_every_kind(readers: Readers) -> None:
    assert readers.names == ["read_1_0", "read_4_0", "read_8_0", "read_4_1", "read_4_2", "read_8_2"]


def test_every_variant_sees_every_word(readers: Readers) -> None:
    """XOR of all words, slice by slice: a word left out or read twice changes it."""
    data = np.random.default_rng(0).integers(0, 256, readers.nbytes, dtype=np.uint8)
    words = data.view(np.int32).reshape(read.SLICES, -1, read.LANES)
    want = np.bitwise_xor.reduce(words, axis=1)
    for name, got in readers(data).items():
        assert np.array_equal(got, want), name


def test_no_word_counts_twice(readers: Readers) -> None:  # each bit of the result comes from its one word
    for place in (0, 1, readers.nbytes // 4 - 1, readers.nbytes // 8 + 17):
        data = np.zeros(readers.nbytes // 4, np.int32)
        data[place] = 12345
        for name, got in readers(data).items():
            assert np.count_nonzero(got) == 1, name
            assert got.max() == 12345, name


@pytest.mark.parametrize(("streams", "level"), read.VARIANTS)
def test_the_loop_is_vector_code_without_a_heap(streams: int, level: int) -> None:
    builder = relax.BlockBuilder()
    data = relax.Var("data", relax.TensorType((UNIT // 4,), "int32"))
    with builder.function("main", [data]):
        kernel = builder.add_func(read.kernel(UNIT, streams, level).without_attr("global_symbol"), "reader")
        result = relax.call_tir(kernel, relax.Tuple([data]), relax.TensorType((read.SLICES, read.LANES), "int32"))
        builder.emit_func_output(builder.emit(result))
    executable = relax.build(builder.get(), tvm.target.Target(targets.load("x86-64").tvm_target()))
    assembly = "\n".join(m.inspect_source("asm") for m in executable.mod.imports if m.kind == "llvm")
    assert_no_heap(assembly)
    assert "ymm" in assembly
    assert ("prefetcht" in assembly) == (level > 0)


def test_refuses_bytes_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=str(UNIT + 1)):
        read.build(UNIT + 1, NATIVE, tmp_path / "read.so")

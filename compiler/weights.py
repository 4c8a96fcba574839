"""From a checkpoint's modules to the graph's parameters, in order, in pieces, each in its kernel's layout.

What a weight is, `load_weight` says in canonical form; `packed` cuts it into pieces of some rows, which threads unpack
and lay out while earlier pieces are being written. Memory stays at a few pieces, whatever the model's size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compiler.codegen.weights_file import Piece
from compiler.errors import CheckpointError
from compiler.graph.weights import Constant, Linear, Table, Vector, Weight
from compiler.quant.codes import Codes
from compiler.quant.ir import DenseWeight, QuantWeight, join
from compiler.quant.source import Source
from compiler.quantize import rtn
from schedules.kernel import Packing

DECODERS = os.cpu_count() or 1  # threads that unpack and lay out; numpy lets them run beside each other
WEIGHTS_AHEAD = 2  # weights whose scales and headers are read before their turn
PIECES_AHEAD = 2 * DECODERS
PIECE_CODES = 1 << 22  # codes in a piece: enough work to hide what handing it over costs
PIECE_VALUES = 1 << 24  # dense values quantised by one thread at a time

Array = NDArray[Any]
T = TypeVar("T")


def packed(
    weights: Iterable[Weight], source: Source, packings: Mapping[str, Packing], advance: Callable[[float], None]
) -> Iterator[Piece]:
    """Every parameter of `weights`, in order, as its kernel wants it; `advance(1)` when a weight is through."""
    with ThreadPoolExecutor(DECODERS) as pool, ThreadPoolExecutor(WEIGHTS_AHEAD) as reader:

        def jobs() -> Iterator[Callable[[], Piece | None]]:
            loads = (partial(_load, weight, source) for weight in weights)
            for parameters in _ahead(reader, loads, WEIGHTS_AHEAD):
                for name, value in parameters:
                    yield from _pieces(name, value, packings.get(name))
                yield lambda: None

        for piece in _ahead(pool, jobs(), PIECES_AHEAD):
            if piece is None:
                advance(1)
            else:
                yield piece


def _ahead(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], most: int) -> Iterator[T]:
    """Results in order; `most` jobs run or wait while one result is used."""
    waiting: deque[Future[T]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _load(weight: Weight, source: Source) -> list[tuple[str, Array | Codes]]:
    return list(load_weight(weight, source))


def _pieces(name: str, value: Array | Codes, packing: Packing | None) -> Iterator[Callable[[], Piece]]:
    """One job for each run of rows that may be packed alone."""
    n, k = (*value.shape, 1)[:2]
    if packing is None:
        whole = value.array() if isinstance(value, Codes) else value
        yield lambda: Piece(name, str(whole.dtype), whole.shape, whole)
        return
    rows = max(1, PIECE_CODES // (k * packing.rows)) * packing.rows if packing.rows else n
    for start in range(0, n, rows):
        yield partial(_piece, name, value, packing, start, min(start + rows, n))


def _piece(name: str, value: Array | Codes, packing: Packing, start: int, stop: int) -> Piece:
    if isinstance(value, Codes):
        words = value.words(start, stop, packing.word_bits) if packing.pack_words else None
        if words is not None:
            assert packing.pack_words is not None
            return Piece(name, packing.spec.dtype, packing.spec.shape, packing.pack_words(words))
        value, start, stop = value.rows(start, stop), 0, stop - start
    return Piece(name, packing.spec.dtype, packing.spec.shape, packing.pack(value[start:stop]))


def load_weight(weight: Weight, source: Source) -> Iterator[tuple[str, Array | Codes]]:
    """The graph parameters of one weight in canonical form; a dense one is quantised here if the graph wants that."""
    if isinstance(weight, Constant):
        yield weight.name, weight.values
    elif isinstance(weight, Vector):
        yield weight.name, _norm(weight, source)
    elif isinstance(weight, Table):
        yield from _parameters(weight.name, weight.name, source.load(weight.source))
    else:
        if weight.bias:
            yield f"{weight.name}.bias", _bias(weight, source)
        joined = join([source.load(module) for module in weight.sources])
        loaded = _as_asked(joined if weight.order is None else joined.rows(weight.order), weight)
        yield from _parameters(weight.name, f"{weight.name}.weight", loaded)


def _parameters(name: str, dense: str, weight: QuantWeight | DenseWeight) -> Iterator[tuple[str, Array | Codes]]:
    """A matrix by the names that compiler/graph/build.py gives its parameters; `dense` for one that has no codes."""
    if isinstance(weight, DenseWeight):
        yield dense, weight.values
        return
    yield f"{name}.codes", weight.parts
    yield f"{name}.scale", weight.scale
    if weight.offset is not None:
        yield f"{name}.offset", weight.offset
    elif not weight.type.table:
        yield f"{name}.zero", weight.zero[:1, :1] if weight.symmetric else weight.zero
    if weight.permutation is not None:
        yield f"{name}.permutation", weight.permutation


def _norm(weight: Vector, source: Source) -> NDArray[np.float32]:
    """A norm's weight with its constants folded in, each a rounding to fp32 at most."""
    values = source.vector(weight.source)
    if values.shape != (weight.n,):
        raise CheckpointError(
            f"{weight.source} has {values.size} values, but config.json's widths need {weight.n}. "
            f"The configuration belongs to another checkpoint, or was edited."
        )
    values = values if weight.plus == 0 else values + np.float32(weight.plus)
    return values if weight.times == 1 else values * np.float32(weight.times)


def _bias(weight: Linear, source: Source) -> NDArray[np.float32]:
    """The biases of all sources, one after another, in the graph's order; that each has one was checked before."""
    parts = [source.bias(module) for module in weight.sources]
    joined = np.concatenate([part for part in parts if part is not None])
    return joined if weight.order is None else joined[np.asarray(weight.order)]


def _as_asked(loaded: QuantWeight | DenseWeight, weight: Linear) -> QuantWeight | DenseWeight:
    if isinstance(loaded, DenseWeight) and not weight.type.dense:
        return _quantised(loaded, weight)
    wanted = weight.type if weight.type.order else replace(weight.type, order=loaded.type.order)
    assert loaded.type == wanted, (loaded.type, wanted)
    return loaded


def _quantised(dense: DenseWeight, weight: Linear) -> QuantWeight:
    """Round to nearest, runs of rows in threads: every row is rounded by itself."""
    bits, (n, k) = 8 if weight.type.bits == 8 else 4, dense.values.shape

    def quantise(start: int) -> QuantWeight:
        rows = DenseWeight(dense.values[start : start + step], dense.dtype)
        return rtn.quantize(rows, bits, weight.type.group_size, where=weight.sources[0])

    step = max(1, PIECE_VALUES // k)
    with ThreadPoolExecutor(DECODERS) as pool:
        return join(list(pool.map(quantise, range(0, n, step))))

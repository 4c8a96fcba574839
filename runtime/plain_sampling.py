"""The arithmetic of sampler.py without numpy: the same rules on Python's own floats, for boards that lack numpy.

Greedy choices are equal to the bit; probabilities agree to the rounding of exp and of the order of sums.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import struct
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arrays import Plain

if TYPE_CHECKING:
    from .sampler import Sampling


MANY = 32  # where more than one in so many is a candidate, they are taken out in one go
_LARGEST, _LOWEST = 0x7F, 0xFF
_BY_VALUE = bytes([*range(_LARGEST - 1, -1, -1), *range(0x80, _LOWEST)])  # first bytes, largest float first
_ONLY = tuple(bytes(byte == top for byte in range(256)) for top in range(256))


def floats(logits: Plain) -> array[float]:
    """float32[vocab] as Python iterates over it fastest."""
    out = array("f")
    out.frombytes(logits.flat.cast("B"))
    return out


def best(values: array[float]) -> tuple[int, float]:
    """The first of the largest, and its value; NaN when any of them is NaN, as numpy's argmax has it.

    Looks at the first byte of each float alone, which bytes.find does at memory speed, and then only at the floats that
    share the best first byte: a max over all makes a Python float of each, 7 ms for 128256 of them on a fast machine.
    """
    high = values.tobytes()[3::4]  # sign and seven bits of the exponent; both architectures are little-endian
    if _LARGEST in high or _LOWEST in high:  # NaN and infinities, and what is beyond 1e38
        return _best_of_all(values)
    top = next(byte for byte in _BY_VALUE if byte in high)
    if top == 0:  # 0.0 and -0.0 are equal but begin differently
        return _best_of_all(values)
    if high.count(top) > len(values) // MANY:
        highest = max(itertools.compress(values, high.translate(_ONLY[top])))
        return values.index(highest), highest
    found, highest, at = 0, -math.inf, high.find(top)
    while at >= 0:
        if values[at] > highest:
            found, highest = at, values[at]
        at = high.find(top, at + 1)
    return found, highest


def _best_of_all(values: array[float]) -> tuple[int, float]:
    highest = max(values)
    if (math.isfinite(highest) and math.isnan(sum(values))) or math.isnan(highest):
        return 0, math.nan
    return values.index(highest), highest


def penalised(values: array[float], seen: bytes | bytearray, penalty: float) -> array[float]:
    """Used tokens moved away from use, whatever their sign; rounded to float32 as numpy does."""
    out, (single,) = values[:], struct.unpack("f", struct.pack("f", penalty))
    at = seen.find(1)
    while at >= 0:
        out[at] = values[at] * single if values[at] < 0 else values[at] / single
        at = seen.find(1, at + 1)
    return out


def draw(values: array[float], options: Sampling, uniform: float) -> int:
    """A token by its probability; `uniform` lies in [0, 1)."""
    ids, probabilities = distribution(values, options)
    cumulative = list(itertools.accumulate(probabilities))
    return ids[min(bisect.bisect_right(cumulative, uniform * cumulative[-1]), len(ids) - 1)]


def distribution(values: Sequence[float], options: Sampling) -> tuple[list[int], list[float]]:
    """Ids that may follow, ascending, and their probabilities, after temperature (> 0) and the filters."""
    scaled = [value / options.temperature for value in values]
    ids = list(range(len(scaled)))
    if 0 < options.top_k < len(scaled):
        smallest_kept = heapq.nlargest(options.top_k, scaled)[-1]
        ids = [i for i in ids if scaled[i] >= smallest_kept]
    probabilities = _softmax([scaled[i] for i in ids])
    if options.top_p < 1:
        ids = [ids[at] for at in _nucleus(probabilities, options.top_p)]
        probabilities = _softmax([scaled[i] for i in ids])
    if options.min_p > 0:
        floor = options.min_p * max(probabilities)
        ids = [ids[at] for at, p in enumerate(probabilities) if p >= floor]
        probabilities = _softmax([scaled[i] for i in ids])
    return ids, probabilities


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _nucleus(probabilities: Sequence[float], top_p: float) -> list[int]:
    """Places of the most likely tokens that together reach top_p, ascending. See sampler.py, whose rule this is."""
    tail = 1 - top_p
    floor = tail / len(probabilities)
    candidates = [at for at, p in enumerate(probabilities) if p >= floor]
    below = 1 - math.fsum(probabilities[at] for at in candidates) if len(candidates) < len(probabilities) else 0.0
    order = sorted(candidates, key=probabilities.__getitem__)
    total, dropped = 0.0, set()
    for at in order[:-1]:
        total += probabilities[at]
        if total + below > tail:
            break
        dropped.add(at)
    return [at for at in candidates if at not in dropped]

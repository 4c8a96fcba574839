"""From logits to the next token. Meaning and order are Hugging Face's:
repetition penalty, temperature, top-k, top-p, min-p.

Filters see the distribution that the filters before them left, and always keep its most likely token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Optional, Union

from . import plain_sampling
from .arrays import Array, Plain, np
from .errors import InputError, VmError


@dataclass(frozen=True)
class Sampling:
    """How to choose. The defaults are greedy: temperature 0 takes the most likely token, the lowest id among equals.

    top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. With temperature 0 only the penalty has an effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: Optional[int] = None  # None: different each time

    def __post_init__(self) -> None:
        for name, good, needed in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is off"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}, but must be {needed}.")


class Sampler:
    """Chooses tokens one after the other. Equal settings with a seed, logits and history give equal tokens everywhere.

    The random numbers are Python's `random.random()`, whose sequence for a seed is guaranteed across versions.
    """

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)  # noqa: S311  sampling text, not keys
        self._seen = bytearray(vocab_size)

    def observe(self, ids: Iterable[int]) -> None:
        """Tokens that the repetition penalty counts as used: the prompt, and what was generated."""
        for token in ids:
            self._seen[token] = 1

    def forget(self) -> None:
        """Nothing was used."""
        self._seen = bytearray(len(self._seen))

    def sample(self, logits: Union[Array, Plain]) -> int:
        """The next token after float32[vocab] logits, which are not changed. The token counts as used from now on."""
        token = self._plain(logits) if isinstance(logits, Plain) else self._numpy(logits)
        self._seen[token] = 1
        return token

    def _numpy(self, logits: Array) -> int:
        options = self.sampling
        if options.repetition_penalty != 1:
            seen = np.frombuffer(self._seen, bool)
            logits = np.where(seen, _penalised(logits, options.repetition_penalty), logits)
        best = int(logits.argmax())
        _check_finite(float(logits[best]))
        return best if options.temperature == 0 else _draw(logits, options, self._random.random())

    def _plain(self, logits: Plain) -> int:
        options, values = self.sampling, plain_sampling.floats(logits)
        if options.repetition_penalty != 1:
            values = plain_sampling.penalised(values, self._seen, options.repetition_penalty)
        best, value = plain_sampling.best(values)
        _check_finite(value)
        return best if options.temperature == 0 else plain_sampling.draw(values, options, self._random.random())


def _check_finite(best: float) -> None:
    if not math.isfinite(best):
        raise VmError(
            f"the model gave the logit {best}, so there is no next token. "
            "The weights are damaged or the model does not fit its quantisation."
        )


def _draw(logits: Array, options: Sampling, uniform: float) -> int:
    ids, probabilities = distribution(logits, options)
    cumulative = np.cumsum(probabilities)
    return int(ids[min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(ids) - 1)])


def _penalised(logits: Array, penalty: float) -> Array:
    """As transformers.RepetitionPenaltyLogitsProcessor: away from use, whatever the sign."""
    return np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty))


def distribution(logits: Array, options: Sampling) -> tuple[Array, Array]:
    """Ids that may follow, ascending, and their probabilities float64, after temperature (> 0) and the filters."""
    scaled = logits.astype(np.float64) / options.temperature
    ids = np.arange(len(logits))
    if 0 < options.top_k < len(logits):
        smallest_kept = np.partition(scaled, -options.top_k)[-options.top_k]
        ids = ids[scaled >= smallest_kept]  # ties with the k-th stay, as in transformers
    probabilities = _softmax(scaled[ids])
    if options.top_p < 1:
        keep = _nucleus(probabilities, options.top_p)
        ids, probabilities = ids[keep], _softmax(scaled[ids[keep]])
    if options.min_p > 0:
        keep = probabilities >= options.min_p * probabilities.max()
        ids, probabilities = ids[keep], _softmax(scaled[ids[keep]])
    return ids, probabilities


def _softmax(values: Array) -> Array:
    weights = np.exp(values - values.max())
    out: Array = weights / weights.sum()
    return out


def _nucleus(probabilities: Array, top_p: float) -> Array:
    """Mask of the most likely tokens that together reach top_p: least likely first, drop what sums to <= 1 - top_p."""
    tail = 1 - top_p
    # Tokens below tail / n sum to less than the tail together, so they go without being sorted.
    candidates = np.flatnonzero(probabilities >= tail / len(probabilities))
    below = 1 - probabilities[candidates].sum() if len(candidates) < len(probabilities) else 0.0
    order = candidates[np.argsort(probabilities[candidates], kind="stable")]
    dropped = order[:-1][np.cumsum(probabilities[order])[:-1] + below <= tail]
    keep = np.zeros(len(probabilities), bool)
    keep[candidates] = True
    keep[dropped] = False
    return keep

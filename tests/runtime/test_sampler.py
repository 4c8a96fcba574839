"""Sampling: cases worked by hand, transformers as the oracle, and what must hold for any logits."""
from __future__ import annotations

import bisect
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InputError, VmError
from runtime.sampler import Sampler, Sampling, distribution

LOG = [math.log(p) for p in (0.5, 0.25, 0.15, 0.1)]
TIE = 1e-5  # logits this close may have equal float32 probabilities: 20 / 2^24 at a temperature of 0.3 and more
ROUNDING = 1e-6  # float32 logits: 2^-24 relative each, times a handful of operations


def kept(**options: Any) -> dict[int, float]:
    """Ids and probabilities after the filters, for the distribution 0.5, 0.25, 0.15, 0.1."""
    ids, probabilities = distribution(np.array(LOG, np.float32), Sampling(**{"temperature": 1.0, **options}))
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def about(**expected: float) -> Any:
    return pytest.approx({int(k[1:]): v for k, v in expected.items()}, rel=ROUNDING)


def test_filters_by_hand() -> None:
    assert kept() == about(_0=0.5, _1=0.25, _2=0.15, _3=0.1)
    assert kept(top_k=2) == about(_0=2 / 3, _1=1 / 3)
    assert kept(top_k=9) == about(_0=0.5, _1=0.25, _2=0.15, _3=0.1)
    assert kept(top_p=0.7) == about(_0=2 / 3, _1=1 / 3)  # 0.5 does not reach 0.7, 0.75 does
    assert kept(top_p=0.8) == about(_0=0.5 / 0.9, _1=0.25 / 0.9, _2=0.15 / 0.9)
    assert kept(top_p=0.01) == about(_0=1.0)
    assert kept(min_p=0.4) == about(_0=2 / 3, _1=1 / 3)  # 0.4 * 0.5 = 0.2
    assert kept(min_p=1.0) == about(_0=1.0)
    assert kept(temperature=0.5) == about(_0=0.25 / 0.345, _1=0.0625 / 0.345, _2=0.0225 / 0.345, _3=0.01 / 0.345)


def test_filters_work_on_what_the_ones_before_left() -> None:
    assert kept(top_k=2, top_p=0.6) == about(_0=1.0)  # 2/3 reaches 0.6; of the whole, 0.5 would not
    assert kept(top_k=3, top_p=0.8, min_p=0.4) == about(_0=2 / 3, _1=1 / 3)  # 5/9 and 5/18 reach 0.8


def test_ties_with_the_kth_stay() -> None:
    ids, _ = distribution(np.array([1, 2, 1, 0], np.float32), Sampling(temperature=1, top_k=2))
    assert ids.tolist() == [0, 1, 2]


def test_greedy_takes_the_first_of_the_best() -> None:
    sampler = Sampler(Sampling(), 4)
    assert [sampler.sample(np.array(row, np.float32)) for row in ([1, 3, 3, 2], [0, 0, 0, 0])] == [1, 0]


def test_repetition_penalty_by_hand() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), 3)
    assert sampler.sample(np.array([4, 3, -1], np.float32)) == 0
    assert sampler.sample(np.array([4, 3, -1], np.float32)) == 1  # 4 counts as 2 now
    assert sampler.sample(np.array([4, 1.5, 1.9], np.float32)) == 0  # 2, 0.75, 1.9
    assert sampler.sample(np.array([-1, -1, -1.5], np.float32)) == 2  # -2, -2, -1.5
    sampler.forget()
    sampler.observe([0])
    assert sampler.sample(np.array([4, 3, -1], np.float32)) == 1


def test_logits_are_not_changed() -> None:
    logits = np.array(LOG, np.float32)
    logits.flags.writeable = False
    Sampler(Sampling(1.0, 2, 0.5, 0.1, 1.3, seed=1), 4).sample(logits)


def test_a_seed_fixes_the_sequence() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed), 4)
        return [sampler.sample(np.array(LOG, np.float32)) for _ in range(40)]

    assert run(5) == run(5)
    uniform = random.Random(5)
    assert run(5) == [bisect.bisect([0.5, 0.75, 0.9], uniform.random()) for _ in range(40)]
    assert run(6) != run(5)


def test_frequencies() -> None:
    draws = 4000
    sampler = Sampler(Sampling(1.0, seed=0), 4)
    counts = Counter(sampler.sample(np.array(LOG, np.float32)) for _ in range(draws))
    for token, p in enumerate((0.5, 0.25, 0.15, 0.1)):
        assert abs(counts[token] / draws - p) < 4 * math.sqrt(p * (1 - p) / draws)  # four standard deviations


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(VmError) as caught:
        Sampler(Sampling(), 2).sample(np.array([1, bad], np.float32))
    assert str(caught.value) == (
        f"the model gave the logit {bad}, so there is no next token. "
        "The weights are damaged or the model does not fit its quantisation."
    )


@pytest.mark.parametrize(("options", "message"), [
    ({"temperature": -1}, "temperature is -1, but must be 0 (greedy) or more."),
    ({"temperature": math.nan}, "temperature is nan, but must be 0 (greedy) or more."),
    ({"top_k": -1}, "top_k is -1, but must be 0 (off) or more."),
    ({"top_p": 0}, "top_p is 0, but must be above 0 and at most 1 (off)."),
    ({"top_p": 1.1}, "top_p is 1.1, but must be above 0 and at most 1 (off)."),
    ({"min_p": 2}, "min_p is 2, but must be between 0 (off) and 1."),
    ({"repetition_penalty": 0}, "repetition_penalty is 0, but must be above 0; 1 is off."),
])  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**options)
    assert str(caught.value) == message


OPTIONS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.05, 0.3, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)


@settings(max_examples=200)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40), OPTIONS)
def test_the_best_stays_and_probabilities_sum_to_one(values: list[float], options: Sampling) -> None:
    logits = np.array(values, np.float32)
    ids, probabilities = distribution(logits, options)
    assert (np.diff(ids) > 0).all()
    assert abs(probabilities.sum() - 1) < 1e-9
    assert logits[ids].max() >= logits.max() - TIE
    dropped = np.setdiff1d(np.arange(len(logits)), ids)
    assert not len(dropped) or logits[dropped].max() <= logits[ids].min() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_against_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(5, 400))
    logits = (rng.standard_normal(vocab) * 3).astype(np.float32)
    options = Sampling(
        temperature=float(rng.uniform(0.2, 2)),
        top_k=int(rng.integers(0, vocab)),
        top_p=float(rng.uniform(0.2, 0.999)),
        min_p=float(rng.choice([0, 0.05, 0.2])),
        repetition_penalty=float(rng.uniform(0.8, 1.5)),
    )
    history = rng.integers(0, vocab, 20).tolist()
    chain = [
        process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
        process.TemperatureLogitsWarper(options.temperature),
        *([process.TopKLogitsWarper(options.top_k)] if options.top_k else []),
        process.TopPLogitsWarper(options.top_p),
        *([process.MinPLogitsWarper(options.min_p)] if options.min_p else []),
    ]
    scores = torch.tensor(logits)[None].double()
    for step in chain:
        scores = step(torch.tensor([history]), scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    from runtime.sampler import _penalised

    seen = np.isin(np.arange(vocab), history)
    ids, probabilities = distribution(
        np.where(seen, _penalised(logits, options.repetition_penalty), logits), options
    )
    assert ids.tolist() == np.flatnonzero(expected).tolist()
    assert np.abs(expected[ids] - probabilities).max() < ROUNDING

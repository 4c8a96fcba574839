"""Running the toy model against its numpy definition; plans against brute force; refusals."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import device
from runtime.bundle import open_bundle
from runtime.errors import ContextFullError, DeviceError, InputError, VmError
from runtime.session import Chunk, Planner, Session
from tests.runtime import tiny

IDS = np.random.default_rng(1).integers(2, tiny.VOCAB, tiny.CONTEXT).tolist()


# --- plans -----------------------------------------------------------------------------------------------------------


def test_plans_by_hand() -> None:  # cost of a call: its rows + 4
    planner = Planner([16, 128])
    assert planner.plan(1) == [Chunk(1, 1)]
    assert planner.plan(3) == [Chunk(1, 1)] * 3  # 15 against 20
    assert planner.plan(4) == [Chunk(16, 4)]  # 20 against 20: fewer calls
    assert planner.plan(16) == [Chunk(16, 16)]
    assert planner.plan(17) == [Chunk(16, 16), Chunk(1, 1)]
    assert planner.plan(100) == [Chunk(128, 100)]  # 132 against 6 * 20 + 4 * 5
    assert planner.plan(130) == [Chunk(128, 128), Chunk(1, 1), Chunk(1, 1)]
    assert Planner([]).plan(2) == [Chunk(1, 1)] * 2


def test_plans_of_calls_that_take_any_number() -> None:
    """Nothing is padded, and no call is for a few tokens only that two calls can share."""
    planner = Planner([128], counted=128)
    assert planner.plan(1) == [Chunk(1, 1)]
    for tokens in (2, 3, 17, 127, 128):
        assert planner.plan(tokens) == [Chunk(128, tokens)]
    assert planner.plan(129) == [Chunk(128, 65), Chunk(128, 64)]
    assert planner.plan(256) == [Chunk(128, 128)] * 2
    assert planner.plan(300) == [Chunk(128, 128), Chunk(128, 86), Chunk(128, 86)]
    for tokens in range(2, 700):
        valid = [chunk.valid for chunk in planner.plan(tokens)]
        assert sum(valid) == tokens and len(valid) == -(-tokens // 128)
        assert max(valid) <= 128 and min(valid) >= min(tokens, 64)


@given(st.sets(st.integers(2, 20), max_size=3), st.integers(0, 9), st.integers(1, 60))
def test_plans_are_whole_and_cheapest(sizes: set[int], call_cost: int, tokens: int) -> None:
    @cache
    def cheapest(left: int) -> int:
        return min(s + call_cost + cheapest(left - s) for s in {1, *sizes}) if left > 0 else 0

    plan = Planner(sorted(sizes), call_cost).plan(tokens)
    assert sum(chunk.valid for chunk in plan) == tokens
    assert all(chunk.valid == chunk.tokens for chunk in plan[:-1])
    assert 1 <= plan[-1].valid <= plan[-1].tokens
    assert sum(chunk.tokens + call_cost for chunk in plan) == cheapest(tokens)


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15, 16, 17, 20, 33, tiny.CONTEXT])
def test_prefill_gives_the_last_logits(session: Session, count: int) -> None:
    logits = session.prefill(IDS[:count])
    assert logits.dtype == np.float32
    assert np.array_equal(logits, tiny.reference(IDS[:count])[-1])
    assert session.position == count


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_any_mixture_of_calls_is_one_sequence(shared_session: Session, parts: list[int]) -> None:
    session, done = shared_session, 0
    session.reset()
    for count in parts:
        count = min(count, tiny.CONTEXT - done)
        if count:
            logits = session.step(IDS[done]) if count == 1 else session.prefill(np.array(IDS[done : done + count]))
            done += count
            assert np.array_equal(logits, tiny.reference(IDS[:done])[-1])
    assert (session.position, session.remaining) == (done, tiny.CONTEXT - done)


@pytest.mark.parametrize("count", [1, 3, 16, 23, tiny.CONTEXT])
def test_logits_of_all_positions(session: Session, count: int) -> None:
    assert np.array_equal(np.concatenate(list(session.logits(IDS[:count]))), tiny.reference(IDS[:count]))


def test_reset_and_rewind(session: Session) -> None:
    session.prefill(IDS[:20])
    session.rewind(10)
    assert np.array_equal(session.step(5), tiny.reference([*IDS[:10], 5])[-1])
    session.reset()
    assert np.array_equal(session.step(5), tiny.reference([5])[-1])
    with pytest.raises(ValueError, match=r"position 2 is outside 0\.\.1"):
        session.rewind(2)


def test_views_stay_valid_while_they_are_held(session: Session) -> None:
    views = [session.step(token) for token in IDS]
    assert np.array_equal(np.stack(views), tiny.reference(IDS))
    assert not views[0].flags.writeable
    assert not views[0].flags.owndata


PINNING = """
import os, sys
from pathlib import Path
from runtime.bundle import open_bundle
from runtime import device
from runtime.session import Session
device.CLAIM += str(os.getpid())  # this process alone, whoever else runs on the machine
if sys.argv[2] == "beside another":
    other = device.claim_cpus()
    assert other is not None and device.claim_cpus() is None
if sys.argv[2] == "confined":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
session = Session(open_bundle(Path(sys.argv[1])), threads=int(sys.argv[3]))
session.prefill([3] * 20)
workers = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
print(sorted(os.sched_getaffinity(0)), sorted(map(sorted, workers)))
"""


@pytest.mark.skipif(device.affinity() != {0, 1}, reason="needs the CPUs 0 and 1 and no others")
@pytest.mark.parametrize(("how", "threads", "expected"), [
    ("free", 1, "[0, 1] []\n"),  # nothing to pin
    ("free", 2, "[0] [[1]]\n"),  # the caller gets the CPU that TVM's worker does not have
    ("beside another", 2, "[0, 1] [[0, 1]]\n"),  # somebody has these CPUs: both bound, both would stall
    ("confined", 2, "[1] [[1]]\n"),  # TVM would have put the worker on the CPU that we were not given
])  # fmt: skip
def test_pinning(toy: Path, how: str, threads: int, expected: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PINNING, str(toy), how, str(threads)], cwd=root, env=environment,
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.stdout, done.stderr) == (expected, "")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_full_context(session: Session) -> None:
    advice = "Use a shorter prompt, or rebuild the bundle with a longer context (python -m compiler build --context)."
    session.prefill(IDS[:40])
    with pytest.raises(ContextFullError) as caught:
        session.prefill(IDS[:9])
    assert str(caught.value) == f"9 tokens do not fit into the context of 48, which holds 40 already. {advice}"
    with pytest.raises(ContextFullError):
        session.logits(IDS[:9])
    assert session.position == 40
    session.prefill(IDS[40:])
    with pytest.raises(ContextFullError) as caught:
        session.step(3)
    assert str(caught.value) == f"1 token does not fit into the context of 48, which holds 48 already. {advice}"


@pytest.mark.parametrize("token", [-1, tiny.VOCAB, 1 << 40])
def test_ids_outside_the_vocabulary(session: Session, token: int) -> None:
    for call in (session.step, lambda t: session.prefill([3, t])):
        with pytest.raises(InputError) as caught:
            call(token)
        assert str(caught.value) == f"token id {token} is outside the vocabulary 0..31."
    assert session.position == 0


@pytest.mark.parametrize(("ids", "what"), [([], "float64[0]"), ([[3]], "int64[1, 1]"), ([1.5], "float64[1]")])
def test_ids_of_the_wrong_kind(session: Session, ids: list[int], what: str) -> None:
    with pytest.raises(InputError) as caught:
        session.prefill(ids)
    assert str(caught.value) == f"ids are {what}, but a list of at least one integer is needed."


def test_a_function_that_the_library_lacks(bundle: Path) -> None:
    functions = json.loads((bundle / "manifest.json").read_text())["functions"]
    functions["prefill_2"] = {**functions["prefill_16"], "tokens": 2}
    functions["logits_2"] = {**functions["prefill_2"], "output": {"dtype": "float32", "shape": [2, tiny.VOCAB]}}
    tiny.edit_manifest(bundle, functions=functions)
    with pytest.raises(VmError) as caught:
        Session(open_bundle(bundle), threads=1)
    assert str(caught.value) == f"{bundle / 'model.so'}: has no function 'prefill_2'. Rebuild the bundle."


def test_arguments_that_the_library_refuses(bundle: Path) -> None:
    """TVM's own error comes through as a message; the next call works as if nothing had happened."""
    data = json.loads((bundle / "manifest.json").read_text())
    data["functions"]["decode"]["inputs"][2:4] = ["embedding", "cache"]
    tiny.edit_manifest(bundle, functions=data["functions"])
    session = Session(open_bundle(bundle), threads=1)
    with pytest.raises(VmError) as caught:
        session.step(3)
    text = str(caught.value)
    assert text.startswith(f"{bundle / 'model.so'}: function 'decode' failed: ")
    assert text.endswith(" Rebuild the bundle with this release of quern.")
    assert session.position == 0
    assert len(session.prefill(IDS[:16])) == tiny.VOCAB


def test_more_memory_than_there_is(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_bytes", lambda: 1000)
    with pytest.raises(DeviceError) as caught:
        Session(open_bundle(toy), threads=1)
    assert str(caught.value) == (
        f"{toy}: caches and activations need 0 MiB, but this machine has 0 MiB. "
        "Rebuild the bundle with a shorter context (python -m compiler build --context)."
    )


def test_a_session_gives_everything_back(toy: Path) -> None:
    """No cycles: the machine and the tensors die with the session, the views that are still held do not."""
    session = Session(open_bundle(toy), threads=1)
    logits = session.prefill(IDS[:5])
    machine = weakref.ref(session.machine.vm)
    del session
    assert machine() is None
    assert np.array_equal(logits, tiny.reference(IDS[:5])[-1])

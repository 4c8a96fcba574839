"""A prompt taken in chunks and the same prompt token by token, up to a context that is full to the last position."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import ContextFullError
from runtime.session import Session
from runtime.tokenizer import Tokenizer
from tests.end_to_end import reference
from tests.end_to_end.bundles import F32, Bundles, Sessions, all_logits
from tests.end_to_end.conftest import Figure
from tests.end_to_end.places import DEMO, OWN_TEXT, STORIES260K

LENGTHS = (1, 15, 16, 17, 127, 128, 129, 300)
CONTEXT = 75  # no multiple of 16, which is what caches are made of
PATHS = ("exact", "int8")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer(DEMO / "tokenizer.json").encode(OWN_TEXT.read_text(encoding="utf-8"))


def one_by_one(session: Session, ids: list[int]) -> F32:
    session.reset()
    return np.array([session.step(token).copy() for token in ids])


@pytest.fixture(scope="module")
def stepped(bundles: Bundles, sessions: Sessions, ids: list[int]) -> dict[str, F32]:
    """Logits of the longest prompt, token by token, on each path."""
    return {path: one_by_one(sessions(bundles(DEMO, activations=path)), ids[: max(LENGTHS)]) for path in PATHS}


@pytest.fixture(scope="module")
def bound(stepped: dict[str, F32]) -> dict[str, float]:
    """What a different order of sums may do to a logit.

    exact: the same as against the reference, see there. int8: such a difference may round an activation the other way,
    and that rounds others in later layers. Two runs are then two roundings of one exact model, each as far from it as
    int8 takes a logit at all, which is measured here: apart by at most twice that.
    """
    noise = float(np.abs(stepped["int8"] - stepped["exact"]).max())
    return {"exact": reference.tolerance(reference.model(DEMO), stepped["exact"]), "int8": 2 * noise}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("path", PATHS)
def test_chunks_give_the_logits_of_single_tokens(
    path: str,
    length: int,
    bundles: Bundles,
    sessions: Sessions,
    ids: list[int],
    stepped: dict[str, F32],
    bound: dict[str, float],
    figure: Figure,
) -> None:
    session = sessions(bundles(DEMO, activations=path))
    chunked = all_logits(session, ids[:length])
    assert chunked.shape == (length, 2048)
    figure("differs by", float(np.abs(chunked - stepped[path][:length]).max()))
    figure("may differ by", bound[path])
    assert np.abs(chunked - stepped[path][:length]).max() <= bound[path]
    after_chunks = session.step(ids[length]).copy()
    session.reset()
    # A prompt's last row goes through the last layer alone, in kernels of one row; keys and values have the same bits.
    assert np.abs(session.prefill(ids[:length]) - chunked[-1]).max() <= bound[path]
    assert np.array_equal(session.step(ids[length]), after_chunks)
    if length < len(stepped[path]):
        assert np.abs(after_chunks - stepped[path][length]).max() <= bound[path]


def test_one_token_is_the_same_call(
    bundles: Bundles, sessions: Sessions, ids: list[int], stepped: dict[str, F32]
) -> None:
    for path in PATHS:
        assert np.array_equal(all_logits(sessions(bundles(DEMO, activations=path)), ids[:1]), stepped[path][:1])


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_in_pieces(path: str, bundles: Bundles, sessions: Sessions, ids: list[int]) -> None:
    """To the bit the same, wherever it is cut: a call computes as many rows as there are tokens, each by itself."""
    session = sessions(bundles(DEMO, activations=path))
    pieces = ((0, 7), (7, 150), (150, 152), (152, 300))
    whole, last = all_logits(session, ids[:300]), {}
    for _, stop in pieces:
        session.reset()
        last[stop] = session.prefill(ids[:stop]).copy()
    session.reset()
    for start, stop in pieces:
        assert np.array_equal(session.prefill(ids[start:stop]), last[stop])
    session.reset()
    for start, stop in pieces:
        assert np.array_equal(np.concatenate(list(session.logits(ids[start:stop]))), whole[start:stop])


def full(message: str, context: int, wanted: str = "1 token does") -> None:
    assert message == (
        f"{wanted} not fit into the context of {context}, which holds {context} already. "
        "Use a shorter prompt, or rebuild the bundle with a longer context (python -m compiler build --context)."
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_whole_context(path: str, bundles: Bundles, sessions: Sessions, ids: list[int]) -> None:
    session = sessions(bundles(DEMO, activations=path))
    first = all_logits(session, ids[:512])
    assert (session.position, session.remaining) == (512, 0)
    with pytest.raises(ContextFullError) as refusal:
        session.step(3)
    full(str(refusal.value), 512)
    with pytest.raises(ContextFullError) as refusal:
        session.prefill([3, 4])
    full(str(refusal.value), 512, "2 tokens do")
    assert np.array_equal(all_logits(session, ids[:512]), first)  # a refusal breaks nothing
    if path == "exact":
        model = reference.model(DEMO)
        want = reference.logits(model, ids[:512])
        assert np.abs(first - want).max() < reference.tolerance(model, want)


def test_a_context_that_fills_no_block(bundles: Bundles, sessions: Sessions) -> None:
    text = Tokenizer(STORIES260K / "tokenizer.json").encode(OWN_TEXT.read_text(encoding="utf-8"))[: CONTEXT + 1]
    session = sessions(bundles(STORIES260K, activations="exact", context=CONTEXT))
    model = reference.model(STORIES260K)
    want = reference.logits(model, text[:CONTEXT])
    bound = reference.tolerance(model, want)
    assert np.abs(one_by_one(session, text[:CONTEXT]) - want).max() < bound
    assert session.remaining == 0
    assert np.abs(all_logits(session, text[:CONTEXT]) - want).max() < bound
    with pytest.raises(ContextFullError) as refusal:
        session.step(text[CONTEXT])
    full(str(refusal.value), CONTEXT)
    session.reset()
    with pytest.raises(ContextFullError) as refusal:
        session.prefill(text)
    assert str(refusal.value).startswith(f"76 tokens do not fit into the context of {CONTEXT}, which holds 0 ")
    assert session.remaining == CONTEXT

"""Turns of a conversation: their text, their ids, and the cache that is kept between them."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from runtime.chat import Conversation, Part, converse, encode, turn
from runtime.errors import ContextFullError, InputError
from runtime.manifest import ChatFormat
from runtime.sampler import Sampler, Sampling
from runtime.session import Chunk, Session
from runtime.tokenizer import Tokenizer
from tests.runtime import tiny

CHATML = ChatFormat(
    format="turns",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    start="<s>",
    generation_prompt="<|im_start|>assistant\n",
    default_system=None,
)


def text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)


def test_turns_by_hand() -> None:
    assert text(turn(CHATML, "Hi", first=True)) == (
        "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert text(turn(CHATML, "Hi", first=True, system="Be brief.")) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(turn(CHATML, "More", first=False, system="Be brief.")) == (
        "<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_default_system_message_gives_way_to_the_users() -> None:
    chat = dataclasses.replace(CHATML, default_system="You are Q.")
    assert text(turn(chat, "Hi", first=True)) == (
        "<s><|im_start|>system\nYou are Q.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(turn(chat, "Hi", first=True, system="Be brief.")) == text(turn(CHATML, "Hi", True, "Be brief."))
    assert text(turn(chat, "More", first=False)) == text(turn(CHATML, "More", first=False))


def test_a_system_message_that_the_model_does_not_know(
    session: Session, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = dataclasses.replace(CHATML, system=None)
    monkeypatch.setattr(session, "manifest", dataclasses.replace(session.manifest, chat=chat))
    with pytest.raises(InputError) as refusal:
        Conversation(session, tokenizer, Sampler(Sampling(), tiny.VOCAB), 9, system="hm")
    assert str(refusal.value) == "the model's chat template has no system message. Leave out --system."


def test_without_a_format_the_text_goes_on() -> None:
    assert text(turn(None, "Once", first=True, system="ignored")) == "Once"
    assert text(turn(None, "upon", first=False)) == "\nupon"


def test_what_the_user_writes_is_never_special(toy: Path) -> None:
    tokenizer = Tokenizer(toy / "tokenizer.json")
    plain = encode(tokenizer, [Part("</s>u", False), Part("ab", True)], special=False)
    assert plain == [tiny.EOS, *tokenizer.encode("uab")]
    sly = encode(tokenizer, [Part("</s>u", False), Part("a</s>b", True)], special=False)
    assert sly.count(tiny.EOS) == 1
    assert sly[0] == tiny.EOS


@pytest.fixture
def tokenizer(toy: Path) -> Tokenizer:
    return Tokenizer(toy / "tokenizer.json")


class Fixed(Sampler):
    """Says what it was told to say."""

    def __init__(self, *tokens: int) -> None:
        super().__init__(Sampling(), tiny.VOCAB)
        self._tokens: Iterator[int] = iter(tokens)

    def sample(self, logits: Any) -> int:
        return next(self._tokens)


def state(session: Session, expected: list[int]) -> None:
    """The cache holds these tokens, no more and no less."""
    assert session.position == len(expected)
    assert np.array_equal(session.step(9), tiny.reference([*expected, 9])[-1])
    session.rewind(len(expected))


def test_the_cache_holds_the_whole_conversation(session: Session, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode
    chat = Conversation(session, tokenizer, Fixed(*ids("xyz"), tiny.EOS, *ids("qq"), tiny.EOS), 9, system="hm")
    assert "".join(chat.say("ab")) == "xyz"
    state(session, ids("s.hmu.aba.xyz"))
    assert "".join(chat.say("c")) == "qq"
    state(session, ids("s.hmu.aba.xyz!u.ca.qq"))


def test_a_reply_that_was_cut_off_is_completed_first(session: Session, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode
    chat = Conversation(session, tokenizer, Fixed(*ids("xyzq"), tiny.EOS), max_new_tokens=3)
    assert "".join(chat.say("ab")) == "xyz"
    state(session, ids("u.aba.xy"))  # z was said but not taken in yet
    assert "".join(chat.say("c")) == "q"
    state(session, ids("u.aba.xyz!u.ca.q"))


def test_a_stop_string_ends_a_reply(session: Session, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode
    chat = Conversation(session, tokenizer, Fixed(*ids("xyz")), 9, stops=["yz"])
    assert "".join(chat.say("ab")) == "x"
    state(session, ids("u.aba.xy"))


def test_a_turn_that_does_not_fit_changes_nothing(session: Session, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode
    chat = Conversation(session, tokenizer, Fixed(*ids("xx"), *ids("y"), tiny.EOS), 2)
    "".join(chat.say("ab"))
    with pytest.raises(ContextFullError):
        "".join(chat.say("c" * 40))
    state(session, ids("u.aba.x"))
    assert "".join(chat.say("c")) == "y"
    state(session, ids("u.aba.xx!u.ca.y"))


class Interrupted(Fixed):
    """Ctrl-C comes where a token is None."""

    def sample(self, logits: Any) -> int:
        token = super().sample(logits)
        if token is None:
            raise KeyboardInterrupt
        return token


def test_an_interrupt_ends_a_reply_and_not_the_conversation(session: Session, tokenizer: Tokenizer) -> None:
    ids, none = tokenizer.encode, cast(int, None)
    chat = Conversation(session, tokenizer, Interrupted(*ids("xy"), none, *ids("q"), tiny.EOS, none), 9)
    lines, written = iter(["ab", "c", "d"]), list[str]()
    with pytest.raises(StopIteration):
        converse(chat, lambda: next(lines), written.append, interactive=True)
    said = "\n(interrupted; /exit leaves)\n"
    assert "".join(written) == f"xy{said}q\n{said}"
    state(session, ids("u.aba.xy!u.ca.q!u.da."))
    with pytest.raises(KeyboardInterrupt):
        converse(Conversation(session, tokenizer, Interrupted(none), 9), lambda: "ab", written.append)


def test_an_interrupted_turn_was_not_said(
    session: Session, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode
    chat = Conversation(session, tokenizer, Fixed(*ids("xx"), *ids("y"), tiny.EOS), 2)
    "".join(chat.say("ab"))
    run, calls = session._run, list[int]()

    def second(chunk: Chunk, taken: Any) -> Any:
        calls.append(chunk.valid)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(chunk, taken)

    monkeypatch.setattr(session, "_run", second)
    with pytest.raises(KeyboardInterrupt):
        "".join(chat.say("c" * 20))
    assert len(calls) == 2
    state(session, ids("u.aba.x"))
    monkeypatch.undo()
    assert "".join(chat.say("c")) == "y"
    state(session, ids("u.aba.xx!u.ca.y"))


def test_the_loop(session: Session, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode
    chat = Conversation(session, tokenizer, Fixed(*ids("x"), tiny.EOS, *ids("y"), tiny.EOS), 9)
    lines = iter(["ab", "", "/help", "c" * 50, "/reset", "ab", "/exit", "never"])
    written: list[str] = []
    converse(chat, lambda: next(lines), written.append)
    assert "".join(written) == (
        "x\n"
        "(unknown command /help: /reset starts over, Ctrl-C ends a reply, /exit (or end of input) leaves.)\n"
        "(55 tokens do not fit into the context of 48, which holds 7 already. Use a shorter prompt, or rebuild the "
        "bundle with a longer context (python -m compiler build --context). "
        "/reset starts over, Ctrl-C ends a reply, /exit (or end of input) leaves.)\n"
        "(new conversation)\n"
        "y\n"
    )
    assert next(lines) == "never"
    state(session, ids("u.aba.y"))

"""OpenAI's requests: what is taken, what is refused and how, and the conversation that a list of messages is."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from runtime import manifest as mf
from runtime.chat import Part, messages, turn
from runtime.completions import Asked, Defaults, Reader, parse
from runtime.errors import InputError
from runtime.sampler import Sampling
from tests.runtime.test_chat import CHATML, text

DEFAULTS = Defaults(Sampling(temperature=0.5, seed=3), 77, ("END",))
HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def reader(toy: Path) -> Reader:
    found = mf.load(toy / mf.FILE_NAME)
    return Reader(dataclasses.replace(found, chat=CHATML), DEFAULTS)


def test_a_conversation_is_its_turns_one_behind_the_other() -> None:
    spoken = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
    by_turns = text(turn(CHATML, "A", True, "S")) + "B" + text(turn(CHATML, "C", first=False))
    assert text(messages(CHATML, spoken)) == by_turns  # type: ignore[arg-type]
    assert text(messages(None, spoken[1:])) == "A\nB\nC"  # type: ignore[arg-type]
    chat = dataclasses.replace(CHATML, default_system="D")
    assert text(messages(chat, [("user", "A")])) == text(turn(chat, "A", first=True))
    assert text(messages(chat, spoken)) == text(messages(CHATML, spoken))  # type: ignore[arg-type]


def test_what_a_request_does_not_say_is_the_servers(reader: Reader) -> None:
    parts = tuple(messages(CHATML, [("user", "Hi")]))
    wanted = Asked(parts, False, (), DEFAULTS.sampling, 77, ("END",), stream=False, usage=False, chat=True)
    assert reader.chat({"messages": HI}) == wanted
    idle = {"temperature": None, "stop": None, "model": "x", "user": "me", "n": 1}
    assert reader.chat({"messages": HI, **idle}) == wanted


def test_all_that_a_request_may_say(reader: Reader) -> None:
    said = {
        "temperature": 1, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 9,
        "max_tokens": 5, "stop": ["a", "b"], "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    asked = reader.text({"prompt": "Once", **said})
    assert asked == Asked(
        (Part("Once", False),), True, (), Sampling(1.0, 5, 0.9, 0.1, 1.2, 9), 5, ("a", "b"), True, True, chat=False
    )
    assert reader.chat({"messages": HI, "max_tokens": 5, "max_completion_tokens": 6}).max_new_tokens == 6
    assert reader.text({"prompt": [4, 5]}).ids == (4, 5)
    assert reader.text({"prompt": ["Once"], "stop": "x"}).stops == ("x",)
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert reader.chat({"messages": [{"role": "user", "content": parts}]}).parts == reader.chat({"messages": HI}).parts


@pytest.mark.parametrize(("change", "message"), [
    ({"messages": None}, "messages is null, but must be a list of 1 to 4096 messages."),
    ({"messages": []}, "messages is [], but must be a list of 1 to 4096 messages."),
    ({"messages": ["Hi"]}, 'messages[0] is "Hi", but must be an object with role and content.'),
    ({"messages": [{"role": "tool", "content": ""}]},
     'messages[0].role is "tool", but must be one of system, developer, user, assistant.'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content must be a text, or a list of parts of the type text."),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
     "messages[0].content must be a text, or a list of parts of the type text."),
    ({"messages": [*HI, *HI]}, "messages[1] is of the role user where assistant speaks: after a system message, which "
                               "may only be the first, user and assistant take turns."),
    ({"messages": [*HI, {"role": "assistant", "content": "Ho"}]},
     "the last message is not the user's, so there is nothing to answer."),
    ({"messages": [{"role": "system", "content": "Ho"}]},
     "the last message is not the user's, so there is nothing to answer."),
    ({"temperature": "hot"}, 'temperature is "hot", but must be a number.'),
    ({"temperature": True}, "temperature is true, but must be a number."),
    ({"temperature": -1}, "temperature is -1.0, but must be 0 (greedy) or more."),
    ({"top_k": 1.5}, "top_k is 1.5, but must be an integer."),
    ({"seed": "x"}, 'seed is "x", but must be an integer.'),
    ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1."),
    ({"stop": 5}, "stop is 5, but must be a text or a list of at most 16 texts."),
    ({"stop": [""]}, "a stop string is empty, but it must have at least one character."),
    ({"stream": 1}, "stream is 1, but must be true or false."),
    ({"stream_options": []}, "stream_options is [], but must be an object."),
    ({"stream_options": {"x": 1}}, "stream_options.x is no field that this server knows. Leave it out."),
    ({"n": 2}, "n is 2, which this server cannot do. Leave it out."),
    ({"tools": [{"type": "function"}]}, 'tools is [{"type": "function"}], which this server cannot do. Leave it out.'),
    ({"temprature": 0}, "temprature is no field that this server knows. Leave it out."),
])  # fmt: skip
def test_refused(reader: Reader, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        reader.chat({"messages": HI, **change})
    assert str(refusal.value) == message


def test_prompts_that_are_refused(reader: Reader, toy: Path) -> None:
    for prompt, said in (({"a": 1}, '{"a": 1}'), ([1, "a"], '[1, "a"]'), ([True], "[true]")):
        with pytest.raises(InputError) as refusal:
            reader.text({"prompt": prompt})
        assert str(refusal.value) == f"prompt is {said}, but must be a text or a list of token ids."
    found = mf.load(toy / mf.FILE_NAME)
    silent = Reader(dataclasses.replace(found, chat=dataclasses.replace(CHATML, system=None)), DEFAULTS)
    with pytest.raises(InputError) as refusal:
        silent.chat({"messages": [{"role": "system", "content": "S"}, *HI]})
    assert str(refusal.value) == (
        "messages[0] is of the role system, which the model's chat template does not have."
    )  # fmt: skip


@pytest.mark.parametrize(("body", "message"), [
    (b"\xff", "the request is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte."),
    (b"{", "the request is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
    (b'{"a": NaN}', "the request is not JSON: NaN is no number."),
    (b'{"a": %s}' % (b"1" * 100_000), "the request is not JSON: a number has 100000 digits."),
    (b"[]", "the request is [], but must be a JSON object."),
])  # fmt: skip
def test_what_is_no_request(body: bytes, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse(body)
    assert str(refusal.value) == message


def test_depth_is_refused_and_not_followed() -> None:
    with pytest.raises(InputError) as refusal:
        parse(b"[" * 1_000_000)
    assert str(refusal.value).startswith("the request is not JSON: ")
    assert parse(json.dumps({"messages": HI}).encode()) == {"messages": HI}

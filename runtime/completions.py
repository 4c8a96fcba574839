"""OpenAI's requests for text, read defensively: JSON in, ids and settings out; and the JSON that answers them.

Field names and shapes are those of the "completions" and "chat completions" of OpenAI's API reference, plus `top_k`,
`min_p` and `repetition_penalty` with the meaning they have in sampler.py. A field that would change the answer in a way
this runtime cannot is refused, and so is one that nobody knows: a misspelt option should not pass for a granted one.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional, TypeVar, Union

from .chat import Part, Role, messages
from .errors import InputError
from .manifest import Manifest
from .sampler import Sampling
from .tokenizer import StopStrings

Number = TypeVar("Number", int, Optional[int])
MOST_DIGITS = 20  # of an integer; Python takes quadratic time for long ones
MOST_STOPS, MOST_MESSAGES = 16, 4096
ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields with no effect here, whatever they say.
IDLE = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
# Fields whose effect this runtime does not have, and the values that ask for none.
WITHOUT_EFFECT: Mapping[str, Sequence[object]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets."""

    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A request. The prompt is text in parts, with start and end tokens around it if `special`, or it is ids.

    stream: answered piece by piece, at the end with a count of tokens if `usage`. chat: which shape.
    """

    parts: tuple[Part, ...]
    special: bool
    ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    chat: bool


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: the prompt's, those of them that the cache still held, and those that were chosen."""

    prompt: int
    cached: int
    chosen: int


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises InputError."""

    def integer(text: str) -> int:
        if len(text) > MOST_DIGITS:
            raise ValueError(f"a number has {len(text)} digits")
        return int(text)

    def constant(text: str) -> float:
        raise ValueError(f"{text} is no number")

    try:
        found = json.loads(body.decode("utf-8"), parse_int=integer, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise InputError(f"the request is {_said(found)}, but must be a JSON object.")
    return found


class Reader:
    """Requests for one model."""

    def __init__(self, manifest: Manifest, defaults: Defaults) -> None:
        self._form, self._defaults = manifest.chat, defaults

    def chat(self, request: Mapping[str, Any]) -> Asked:
        """A request of /v1/chat/completions."""
        fields = _Fields(request)
        turns = self._turns(fields)
        form = self._form
        if form is not None and form.system is None and turns[0][0] == "system":
            raise InputError("messages[0] is of the role system, which the model's chat template does not have.")
        return self._asked(fields, messages(form, turns), (), special=form is None, chat=True)

    def text(self, request: Mapping[str, Any]) -> Asked:
        """A request of /v1/completions: `prompt` is a text or a list of ids."""
        fields = _Fields(request)
        prompt = fields.take("prompt", "")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._asked(fields, (Part(prompt, False),), (), special=True, chat=False)
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return self._asked(fields, (), prompt, special=True, chat=False)
        raise InputError(f"prompt is {_said(prompt)}, but must be a text or a list of token ids.")

    def _turns(self, fields: _Fields) -> list[tuple[Role, str]]:
        """Role and text of each message: perhaps a system message, then user and assistant in turns, the user last."""
        given = fields.take("messages", None)
        if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
            raise InputError(f"messages is {_said(given)}, but must be a list of 1 to {MOST_MESSAGES} messages.")
        turns = [_message(f"messages[{i}]", message) for i, message in enumerate(given)]
        wanted: Role = "user"
        for i, (role, _) in enumerate(turns):
            if i == 0 and role == "system":
                continue
            if role != wanted:
                raise InputError(
                    f"messages[{i}] is of the role {role} where {wanted} speaks: after a system message, which may "
                    f"only be the first, user and assistant take turns."
                )
            wanted = "assistant" if role == "user" else "user"
        if turns[-1][0] != "user":
            raise InputError("the last message is not the user's, so there is nothing to answer.")
        return turns

    def _asked(self, fields: _Fields, parts: Sequence[Part], ids: Sequence[int], special: bool, chat: bool) -> Asked:
        """The rest of a request, which is alike in both."""
        defaults = self._defaults
        limit = fields.integer("max_tokens", defaults.max_new_tokens)
        if chat:
            limit = fields.integer("max_completion_tokens", limit)
        if limit < 1:
            raise InputError(f"max_tokens is {limit}, but must be at least 1.")
        sampling = replace(
            defaults.sampling,
            temperature=fields.number("temperature", defaults.sampling.temperature),
            top_k=fields.integer("top_k", defaults.sampling.top_k),
            top_p=fields.number("top_p", defaults.sampling.top_p),
            min_p=fields.number("min_p", defaults.sampling.min_p),
            repetition_penalty=fields.number("repetition_penalty", defaults.sampling.repetition_penalty),
            seed=fields.integer("seed", defaults.sampling.seed),
        )
        stops, stream = fields.texts("stop", defaults.stops), fields.boolean("stream", False)
        StopStrings(stops)  # refuses empty ones
        options = _Fields(fields.mapping("stream_options"), "stream_options.")
        usage = options.boolean("include_usage", False)
        options.take("include_obfuscation", None)
        options.finish()
        fields.take("model", None)  # a server has one
        fields.finish()
        return Asked(tuple(parts), special, tuple(ids), sampling, limit, stops, stream, usage, chat)


class _Fields:
    """Typed reads of a JSON object; what is null is not there. `finish` refuses what nobody has read."""

    def __init__(self, given: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in given.items() if value is not None}
        self._where = where

    def take(self, name: str, default: Any) -> Any:
        """The value as it is."""
        return self._left.pop(name, default)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.take(name, default)
        if type(value) not in (int, float) or abs(value) > 1e30:  # bool is an int, and 1e999 is read as infinity
            raise self._wrong(name, value, "a number")
        return float(value)

    def integer(self, name: str, default: Number) -> Union[int, Number]:
        """An integer."""
        if name not in self._left:
            return default
        value = self.take(name, None)
        if type(value) is not int:
            raise self._wrong(name, value, "an integer")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def texts(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A text or a few."""
        value = self.take(name, list(default))
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > MOST_STOPS or not all(isinstance(text, str) for text in found):
            raise self._wrong(name, value, f"a text or a list of at most {MOST_STOPS} texts")
        return tuple(found)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; an empty one if there is none."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value

    def finish(self) -> None:
        """Raise InputError for what is left, unless it asks for nothing."""
        for name, value in self._left.items():
            if name in IDLE or any(value == idle for idle in WITHOUT_EFFECT.get(name, ())):
                continue
            if name in WITHOUT_EFFECT:
                raise InputError(f"{self._where}{name} is {_said(value)}, which this server cannot do. Leave it out.")
            raise InputError(f"{self._where}{name[:60]} is no field that this server knows. Leave it out.")

    def _wrong(self, name: str, value: object, needed: str) -> InputError:
        return InputError(f"{self._where}{name} is {_said(value)}, but must be {needed}.")


def _message(where: str, message: object) -> tuple[Role, str]:
    """Role and text; a content of several text parts is one text."""
    if not isinstance(message, dict):
        raise InputError(f"{where} is {_said(message)}, but must be an object with role and content.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}.role is {_said(role)}, but must be one of {', '.join(ROLES)}.")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(map(str, texts)) if list(map(type, texts)) == [str] * len(content) else None
    if not isinstance(content, str):
        raise InputError(f"{where}.content must be a text, or a list of parts of the type text.")
    return ROLES[role], content


def _said(value: object) -> str:
    """A value in a message, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Answer:
    """The JSON of one answer, whole or in pieces."""

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        """All at once."""
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [_choice(said, reason)], "usage": _usage(usage)}

    def first(self) -> Optional[dict[str, Any]]:
        """What opens a stream: who speaks."""
        return self._piece([_choice({"delta": {"role": "assistant", "content": ""}}, None)]) if self._chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """Text that goes on the text before."""
        return self._piece([_choice({"delta": {"content": text}} if self._chat else {"text": text}, None)])

    def last(self, reason: str) -> dict[str, Any]:
        """Why it ended."""
        return self._piece([_choice({"delta": {}} if self._chat else {"text": ""}, reason)])

    def counts(self, usage: Usage) -> dict[str, Any]:
        """How many tokens it was, in a piece of its own."""
        return {**self._piece([]), "usage": _usage(usage)}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}


def _choice(said: Mapping[str, Any], reason: Optional[str]) -> dict[str, Any]:
    names = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
    return {"index": 0, **said, "logprobs": None, "finish_reason": None if reason is None else names[reason]}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.chosen,
        "total_tokens": usage.prompt + usage.chosen,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }

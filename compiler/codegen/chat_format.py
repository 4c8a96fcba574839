"""Chat templates, worked out at build time: the device gets the text around each turn and needs no template engine.

The checkpoint's Jinja template is run, sandboxed, on conversations of marker texts. If it merely wraps each turn, the
wrapping is read off; a second, longer conversation must then come out the same, or the template is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from compiler.errors import CheckpointError
from runtime.manifest import ChatFormat

MOST_BYTES = 1 << 20
Message = dict[str, str]


def derive(files: Mapping[str, bytes]) -> tuple[ChatFormat | None, str]:
    """The turn format from a tokenizer's files by name, or None, with a line for the user either way."""
    template, specials = _read(files)
    if template is None:
        return None, "no chat template: chat continues plain text"
    try:
        return _derive(template, specials), "chat template turned into turns"
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, OverflowError) as error:
        return None, f"chat template does more than wrap turns ({str(error)[:80]}): chat continues plain text"


def _read(files: Mapping[str, bytes]) -> tuple[str | None, dict[str, str]]:
    config_file, template_file = files.get("tokenizer_config.json", b""), files.get("chat_template.jinja", b"")
    try:
        config = json.loads(config_file.decode("utf-8")) if 0 < len(config_file) <= MOST_BYTES else {}
        if 0 < len(template_file) <= MOST_BYTES:
            return template_file.decode("utf-8"), _specials(config)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The checkpoint's tokenizer_config.json cannot be read: {error}. Fetch it again."
        ) from None
    template = config.get("chat_template") if isinstance(config, dict) else None
    return (template if isinstance(template, str) else None), _specials(config)


def _specials(config: Any) -> dict[str, str]:
    """bos_token, eos_token and their like; each is a string or an object with `content`."""
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key) if isinstance(config, dict) else None
        value = value.get("content") if isinstance(value, dict) else value
        found[key] = value if isinstance(value, str) else ""
    return found


def _derive(source: str, specials: dict[str, str]) -> ChatFormat:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(source)

    def render(messages: list[Message], prompt: bool = False) -> str:
        return template.render(messages=messages, add_generation_prompt=prompt, **specials)

    system = _accepts_system(render)
    marks = {"system": "\ue000S\ue000", "user": "\ue000U\ue000", "assistant": "\ue000A\ue000"}
    turn = [{"role": "user", "content": marks["user"]}, {"role": "assistant", "content": marks["assistant"]}]
    next_user = {"role": "user", "content": "\ue000V\ue000"}
    text = render([*turn, next_user])
    before, rest = _cut(text, marks["user"])
    between, rest = _cut(rest, marks["assistant"])
    again, after_user = _cut(rest, next_user["content"])
    prompt = render([*turn, next_user], True)
    if not prompt.startswith(text):
        raise ValueError("the generation prompt changes earlier text")
    generation = prompt[len(text) :]
    return _settle(render, specials, system, marks, (before, between, again, after_user, generation))


def _settle(
    render: Any, specials: dict[str, str], system: bool, marks: dict[str, str], cuts: tuple[str, ...]
) -> ChatFormat:
    before, between, again, after_user, generation = cuts
    # between = user's end + assistant's start, again = assistant's end + user's start; the user's end ends the text.
    if not between.startswith(after_user):
        after_user = ""
    assistant_before = between[len(after_user) :]
    start, user_before = "", before
    while start != before and not again.endswith(user_before):
        start, user_before = before[: len(start) + 1], before[len(start) + 1 :]
    assistant_after = again[: len(again) - len(user_before)] if user_before else again
    system_pair = ("", "")
    if system:
        whole = render([{"role": "system", "content": marks["system"]}, {"role": "user", "content": marks["user"]}])
        head, rest = _cut(whole, marks["system"])
        gap, _ = _cut(rest, marks["user"])
        if not head.startswith(start) or not gap.endswith(user_before):
            raise ValueError("the system turn changes the text around it")
        system_pair = (head[len(start) :], gap[: len(gap) - len(user_before)])
    made = ChatFormat(
        "turns", system_pair, (user_before, after_user), (assistant_before, assistant_after), start, generation
    )
    _prove(render, made, system)
    return made


def _prove(render: Any, chat: ChatFormat, system: bool) -> None:
    """Three turns of plain words must come out of the format exactly as out of the template."""
    roles = [*(["system"] if system else []), "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"word {i}"} for i, role in enumerate(roles)]
    pairs = {"system": chat.system, "user": chat.user, "assistant": chat.assistant}
    mine = chat.start + "".join(pairs[m["role"]][0] + m["content"] + pairs[m["role"]][1] for m in messages)
    if mine + chat.generation_prompt != render(messages, True):
        raise ValueError("turns depend on each other")


def _accepts_system(render: Any) -> bool:
    message = [{"role": "system", "content": "\ue000S\ue000"}, {"role": "user", "content": "\ue000U\ue000"}]
    try:
        return "\ue000S\ue000" in render(message)
    except (jinja2.TemplateError, ValueError):
        return False


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise ValueError("a turn's text is changed or repeated")
    return before, after

"""Chat templates, worked out at build time: the device gets the text around each turn and needs no template engine.

The checkpoint's Jinja template is run, sandboxed, on conversations of marker texts. If it merely wraps each turn, the
wrapping is read off; longer conversations of plain words must then come out the same, or the template is refused.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from compiler.errors import CheckpointError
from runtime.manifest import ChatFormat

REPO = str(Path(__file__).parents[2])  # where `compiler` lies
MOST_BYTES = 1 << 20
MOST_SECONDS, MOST_MEMORY = 10, 1 << 30  # of a template: those in use take milliseconds and 60 MiB, Python included
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
Render = Callable[[Sequence[tuple[str, str]], bool], str]  # (role, content) pairs, whether to end with a prompt


def derive(files: Mapping[str, bytes], where: Path) -> tuple[ChatFormat | None, str]:
    """The turn format from a tokenizer's files by name, or None, with a line for the user. `where` opens messages."""
    template, specials = _read(files, where)
    if template is None:
        return None, "no chat template: chat continues plain text"
    made, why = _bounded(template, specials)
    if made is None:
        return None, f"chat template does more than wrap turns ({why}): chat continues plain text"
    return made, "chat template turned into turns" + ("" if made.system else ", without a system message")


def _bounded(template: str, specials: dict[str, str]) -> tuple[ChatFormat | None, str]:
    """(format, or None and why) from a process that can take neither long nor much: the sandbox bounds neither."""
    request = {"template": template, "specials": specials, "seconds": MOST_SECONDS, "nbytes": MOST_MEMORY}
    start = f"import sys; sys.path.append({REPO!r}); from compiler.codegen import chat_format; chat_format.answer()"
    done = subprocess.run(
        [sys.executable, "-c", start], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None, f"it takes more than {MOST_SECONDS} s or {MOST_MEMORY >> 20} MiB"
    values, why = json.loads(done.stdout)
    if values is None:
        return None, why
    fields: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
    return ChatFormat(*fields), why


def answer() -> None:
    """The other end of `_bounded`: a request on stdin, [format's values or null, why] on stdout."""
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (request["nbytes"], request["nbytes"]))
    try:
        found: tuple[object, str] = astuple(_derive(_renderer(request["template"], request["specials"]))), ""
    except Exception as error:  # a template is a program: it may fail in any way
        found = None, " ".join(str(error).split())[:80] or type(error).__name__
    json.dump(found, sys.stdout)


def _read(files: Mapping[str, bytes], where: Path) -> tuple[str | None, dict[str, str]]:
    """The template's text and the special tokens that it may ask for. A file of its own wins, as in transformers."""
    config = _config(files, where)
    specials = {key: _special(config.get(key)) for key in SPECIALS}
    if TEMPLATE in files:
        return _text(files, TEMPLATE, where), specials
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return (template if isinstance(template, str) else None), specials


def _config(files: Mapping[str, bytes], where: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(files, CONFIG, where)) if CONFIG in files else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where / CONFIG}: is not JSON: {error}. Fetch the checkpoint again.") from None
    return found if isinstance(found, dict) else {}


def _text(files: Mapping[str, bytes], name: str, where: Path) -> str:
    if len(files[name]) > MOST_BYTES:
        raise CheckpointError(f"{where / name}: is larger than {MOST_BYTES >> 10} KiB. Fetch the checkpoint again.")
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where / name}: cannot be read: {error}. Fetch the checkpoint again.") from None


def _special(value: object) -> str:
    """A special token is a string or an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _renderer(source: str, specials: dict[str, str]) -> Render:
    """The template as transformers would run it, without tools, documents and today's date."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(source)

    def render(turns: Sequence[tuple[str, str]], prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = template.render(
            messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **specials
        )
        return text

    return render


def _derive(render: Render) -> ChatFormat:
    """Read the wrapping off, first without a system message. Raises whatever the template does, or ValueError."""
    roles = ("user", "assistant", "user")
    before, between, again, after, prompt = _around(render, roles)
    user_after = after if between.startswith(after) else ""  # what ends the text ends a user's turn
    assistant_before = between[len(user_after) :]

    def made(start: str, user_before: str, system: tuple[str, str] | None, default: str | None) -> ChatFormat:
        closing = again[: len(again) - len(user_before)]
        user, assistant = (user_before, user_after), (assistant_before, closing)
        return ChatFormat("turns", system, user, assistant, start, prompt, default)

    user_before = _common_end(before, again)
    start = before[: len(before) - len(user_before)]
    candidates = []
    if (with_system := _with_system(render, roles)) is not None:
        head, gap = with_system
        if head.startswith(start) and gap.endswith(user_before):
            pair = (head[len(start) :], gap[: len(gap) - len(user_before)])
            candidates.append(made(start, user_before, pair, None))
        if before.startswith(head) and before.endswith(gap) and len(before) >= len(head) + len(gap):
            shared = _common_end(gap, again)  # the template brings a system message of its own
            pair = (head, gap[: len(gap) - len(shared)])
            candidates.append(made("", shared, pair, before[len(head) : len(before) - len(gap)]))
    candidates.append(made(start, user_before, None, None))
    found = next((chat for chat in candidates if _proven(render, chat)), None)
    if found is None:
        raise ValueError("turns depend on each other")
    return found


def _with_system(render: Render, roles: tuple[str, ...]) -> tuple[str, str] | None:
    """What stands before and after a system message; None when the template refuses it, drops or repeats it."""
    try:
        head, gap, *_ = _around(render, ("system", *roles))
    except Exception:  # its way of saying no
        return None
    return head, gap


def _around(render: Render, roles: tuple[str, ...]) -> list[str]:
    """The texts before, between and after the contents of turns, and what a generation prompt adds."""
    turns = [(role, f"\ue000{number}\ue000") for number, role in enumerate(roles)]
    text = render(turns, False)
    prompted = render(turns, True)
    if not prompted.startswith(text):
        raise ValueError("the generation prompt changes earlier text")
    pieces, rest = [], text
    for _, mark in turns:
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError("a turn's text is changed or repeated")
        pieces.append(piece)
    return [*pieces, rest, prompted[len(text) :]]


def _common_end(a: str, b: str) -> str:
    """The longest text that both end with."""
    length = 0
    while length < min(len(a), len(b)) and a[-length - 1] == b[-length - 1]:
        length += 1
    return a[len(a) - length :]


def _proven(render: Render, chat: ChatFormat) -> bool:
    """Whether three turns of plain words, with and without a system message, come out as out of the template."""
    turns = [(role, f"word {i}") for i, role in enumerate(("user", "assistant", "user", "assistant", "user"))]
    cases = [(turns, turns if chat.default_system is None else [("system", chat.default_system), *turns])]
    if chat.system is not None:
        told = [("system", "be brief"), *turns]
        cases.append((told, told))
    pairs = {"system": chat.system or ("", ""), "user": chat.user, "assistant": chat.assistant}
    for given, meant in cases:
        mine = chat.start + "".join(pairs[role][0] + content + pairs[role][1] for role, content in meant)
        if mine + chat.generation_prompt != render(given, True):
            return False
    return True

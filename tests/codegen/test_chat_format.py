"""Chat templates as models ship them, turned into turns; whatever a template says, the build goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest

from compiler.codegen import chat_format
from compiler.errors import CheckpointError
from runtime.chat import turn
from runtime.manifest import ChatFormat
from tests.codegen.templates import (
    CHATML,
    DEFAULT_SYSTEM,
    GEMMA_LIKE,
    HEADERS,
    LLAMA2_LIKE,
    PLAIN,
    TRIMMED,
    ZEPHYR_LIKE,
)

TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
TURNS = "chat template turned into turns"
MARKED = ("<|im_start|>{}\n", "<|im_end|>\n")


def derive(place: Path) -> tuple[ChatFormat | None, str]:
    """With the files by name, as a checkpoint hands them out."""
    return chat_format.derive({path.name: path.read_bytes() for path in place.iterdir()}, place)


def folder(path: Path, template: object, **config: object) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps({**TOKENS, "chat_template": template, **config}))
    return path


def part(role: str) -> tuple[str, str]:
    return MARKED[0].format(role), MARKED[1]


def test_chatml_by_hand(tmp_path: Path) -> None:
    made, note = derive(folder(tmp_path, CHATML))
    assert note == TURNS
    assert made == ChatFormat(
        "turns", part("system"), part("user"), part("assistant"), "", "<|im_start|>assistant\n", None
    )


def test_a_default_system_message_by_hand(tmp_path: Path) -> None:
    """What ends the system turn also ends the assistant's, so it may count as the beginning of the user's."""
    made, note = derive(folder(tmp_path, DEFAULT_SYSTEM))
    assert note == TURNS
    assert made is not None
    assert made.default_system == "You are a helpful assistant."
    assert (made.start, made.system) == ("", ("<|im_start|>system\n", ""))
    assert made.user == ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n")


WRAPPING = [
    ("CHATML", CHATML, True),
    ("DEFAULT_SYSTEM", DEFAULT_SYSTEM, True),
    ("HEADERS", HEADERS, True),
    ("ZEPHYR_LIKE", ZEPHYR_LIKE, True),
    ("GEMMA_LIKE", GEMMA_LIKE, False),
    ("LLAMA2_LIKE", LLAMA2_LIKE, False),
    ("TRIMMED", TRIMMED, True),
    ("PLAIN", PLAIN, True),
]


@pytest.mark.parametrize(("template", "system"), [case[1:] for case in WRAPPING], ids=[case[0] for case in WRAPPING])
def test_the_runtime_says_what_the_template_says(tmp_path: Path, template: str, system: bool) -> None:
    """The oracle is the template itself; the text is what the device would take in, turn by turn."""
    made, note = derive(folder(tmp_path, template))
    assert made is not None, note
    assert (made.system is not None) == system
    assert note == (TURNS if system else f"{TURNS}, without a system message")
    for told in (None, "Speak like a pirate.") if system else (None,):
        messages: list[dict[str, str]] = [] if told is None else [{"role": "system", "content": told}]
        said = ""
        for question, answer in (("Who are you?", "I am a model."), ("And\nI?", "You ask."), ("Why?", "")):
            parts = turn(made, question, first=not said, system=told)
            said += "".join(piece.text for piece in parts)
            messages.append({"role": "user", "content": question})
            assert said == rendered(template, messages)
            said += made.assistant[0].removeprefix(made.generation_prompt) + answer
            messages.append({"role": "assistant", "content": answer})


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """As transformers sets jinja2 up."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.globals["raise_exception"] = raise_exception
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)


BEYOND = [
    ("{{ messages[7].content }}", "list object has no element 7"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ("{{ messages[0].content.upper().nothing.at_all }}", "'str object' has no attribute 'nothing'"),
    ("{% for x in range(10 ** 9) %}{% endfor %}", "Range too big."),
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ("{% unknown %}", "Encountered unknown tag 'unknown'."),
    ("{{ raise_exception('never') }}", "never"),
    ("no content at all", "a turn's text is changed or repeated"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "a turn's text is changed or repeated"),
    ("{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}", "turns depend on each other"),
    ("{% if add_generation_prompt %}P{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
     "the generation prompt changes earlier text"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "why"), BEYOND, ids=[why for _, why in BEYOND])
def test_more_than_wrapping_gives_plain_text(tmp_path: Path, template: str, why: str) -> None:
    made, note = derive(folder(tmp_path, template))
    assert made is None
    assert note.startswith(f"chat template does more than wrap turns ({why}"[:110])
    assert note.endswith("): chat continues plain text")
    assert "\n" not in note


def test_a_template_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_format, "MOST_SECONDS", 1)
    template = "{% for i in range(99999) %}{% for j in range(99999) %}long{% endfor %}{% endfor %}"
    assert derive(folder(tmp_path, template)) == (
        None, "chat template does more than wrap turns (it takes more than 1 s or 1024 MiB): chat continues plain text",
    )  # fmt: skip


def test_a_template_that_wants_all_memory(tmp_path: Path) -> None:
    """2 GiB, which this machine may well have: more is refused by the system itself."""
    made, note = derive(folder(tmp_path, "{{ ('x' * 2147483647)[:1] }}"))
    assert (made, note) == (
        None, "chat template does more than wrap turns (MemoryError): chat continues plain text",
    )  # fmt: skip


@pytest.mark.parametrize("template", [None, 7, {}, [], [{"name": "tool_use", "template": CHATML}], [3]])
def test_no_template(tmp_path: Path, template: object) -> None:
    assert derive(folder(tmp_path, template)) == (None, "no chat template: chat continues plain text")


def test_no_files_at_all(tmp_path: Path) -> None:
    assert derive(tmp_path) == (None, "no chat template: chat continues plain text")


def test_the_default_of_several(tmp_path: Path) -> None:
    several: list[Any] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert derive(folder(tmp_path, several)) == derive(folder(tmp_path, CHATML))


def test_a_file_of_its_own_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    made, _ = derive(folder(tmp_path, PLAIN))
    assert made is not None
    assert made.user == part("user")


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    made, _ = derive(folder(tmp_path, ZEPHYR_LIKE))
    assert made is not None
    assert made.user == ("<|user|>\n", "</s>\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "is not JSON: Expecting property name enclosed in double quotes"),
        ("tokenizer_config.json", b"\xff", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("tokenizer_config.json", b"[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
        ("chat_template.jinja", b"\xff", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("chat_template.jinja", b" " * ((1 << 20) + 1), "is larger than 1024 KiB"),
    ],
)  # fmt: skip
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        derive(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / name}: {message}")
    assert str(refusal.value).endswith("Fetch the checkpoint again.")

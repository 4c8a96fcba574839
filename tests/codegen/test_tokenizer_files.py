"""A checkpoint's tokenizer: it must load, and must not know a token that the model does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors

from compiler.checkpoint.folder import _tokenizer_files as tokenizer_files_of
from compiler.codegen import tokenizer_files
from compiler.errors import CheckpointError


def contents(place: Path) -> dict[str, bytes]:
    """Files by name, as a checkpoint hands them out."""
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten words, and a start token that is added to every text."""
    words = {word: number for number, word in enumerate(["<s>", *"abcdefghi"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))


def refusal(folder: Path, vocab_size: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        tokenizer_files.check(contents(folder), vocab_size, folder)
    return str(caught.value)


def test_one_that_fits(folder: Path) -> None:
    tokenizer_files.check(contents(folder), 10, folder)
    tokenizer_files.check(contents(folder), 64, folder)  # models round their vocabulary up


def test_one_token_too_many(folder: Path) -> None:
    assert refusal(folder, 9) == (
        f"{folder / 'tokenizer.json'}: has token id 9, but config.json's vocab_size is 9. They belong to two models."
    )


def test_an_added_token_too_many(folder: Path) -> None:
    token = {"id": 10, "content": "<new>", "special": True, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    edit(folder, lambda data: data["added_tokens"].append(token))
    tokenizer_files.check(contents(folder), 11, folder)
    assert refusal(folder, 10) == (
        f"{folder / 'tokenizer.json'}: has token id 10, but config.json's vocab_size is 10. They belong to two models."
    )


def test_a_start_token_that_the_model_lacks(folder: Path) -> None:
    """The template that adds it states an id of its own, which need not be in the vocabulary."""
    edit(folder, lambda data: data["post_processor"]["special_tokens"]["<s>"].update(ids=[77]))
    assert refusal(folder, 64) == (
        f"{folder / 'tokenizer.json'}: has token id 77, but config.json's vocab_size is 64. They belong to two models."
    )


def test_none_at_all(tmp_path: Path) -> None:
    assert refusal(tmp_path, 10) == (
        f"{tmp_path}: has no tokenizer.json, which the device needs to turn text into tokens. Fetch it with the "
        f"checkpoint; for a sentencepiece tokenizer.model, save the tokenizer once with transformers' save_pretrained."
    )


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    said = refusal(tmp_path, 10)
    assert said.startswith(f"{tmp_path / 'tokenizer.json'}: is not a tokenizer: ")
    assert said.endswith(". Fetch the checkpoint again.")
    assert "\n" not in said


def test_one_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + (1 << 20))  # a hole: no disk is used
    with pytest.raises(CheckpointError) as caught:
        tokenizer_files_of(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'tokenizer.json'}: is 257 MiB, but a tokenizer has at most 256."


def test_what_is_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    tokenizer_files.copy(contents(folder), out)
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_copies_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    """A read-only checkpoint must not make a read-only bundle."""
    (folder / "tokenizer.json").chmod(0o444)
    out = tmp_path / "out"
    out.mkdir()
    tokenizer_files.copy(contents(folder), out)
    assert (out / "tokenizer.json").stat().st_mode & 0o200

"""The tokenizer of a checkpoint: checked here, copied as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compiler.errors import CheckpointError

NAME = "tokenizer.json"
COPIED = (NAME, "tokenizer_config.json")


def check(files: Mapping[str, bytes], vocab_size: int, where: Path) -> None:
    """Raise CheckpointError unless there is a tokenizer.json that loads and whose ids all fit the model."""
    from tokenizers import Tokenizer

    if NAME not in files:
        raise CheckpointError(
            f"{where}: has no {NAME}, which the device needs to turn text into tokens. Fetch it with the checkpoint; "
            f"for a sentencepiece tokenizer.model, save the tokenizer once with transformers' save_pretrained."
        )
    path = where / NAME if where.is_dir() else where
    try:
        tokenizer = Tokenizer.from_str(files[NAME].decode("utf-8"))
        added = tokenizer.encode("").ids  # start and end tokens have ids of their own, apart from the vocabulary
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise CheckpointError(f"{path}: is not a tokenizer: {str(error)[:200]}. Fetch the checkpoint again.") from None
    last = max((*tokenizer.get_vocab(with_added_tokens=True).values(), *added), default=0)
    if last >= vocab_size:
        raise CheckpointError(
            f"{path}: has token id {last}, but config.json's vocab_size is {vocab_size}. They belong to two models."
        )


def copy(files: Mapping[str, bytes], out: Path) -> None:
    """Write what the runtime reads."""
    for name in COPIED:
        if name in files:
            (out / name).write_bytes(files[name])

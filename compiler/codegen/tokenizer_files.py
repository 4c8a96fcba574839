"""The tokenizer of a checkpoint: checked here, copied as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from compiler.errors import CheckpointError

NAME = "tokenizer.json"
COPIED = (NAME, "tokenizer_config.json")
MOST_BYTES = 256 << 20


def check(folder: Path, vocab_size: int) -> None:
    """Raise CheckpointError unless `folder` has a tokenizer.json that loads and whose ids all fit the model."""
    from tokenizers import Tokenizer

    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {NAME}, which the device needs to turn text into tokens. Fetch it with the checkpoint; "
            f"for a sentencepiece tokenizer.model, save the tokenizer once with transformers' save_pretrained."
        )
    if path.stat().st_size > MOST_BYTES:
        raise CheckpointError(
            f"{path}: is {path.stat().st_size >> 20} MiB, but a tokenizer has at most {MOST_BYTES >> 20}. "
            f"Fetch the checkpoint again."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        added = tokenizer.encode("").ids  # start and end tokens have ids of their own, apart from the vocabulary
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise CheckpointError(f"{path}: is not a tokenizer: {str(error)[:200]}. Fetch the checkpoint again.") from None
    last = max((*tokenizer.get_vocab(with_added_tokens=True).values(), *added), default=0)
    if last >= vocab_size:
        raise CheckpointError(
            f"{path}: has token id {last}, but config.json's vocab_size is {vocab_size}. They belong to two models."
        )


def copy(folder: Path, out: Path) -> None:
    """Copy what the runtime reads."""
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)

"""Checkpoints from the Hugging Face hub: org/name[@revision], or org/name/FILE.gguf[@revision] for one GGUF file.

The huggingface_hub package keeps them in its own cache: downloads resume where they broke off, a second build reads the
cache, and without a network what is cached whole is used. Only the files that quern reads are fetched, never pickles.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from compiler.errors import CheckpointError

MODEL_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")
WANTED = (
    "config.json", "generation_config.json", "quantize_config.json", "quantization_config.json", "quant_config.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.safetensors", "*.safetensors.index.json",
)
# The folder's own files only, and not the second copy that Mistral's repositories have in another layout.
UNWANTED = ("*/*", "consolidated*")


@dataclass(frozen=True)
class ModelId:
    """A parsed id; revision None: the default branch."""

    repository: str
    file: str | None
    revision: str | None


def parse(text: str) -> ModelId | None:
    """The parts of org/name[/FILE.gguf][@revision], or None for what is no such id."""
    found = MODEL_ID.fullmatch(text)
    return None if found is None or ".." in text else ModelId(found["repository"], found["file"], found["revision"])


def resolve(model: Path | str) -> Path:
    """A path as it is; the folder or file of a hub id in the cache, fetched when it is not there yet.

    What exists here is a path, whatever it looks like. Raises CheckpointError.
    """
    path, wanted = Path(model), parse(str(model))
    try:
        here = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        here = False
    return path if here or wanted is None or path.is_absolute() else _fetch(wanted, str(model))


def _fetch(wanted: ModelId, text: str) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{text}: there is no such file or folder here, and to fetch a model from the Hugging Face hub the package "
            f"huggingface_hub is needed. Install it: pip install 'quern[hub]'.") from None
    try:
        if wanted.file is not None:
            return Path(hub.hf_hub_download(wanted.repository, wanted.file, revision=wanted.revision))
        found = hub.snapshot_download(wanted.repository, revision=wanted.revision, allow_patterns=list(WANTED),
                                      ignore_patterns=list(UNWANTED))
        return Path(str(found))
    except errors.GatedRepoError:
        what = "the hub asks you to accept the model's licence on its page, and then to log in: hf auth login"
    except errors.RepositoryNotFoundError:
        what = ("neither a file or folder here nor a model on the Hugging Face hub (or it is private: log in with "
                "hf auth login). Check the spelling")
    except errors.RevisionNotFoundError:
        what = f"the model has no revision {wanted.revision!r}. Give a branch, a tag or a commit that it has"
    except errors.LocalEntryNotFoundError:
        what = ("no such file or folder here, and the Hugging Face hub cannot be reached while the cache does not hold "
                "all of the model. Check the path, or try again with a network: a download goes on where it stopped")
    except errors.EntryNotFoundError:
        what = f"the model has no file {wanted.file!r}. Look at its list of files on the hub"
    except Exception as error:  # httpx, disk and token errors have no common class
        what = (f"the download broke off ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Try again: it "
                f"goes on where it stopped")
    raise CheckpointError(f"{text}: {what}.")

"""Ids in, logits out, as .npy files: how a bundle is compared with a reference. Nothing is left behind on failure."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from .arrays import Array
from .errors import InputError
from .session import Session

MAX_IDS = 1 << 24  # above any context; keeps a wrong file from being read whole


def read_ids(path: Path) -> Array:
    """A one-dimensional integer .npy file. No pickles: they can run code."""
    try:
        if not path.is_file() and path.exists():  # a pipe can be read once
            raise InputError(f"{path}: is no regular file, and .npy files are mapped. Save the ids with numpy.save.")
        with path.open("rb") as stream:
            magic = stream.read(6)
        ids = np.load(path, mmap_mode="r", allow_pickle=False) if magic == b"\x93NUMPY" else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError, OverflowError, MemoryError) as error:
        reason = str(error).rstrip(".")
        raise InputError(f"{path}: is no .npy file that can be read: {reason}.") from None
    if ids is None:
        raise InputError(f"{path}: is no .npy file. Save the ids with numpy.save.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 1 <= ids.size <= MAX_IDS:
        raise InputError(f"{path}: is {ids.dtype}{list(ids.shape)}, but a list of at least one integer is needed.")
    return np.array(ids)


def write_logits(session: Session, ids: Array, path: Path, last: bool = False) -> None:
    """Run ids from an empty context, write float32[n, vocab] to `path`, which appears only when it is complete.

    last: take them in as a prompt is, and write what follows the last one, float32[1, vocab].
    """
    blocks = iter([session.prefill(ids)[None]]) if last else session.logits(ids)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows = 1 if last else len(ids)
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, session.manifest.model.vocab_size)}
    try:
        with part.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                stream.write(np.ascontiguousarray(block, "<f4").tobytes())
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()

"""Quantisation formats, one file each. A file has NAME, claims(config) and open(checkpoint); it is found by its name.

claims(config) sees config.json as a plain dictionary, whose "quantization_config" is merged from wherever it stood.
"""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compiler.errors import FormatError
from compiler.quant.source import CheckpointView, Source


@dataclass(frozen=True)
class Format:
    """What a format file offers."""

    name: str
    claims: Callable[[dict[str, Any]], bool]
    open: Callable[[CheckpointView], Source]


def formats() -> list[Format]:
    """All formats, by walking this folder, in alphabetical order."""
    files = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return sorted((Format(file.NAME, file.claims, file.open) for file in files), key=lambda format_: format_.name)


def open_source(checkpoint: CheckpointView) -> Source:
    """The Source of the one format that claims this checkpoint. Raises FormatError when none or several do."""
    config = checkpoint.config.data
    known = formats()
    claiming = [format_ for format_ in known if format_.claims(config)]
    if len(claiming) == 1:
        return claiming[0].open(checkpoint)
    names = ", ".join(format_.name for format_ in known)
    if claiming:
        several = ", ".join(format_.name for format_ in claiming)
        raise FormatError(f"{checkpoint.path}: the quantisation configuration fits several formats: {several}. "
                          f"Set quant_method to the one that wrote it.")
    method = (config.get("quantization_config") or {}).get("quant_method")
    said = f"quant_method is {str(method)[:40]!r}" if method is not None else "there is no quant_method"
    raise FormatError(f"{checkpoint.path}: no format claims this checkpoint ({said}). quern knows: {names}. "
                      f"Take the model in one of these forms, or as plain float16 to be quantised here.")

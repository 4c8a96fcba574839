"""Which options of `bench` go together: what would contradict another one, or act on nothing, is refused by name.

An option that was not given is None (or False, or empty) until `complete` sets its default, so that `check` knows which
ones were: nobody should believe that a figure is of 8 bits when --bits had nothing to act on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from compiler.errors import UserError

DEFAULTS = {
    "bits": 4, "group_size": 128, "target": "native", "prompt_tokens": 512, "decode_tokens": 16, "context": 128,
    "rounds": 5,
}  # fmt: skip
# How little of each there may be.
LEAST = {"prompt_tokens": 1, "decode_tokens": 1, "rounds": 1, "group_size": 1, "context": 0, "windows": 2}
OF_A_SHAPE = ("bits", "group_size", "head_bits", "kv_cache", "target", "multiprocessors")
HERE = ("against", "growth", "perplexity")  # what only this machine does
TIMED = ("threads", "rounds", "decode_tokens")  # what only a clock asks for
# What a kind of growth sets point by point, and what no point of it measures.
GROWS = {"context": ("context",), "prompt": ("prompt_tokens",), "size": ("shape",), "group": ("group_size",),
         "bits": ("bits", "head_bits")}  # fmt: skip
UNMEASURED = {"context": ("prompt_tokens",), "prompt": ("decode_tokens", "context")}
# Options that say more about another one: that one, and what to say where it is missing.
BELONGS = {
    "port": ("host", "--port belongs to --host, which is missing."),
    "identity": ("host", "--identity belongs to --host, which is missing."),
    "windows": ("perplexity", "--windows belongs to --perplexity, which is missing."),
    "install_peers": ("against", "--install-peers belongs to --against, which is missing."),
    "peers_dir": ("against", "--peers-dir belongs to --against, which is missing."),
}


def check(options: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together, or are too small."""
    if options.host is not None or options.board:
        _check_board(options)
    if options.growth is None and (options.bundle is None) == (options.shape is None):
        raise UserError("bench measures either a BUNDLE or a --shape: give one of the two.")
    if options.growth is not None and options.bundle is not None:
        raise UserError("--growth builds models of its own: give a --shape, or nothing, instead of a BUNDLE.")
    if options.cost == "model":
        _check_modelled(options)
    if options.profile:
        if options.cost == "model":
            raise UserError("--profile times kernels on this machine and nothing else: leave it or --cost model out.")
        for name in _given(options, (*HERE, "host", "board")):
            raise UserError(f"--profile times kernels on this machine and nothing else: leave it or {name} out.")
    if options.bundle is not None:
        for name in _given(options, OF_A_SHAPE):
            raise UserError(f"{name} goes with a --shape: a BUNDLE was built with its own. Leave one of the two out.")
    _check_sizes(options)
    if options.growth is not None:
        _check_growth(options)
    elif _given(options, ("plot", "growth_values")):
        raise UserError("--plot and --growth-values belong to --growth, which is missing.")
    if options.perplexity and options.bundle is None:
        raise UserError("--perplexity needs a BUNDLE: random weights have none worth knowing.")
    if options.against and options.bundle is not None and options.model is None:
        raise UserError("--against runs the peer on the same weights. Add --model with the checkpoint of the bundle.")
    if options.model is not None and (options.bundle is None or not options.against):
        raise UserError("--model belongs to a BUNDLE and --against: it is where the peer's weights come from.")
    if options.model is not None and options.model.is_file():
        raise UserError(
            f"{options.model}: --against writes the peer's file from a checkpoint folder. For a GGUF file, run "
            f"llama.cpp's llama-bench on the file itself."
        )
    for name, (other, said) in BELONGS.items():
        if _given(options, (name,)) and not _given(options, (other,)):
            raise UserError(f"{said} Give both, or neither.")


def complete(options: argparse.Namespace) -> None:
    """Set what was not given to its default."""
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.threads = options.threads or [None]


def _check_board(options: argparse.Namespace) -> None:
    name = "--board" if options.host is None else "--host"
    if options.host is not None and options.board:
        raise UserError("--host measures on a device, --board counts on an emulated one: give one of the two.")
    for other in _given(options, HERE):
        raise UserError(f"{other} runs on this machine: leave it or {name} out.")
    if options.bundle is None:
        raise UserError(f"{name} needs a BUNDLE: what `build` wrote for that board.")
    if options.host is not None and len(options.threads or ()) > 1:
        raise UserError("--host takes one number of --threads at a time.")
    for other in _given(options, TIMED) if options.board else ():
        raise UserError(f"--board counts one decoded token and one prompt, and times nothing: leave {other} out.")


def _check_modelled(options: argparse.Namespace) -> None:
    if options.shape is None:
        raise UserError("--cost model compiles a shape for its target: give a --shape, not a BUNDLE.")
    for name in _given(options, (*HERE, *TIMED, "prompt_tokens")):
        raise UserError(f"--cost model measures nothing and runs no engine: leave it or {name} out.")
    for name in _given(options, ("kv_cache",)):
        raise UserError(f"{name} goes with a --shape that is measured: --cost model knows the default alone.")


def _check_growth(options: argparse.Namespace) -> None:
    kind = options.growth
    for name in _given(options, GROWS[kind]):
        raise UserError(f"--growth {kind} takes its points from --growth-values, not from {name}: leave that out.")
    for name in _given(options, UNMEASURED.get(kind, ())):
        alone = "decoding" if kind == "context" else "prompts"
        raise UserError(f"--growth {kind} measures {alone} alone: leave {name} out.")


def _check_sizes(options: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{_flag(name)} is {value}, but it must be at least {least}.")
    for threads in options.threads or ():
        if threads < 1:
            raise UserError(f"--threads is {threads}, but it must be at least 1.")


def _given(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The options among these that were given, as they are written."""
    return [_flag(name) for name in names if getattr(options, name) not in (None, False, [])]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

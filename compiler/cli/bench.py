"""Measure prefill and decode speed of a bundle, or of a published shape, beside this machine's read bandwidth."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compiler.measure.speed import Speed, Spread
    from targets import Target


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="bundle folder to measure")
    parser.add_argument(
        "--shape", metavar="NAME", help="measure a published shape with random weights instead, e.g. tinyllama-1.1b"
    )
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), default=4, help="with --shape: bits of the linear layers (default: 4)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        metavar="G",
        help="with --shape: inputs that share a scale (default: 128)",
    )
    parser.add_argument(
        "--head-bits", type=int, choices=(4, 8), help="with --shape: bits of the output head (default: as --bits)"
    )
    parser.add_argument(
        "--target", default="native", metavar="NAME", help="with --shape: build for this target (default: native)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: what the runtime would take)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=512, metavar="N", help="tokens of a prefill (default: 512)"
    )
    parser.add_argument(
        "--decode-tokens", type=int, default=16, metavar="N", help="tokens decoded a round (default: 16)"
    )
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens before the decoded ones (default: 128)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds of prefill, decode and reading (default: 5)"
    )
    parser.add_argument(
        "--cost", choices=("time", "model"), default="time",
        help="with --shape: 'model' counts instructions under qemu and models cycles instead of timing (default: time)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def run(options: argparse.Namespace) -> int:
    """Build the shape if asked, measure, print."""
    import os

    import targets
    from compiler.errors import UserError

    if (options.bundle is None) == (options.shape is None):
        raise UserError("bench measures either a BUNDLE or a --shape: give one of the two.")
    for name in ("prompt_tokens", "decode_tokens", "rounds", "group_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but it must be at least 1.")
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads is {options.threads}, but it must be at least 1.")
        os.environ["TVM_NUM_THREADS"] = str(options.threads)  # before TVM's compiler starts its pool in this process
    target = targets.load(options.target)
    if options.cost == "model":
        if options.shape is None:
            raise UserError("--cost model compiles a shape for its target: give a --shape, not a BUNDLE.")
        from compiler.measure import forecast_report

        forecast_report.show(options, target)
        return 0
    with _bundle(options, target) as path:
        from compiler.measure import speed
        from runtime.bundle import read_manifest

        limit = read_manifest(path).model.context
        prompt = min(options.prompt_tokens, limit)
        context = max(1, min(options.context, limit - options.decode_tokens))
        measured = speed.measure(
            path, target, prompt, min(options.decode_tokens, limit - 1), options.rounds, options.threads, context
        )
    _print(options, measured, prompt, context)
    return 0


@contextmanager
def _bundle(options: argparse.Namespace, target: Target) -> Iterator[Path]:
    if options.bundle is not None:
        yield options.bundle
        return
    from compiler import models, pipeline
    from compiler.measure import shapes
    from compiler.progress import Reporter

    head = options.head_bits or options.bits
    source = shapes.RandomSource(options.shape, options.bits, options.group_size, head)
    with tempfile.TemporaryDirectory(prefix="quern-bench-") as folder:
        request = pipeline.Request(Path(folder) / "bundle", target, head_bits=head)
        model = models.build(shapes.config(options.shape), source.describe, pipeline.model_options(request))
        inputs = pipeline.Inputs(options.shape, "random", model, source, None)
        pipeline.compile_inputs(inputs, request, Reporter(quiet=options.json))
        yield request.out


def _print(options: argparse.Namespace, speed: Speed, prompt: int, context: int) -> None:
    spreads = ("prefill_tok_s", "decode_tok_s", "read_gb_s", "decode_bandwidth_ratio")
    if options.json:
        record: dict[str, object] = {name: getattr(speed, name).median for name in spreads}
        record["spread"] = {name: asdict(getattr(speed, name)) for name in spreads}
        record |= {"weight_bytes_per_token": speed.weight_bytes_per_token, "threads": speed.threads}
        record |= {"prompt_tokens": prompt, "context": context, "rounds": options.rounds, "target": options.target}
        record |= {"shape": options.shape, "bundle": None if options.bundle is None else str(options.bundle)}
        print(json.dumps(record))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "median", "min", "max", box=None, pad_edge=False)
    labels = (
        f"prefill, {prompt} tokens (tokens/s)",
        f"decode after {context} (tokens/s)",
        "read ceiling (GB/s)",
        "decode / ceiling",
    )
    for label, name in zip(labels, spreads, strict=True):
        values: Spread = getattr(speed, name)
        table.add_row(
            label,
            *(f"{value:.3g}" if value < 1 else f"{value:.1f}" for value in (values.median, values.min, values.max)),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{speed.weight_bytes_per_token / 1e6:.1f} MB of weights a token, {speed.threads} threads")

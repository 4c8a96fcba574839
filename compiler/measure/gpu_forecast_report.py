"""Prints gpu_forecast.Report: one JSON object, or a table that says it is a model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from compiler.measure import gpu_forecast
from compiler.measure.forecast import Spread
from compiler.measure.gpu_forecast import Parts, Report
from targets import Target


def show(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Print what `bench --cost model` says for a target with a GPU; gives the record."""
    head = options.head_bits or options.bits
    made = gpu_forecast.report(options.shape, options.bits, options.group_size, head, options.context, target)
    asked = {"cost": "model", "shape": options.shape, "target": options.target, "bits": options.bits}
    record = {**asked, "group_size": options.group_size, "context": options.context, **asdict(made)}
    if options.json:
        print(json.dumps(record))  # noqa: T201
    else:
        _table(options, made)
    return record


def _table(options: argparse.Namespace, made: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("a model, not a measurement", "", "expected", "low", "high", "waits for", box=None, pad_edge=False)
    for board in made.boards:
        rows: list[tuple[str, Spread, Parts]] = [
            (f"decode after {options.context} (tokens/s)", board.decode_tok_s, board.decode_s),
            ("prefill", board.prefill_tok_s, board.prefill_s),
        ]
        for label, spread, parts in rows:
            cells = (f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in (spread.expected, spread.low, spread.high))
            table.add_row(board.board if spread is board.decode_tok_s else "", label, *cells, waits(parts))
        if not board.fits:
            table.add_row("", "does not fit into its memory")
    console = Console(highlight=False, width=120)
    console.print(table)
    console.print(
        f"{made.launches_per_token} launches, {made.weight_bytes_per_token / 1e6:.1f} MB of weights and "
        f"{made.instructions_per_token / 1e9:.2f} billion instructions a token, {made.planned_mib:.0f} MiB planned, "
        "without the driver's own"
    )


def waits(parts: Parts) -> str:
    """Like "memory 81 %, gaps 12 %": what takes a tenth of the time or more, the largest first."""
    total = sum(vars(parts).values())
    shares = sorted(((100 * value / total, name) for name, value in vars(parts).items()), reverse=True)
    return ", ".join(f"{name} {share:.0f} %" for share, name in shares if share >= 10)

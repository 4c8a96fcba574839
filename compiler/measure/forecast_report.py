"""Prints shape_forecast.Report: one JSON object, or a table that says it is a model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from compiler.measure import shape_forecast
from compiler.measure.forecast import Spread
from compiler.measure.shape_forecast import Report
from targets import Target

LABEL = "model"  # what every line and record says of itself


def show(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Print what `bench --cost model` says for these options; gives the record."""
    head = options.head_bits or options.bits
    made = shape_forecast.report(options.shape, options.bits, options.group_size, head, options.context, target)
    found = record(options, made)
    if options.json:
        print(json.dumps(found))  # noqa: T201
    else:
        _table(options, made, target)
    return found


def record(options: argparse.Namespace, made: Report) -> dict[str, object]:
    """The JSON object. `*_per_mac` is of one decoded token; `linear_*` of its largest linear kernel alone."""
    found: dict[str, object] = {"cost": LABEL, "shape": options.shape, "target": options.target}
    found |= {"bits": options.bits, "group_size": options.group_size, "context": options.context}
    for prefix, cost in (("", made.decode), ("prefill_", made.prefill)):
        found |= {
            f"{prefix}instructions_per_mac": cost.instructions_per_mac,
            f"{prefix}cycles_per_mac": cost.cycles_per_mac,
            f"{prefix}linear_instructions_per_mac": cost.of_kernel(cost.largest)[0],
            f"{prefix}linear_cycles_per_mac": cost.of_kernel(cost.largest)[1],
            f"{prefix}instructions": cost.instructions,
            f"{prefix}macs": cost.macs,
        }
    found |= {"weight_bytes_per_token": made.weight_bytes_per_token, "llvm_mca": made.llvm}
    found["forecast"] = None if made.forecast is None else asdict(made.forecast)
    return found


def _table(options: argparse.Namespace, made: Report, target: Target) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("a model, not a measurement", "instructions/MAC", "cycles/MAC", box=None, pad_edge=False)
    for name, cost in (("one decoded token", made.decode), (f"{made.prefill.tokens} prompt tokens", made.prefill)):
        table.add_row(name, *_numbers(cost.instructions_per_mac, cost.cycles_per_mac))
        table.add_row("  its largest linear kernel", *_numbers(*cost.of_kernel(cost.largest)))
    console = Console(highlight=False)
    console.print(table)
    known = "unknown" if made.llvm is None else f"llvm-mca {made.llvm} for {target.mcpu}"
    console.print(f"instructions: exact, under qemu; cycles: {known}")
    if made.forecast is not None:
        lines = Table(f"forecast for {target.name}", "expected", "low", "high", box=None, pad_edge=False)
        rows: list[tuple[str, Spread]] = [
            (f"decode after {options.context} (tokens/s)", made.forecast.decode_tok_s),
            ("prefill (tokens/s)", made.forecast.prefill_tok_s),
            ("peak memory (MiB)", made.forecast.peak_mib),
        ]
        for label, spread in rows:
            lines.add_row(label, *(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in
                                   (spread.expected, spread.low, spread.high)))  # fmt: skip
        console.print(lines)
        if made.forecast.load_s is not None:
            console.print(f"reading the weights from storage: {made.forecast.load_s:.0f} s at the bus limit")


def _numbers(instructions: float, cycles: float | None) -> tuple[str, str]:
    return f"{instructions:.4f}", "unknown" if cycles is None else f"{cycles:.4f}"

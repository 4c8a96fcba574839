"""Prints what `bench` measured, as tables: a bundle alone, on a GPU, or engines side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from compiler.measure.compare import Row, Workload
from compiler.measure.gpu_speed import GpuSpeed
from compiler.measure.speed import Speed, Spread

SHOWN = 5  # kernels of a function


def _cells(spread: Spread | None, digits: int = 1) -> list[str]:
    if spread is None:
        return ["", "", ""]
    return [f"{v:.3g}" if v < 1 else f"{v:.{digits}f}" for v in (spread.median, spread.min, spread.max)]


def alone(speed: Speed, work: Workload) -> None:
    """Print the speed of a bundle on this CPU."""
    table = Table("", "median", "min", "max", box=None, pad_edge=False)
    table.add_row(f"start to logits after {work.prompt_tokens} tokens (s)", *_cells(speed.start_s, 2))
    table.add_row(f"prefill, {work.prompt_tokens} tokens (tokens/s)", *_cells(speed.prefill_tok_s))
    if speed.prefill_plain_tok_s is not None:
        table.add_row("the same without AMX", *_cells(speed.prefill_plain_tok_s))
    table.add_row(f"decode after {work.context} (tokens/s)", *_cells(speed.decode_tok_s))
    table.add_row("read ceiling (GB/s)", *_cells(speed.read_gb_s))
    table.add_row("decode / ceiling", *_cells(speed.decode_bandwidth_ratio))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{speed.weight_bytes_per_token / 1e6:.1f} MB of weights a token, {speed.threads} threads, "
        f"at most {speed.peak_rss_mib:.0f} MiB ({speed.planned_mib:.0f} planned)"
    )


def on_gpu(speed: GpuSpeed, work: Workload) -> None:
    """Print the speed of a bundle on this GPU."""
    table = Table("", "median", "min", "max", box=None, pad_edge=False)
    table.add_row(f"prefill, {work.prompt_tokens} tokens (tokens/s)", *_cells(speed.prefill_tok_s))
    table.add_row(f"decode after {work.context} (tokens/s)", *_cells(speed.decode_tok_s))
    table.add_row("the same without CUDA graphs", *_cells(speed.decode_plain_tok_s))
    table.add_row("a token's kernels (ms)", *_cells(speed.kernels_ms))
    table.add_row("copy within the GPU (GB/s)", *_cells(speed.copy_gb_s))
    table.add_row("decode / copy", *_cells(speed.decode_bandwidth_ratio))
    console, gpu = Console(highlight=False), speed.gpu
    console.print(table)
    console.print(
        f"{gpu['device']} (sm_{gpu['sm']}), driver of CUDA {gpu['driver']}, code: {gpu['code']}, "
        f"{speed.weight_bytes_per_token / 1e6:.1f} MB of weights a token, prefill {speed.prefill_tflop_s:.3g} TFLOP/s"
    )
    if gpu["note"]:
        console.print(str(gpu["note"]))
    for function, kernels in speed.kernels.items():
        console.print(f"longest kernels of {function} (launches, ms): ", end="")
        console.print("; ".join(f"{name} ({count}, {ms:.3f})" for name, count, ms in kernels[:SHOWN]))


def beside(rows: Sequence[Row], work: Workload, perplexities: Sequence[float | None]) -> None:
    """Print one line an engine."""
    def phase(speed: Spread | None, ratio: Spread | None) -> list[Any]:
        median, low, high = _cells(speed)
        against = "" if ratio is None else f"{ratio.median:.2f}x ({ratio.min:.2f}-{ratio.max:.2f})"
        return [f"{median} ({low}-{high})" if median else "", against]

    ahead = [f"prefill {work.prompt_tokens}", "quern is", f"decode after {work.context}", "quern is"]
    table = Table("tokens/s, median (min-max)", "threads", *ahead, "perplexity", box=None, pad_edge=False)
    for row, value in zip(rows, perplexities, strict=True):
        cells = phase(row.prefill_tok_s, row.prefill_ratio) + phase(row.decode_tok_s, row.decode_ratio)
        table.add_row(row.name, str(row.threads), *cells, "" if value is None else f"{value:.4f}")
    Console(highlight=False, width=140).print(table)

"""Prints where the time of a token and of a prompt goes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from compiler.measure.compare import Workload
from compiler.measure.profile import KernelRow, Phase, Profile


def show(profile: Profile, work: Workload) -> None:
    """One table a phase."""
    titles = {
        "decode": f"a token decoded after {work.context}",
        "prefill": f"a prompt of {work.prompt_tokens} tokens",
    }
    console = Console(highlight=False, width=180, soft_wrap=True)
    for phase in profile.phases:
        ms = phase.ms
        console.print(f"{titles[phase.name]}: {ms.median:.3g} ms ({ms.min:.3g}-{ms.max:.3g})")
        console.print(_table(phase))
        if phase.other_ms.median <= 0:
            console.print(
                f"timed one by one, kernels take {-phase.other_share:.1%} more than the whole does without that: what "
                f"is between them is too little to see beside how rounds differ"
            )
        console.print()
    read = profile.read_gb_s
    console.print(
        f"read ceiling {read.median:.1f} GB/s ({read.min:.1f}-{read.max:.1f}), {profile.threads} threads, "
        f"{profile.weight_bytes_per_token / 1e6:.1f} MB of weights a token; timing a kernel takes "
        f"{profile.phases[0].clock_us:.2f} us at least, which are subtracted"
    )


def _table(phase: Phase) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for title in ("calls", "us, median", "(min-max)", "ms", "share", "MB", "GB/s", "of ceiling", "GMAC/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in phase.rows:
        table.add_row(*_cells(row))
    left = phase.other_ms.median
    ms, share = (f"{left:.3f}", f"{phase.other_share:.1%}") if left > 0 else ("-", "-")
    table.add_row("virtual machine, Python, between kernels", "", "", "", ms, share)
    return table


def _cells(row: KernelRow) -> list[str]:
    us = row.us
    return [
        row.kernel, f"{row.calls:g}", f"{us.median:.1f}", f"({us.min:.1f}-{us.max:.1f})", f"{row.ms:.3f}",
        f"{row.share:.1%}", f"{row.nbytes / 1e6:.2f}" if row.gb_s else "", f"{row.gb_s:.1f}" if row.gb_s else "",
        f"{row.of_ceiling:.2f}" if row.of_ceiling else "", f"{row.gmac_s:.1f}" if row.gmac_s else "",
    ]  # fmt: skip

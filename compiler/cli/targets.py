"""List the devices that `build --target` knows."""

from __future__ import annotations

import argparse
import os

WIDE = 300  # where nothing is shown on a terminal: a line a target, for grep
TIERS = {1: "CI runs it", 2: "CI links it", 3: "untested"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(options: argparse.Namespace) -> int:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    import targets

    table = Table(box=None, pad_edge=False)
    table.add_column("target", min_width=max(map(len, targets.names())))  # a name that is cut is no name
    for title in ("cpu", "glibc", "tier", "what it is"):
        table.add_column(title)
    for name in targets.names():
        try:
            target = targets.load(name)
        except targets.TargetError as error:
            if name != "native":
                raise
            table.add_row(name, "", "", "", str(error))  # the other targets are what a machine like this one is for
            continue
        table.add_row(name, target.mcpu, f">= {target.glibc}", TIERS[target.tier], target.description)
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    console.print(table)
    return 0

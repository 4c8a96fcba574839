"""List the devices that `build --target` knows."""

from __future__ import annotations

import argparse

TIERS = {1: "CI runs it", 2: "CI links it", 3: "untested"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(options: argparse.Namespace) -> int:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    import targets

    table = Table("target", "cpu", "glibc", "tier", "what it is", box=None, pad_edge=False)
    for name in targets.names():
        try:
            target = targets.load(name)
        except targets.TargetError as error:
            if name != "native":
                raise
            table.add_row(name, "", "", "", str(error))  # the other targets are what a machine like this one is for
            continue
        table.add_row(name, target.mcpu, f">= {target.glibc}", TIERS[target.tier], target.description)
    Console(highlight=False).print(table)
    return 0

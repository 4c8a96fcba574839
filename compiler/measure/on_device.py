"""A bundle on the board it is for: what the model forecasts, and beside it what a device measures over SSH.

The forecast runs the bundle on the emulated Cortex-A72 and counts (bundle_cost.py); that board's own speed means
nothing and is never looked at. The measurement is made on the device, by the bundle's runtime alone (runtime/bench.py).
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import targets
from compiler.deploy import connection, running, versions
from compiler.errors import UserError
from compiler.measure import bundle_cost, forecast, speed
from compiler.measure.bundle_cost import Cost
from compiler.measure.compare import Workload
from compiler.measure.forecast import Forecast, Work
from compiler.progress import Reporter
from runtime.bundle import read_manifest
from targets import Target

COUNTED = 16  # prompt tokens that are counted on the emulated board, where a call takes any number


@dataclass(frozen=True)
class Device:
    """Where to measure: a place as `deploy` takes it, and how to get in."""

    place: str
    port: int | None
    identity: Path | None


@dataclass(frozen=True)
class Modelled:
    """Counts of one decoded token and of one prompt call, and the forecast where the target states its numbers."""

    decode: Cost
    prefill: Cost
    clock_mhz: int | None
    forecast: Forecast | None


def model(bundle: Path, work: Workload, max_mhz: int | None, report: Reporter) -> Modelled:
    """Count on the emulated board. max_mhz: the clock of the device at hand, if it is known; else the target's.

    The prompt is counted in the bundle's shortest prompt call, or one of COUNTED tokens where a call takes any number,
    in the middle of the prompt; the weights are read once for each of its longest, and the last layer's one row, once a
    call, counts as if it were more: too slow by 1 / (COUNTED * layers) at most. Raises UserError: no emulator, no
    llvm-mca, a bundle for something else.
    """
    manifest = read_manifest(bundle)
    bundle_cost.require(bundle, manifest, report.line)
    sizes = sorted(f.tokens for name, f in manifest.functions.items() if name.startswith("prefill_")) or [1]
    counted = any(f.counted for f in manifest.functions.values())
    least = min(COUNTED, sizes[0]) if counted else sizes[0]
    decode = bundle_cost.measure(bundle, 1, work.context)
    middle = min(work.prompt_tokens // 2, manifest.model.context - least)
    prefill = bundle_cost.measure(bundle, least, middle)
    target = _at(targets.load(manifest.target.name), max_mhz)
    if not forecast.known(target) or not decode.cycles:
        return Modelled(decode, prefill, None, None)
    weights = speed.weight_bytes_per_token(manifest)
    past = manifest.memory.cache_bytes / manifest.model.context
    possible = range(least, sizes[-1] + 1) if counted else sizes
    rows = max(size for size in possible if size <= max(least, work.prompt_tokens))
    one = Work(1, decode.shared_cycles, decode.own_cycles, decode.launches, weights + past * work.context)
    share = rows / least
    many = Work(
        rows, prefill.shared_cycles * share, prefill.own_cycles * share, prefill.launches, weights + past * middle
    )
    sizes_of = manifest.memory
    made = forecast.forecast(one, many, sizes_of.planned_peak_bytes, sizes_of.weights_bytes, target)
    return Modelled(decode, prefill, target.clock_mhz, made)


def _at(target: Target, max_mhz: int | None) -> Target:
    return replace(target, clock_mhz=max_mhz) if max_mhz and target.clock_mhz else target


async def measured(
    bundle: Path, device: Device, work: Workload, threads: int | None, report: Reporter
) -> dict[str, Any]:
    """What `bench` of the runtime says on the device, after the bundle was deployed there if it was not yet."""
    local = versions.read(bundle, report)
    place = connection.parse_place(device.place)
    async with connection.connect(place, device.port, device.identity) as remote:
        await versions.deploy(remote, local, report)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(work).items()]
        options += [] if threads is None else [f"--threads={threads}"]
        with report.stage("Measure") as stage:
            found = await running.ask(remote, "bench", [*options, "--json"])
            stage.note = f"{found['device']}, {found['threads']} threads, {work.rounds} rounds"
    return {"host": str(place), "version": local.version, **found}


def modelled_or_reason(bundle: Path, work: Workload, max_mhz: int | None, report: Reporter) -> Modelled | str:
    """The model, or why there is none: a measurement is worth having without."""
    with report.stage("Count") as stage:
        try:
            made = model(bundle, work, max_mhz, report)
        except UserError as error:
            stage.note = "no forecast"
            return str(error)
        stage.note = "instructions on an emulated Cortex-A72"
    return made


def record(bundle: Path, work: Workload, found: dict[str, Any] | None, modelled: Modelled | str) -> dict[str, object]:
    """One JSON object. `cost` is "model" where nothing was measured; `forecast` is always a model."""
    manifest = read_manifest(bundle)
    made: dict[str, object] = {"cost": "model" if found is None else "time", "bundle": str(bundle)}
    made |= {"model": manifest.model.name, "target": manifest.target.name, **manifest.quantization}
    made |= asdict(work) if found is None else {**found, "spread": _spreads(found)}
    if isinstance(modelled, str):
        return {**made, "forecast": None, "no_forecast": modelled}
    for prefix, cost in (("", modelled.decode), ("prefill_", modelled.prefill)):
        counts = {"tokens": cost.tokens, "instructions": cost.instructions, "cycles": round(cost.cycles)}
        made |= {f"{prefix}{name}": value for name, value in counts.items()}
    known = None if modelled.forecast is None else asdict(modelled.forecast)
    return {**made, "forecast_clock_mhz": modelled.clock_mhz, "forecast": known}


def _spreads(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: asdict(speed.Spread.of(found[name])) for name in ("prefill_tok_s", "decode_tok_s")}


def print_table(work: Workload, found: dict[str, Any] | None, modelled: Modelled | str) -> None:
    """Forecast and measurement side by side; what is a model says so."""
    from rich.console import Console
    from rich.table import Table

    made = None if isinstance(modelled, str) else modelled.forecast
    columns = [] if found is None else ["measured", "min", "max"]
    columns += [] if made is None else ["forecast (a model)", "low", "high"]
    columns += ["measured / forecast"] if found is not None and made is not None else []
    console = Console(highlight=False, width=140)
    if columns:
        table = Table("", *columns, box=None, pad_edge=False)
        for label, values, spread in _rows(work, found, made):
            cells = [] if found is None else _cells([statistics.median(values), min(values), max(values)])
            cells += [] if spread is None else _cells([spread.expected, spread.low, spread.high])
            if values and spread is not None:
                cells.append(f"{statistics.median(values) / spread.expected:.2f}")
            table.add_row(label, *cells)
        console.print(table)
    for line in _notes(found, modelled):
        console.print(line, soft_wrap=True)


def _rows(
    work: Workload, found: dict[str, Any] | None, made: Forecast | None
) -> list[tuple[str, list[float], forecast.Spread | None]]:
    load = None if made is None or made.load_s is None else forecast.Spread(made.load_s, made.load_s, made.load_s)
    said = found or {"prefill_tok_s": [], "decode_tok_s": []}
    rows = [
        (f"decode after {work.context} (tokens/s)", said["decode_tok_s"], made.decode_tok_s if made else None),
        (f"prefill of {work.prompt_tokens} (tokens/s)", said["prefill_tok_s"], made.prefill_tok_s if made else None),
        ("peak memory (MiB)", [said["peak_rss_mib"]] if found else [], made.peak_mib if made else None),
        ("ready after (s; forecast: weights from its card)", [said["load_s"]] if found else [], load),
    ]
    return [row for row in rows if row[1] or row[2]]


def _cells(values: list[float]) -> list[str]:
    return [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values]


def _notes(found: dict[str, Any] | None, modelled: Modelled | str) -> list[str]:
    """What else there is to say, a line each."""
    notes = []
    if found is not None:
        clocks = [f"{name} {a} -> {b}" for name in ("mhz", "celsius") for a, b in [found[name]] if a is not None]
        where = ", ".join([found["device"], *clocks, f"{found['threads']} threads"])
        notes.append(f"measured on {found['host']}: {where}")
    if isinstance(modelled, str):
        return [*notes, f"no forecast: {modelled}"]
    d, p = modelled.decode, modelled.prefill
    notes.append(
        f"counted on an emulated Cortex-A72: {d.instructions / 1e6:.2f} million instructions a decoded token, "
        f"{p.instructions / p.tokens / 1e6:.2f} a prompt token"
    )
    if modelled.forecast is None:
        return [*notes, "no forecast: the target states no clock and no memory bandwidth, as it is no single board"]
    return [*notes, f"forecast at {modelled.clock_mhz} MHz from these, llvm-mca's cycles and the target's bandwidth"]

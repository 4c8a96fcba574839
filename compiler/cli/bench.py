"""Measure prefill and decode speed of a bundle, or of a published shape, alone or beside other engines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.cli.build import KV_CACHES, gpu_size_argument
from compiler.cli.deploy import connection_arguments, require_asyncssh

if TYPE_CHECKING:
    from compiler.measure.compare import Workload
    from compiler.measure.engines import Engines
    from compiler.measure.growth import Setup
    from targets import Target

BITS = (2, 3, 4, 5, 6, 8)
GROWTH = ("context", "prompt", "size", "group", "bits")
DEFAULT_SHAPE = "tinyllama-1.1b"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="bundle folder to measure")
    shape = parser.add_argument_group("a published shape with random weights, instead of a bundle")
    shape.add_argument("--shape", metavar="NAME", help=f"e.g. {DEFAULT_SHAPE}; {DEFAULT_SHAPE}:1 is one layer of it")
    shape.add_argument("--bits", type=int, choices=BITS, help="bits of the linear layers (default: 4)")
    shape.add_argument("--group-size", type=int, metavar="G", help="inputs that share a scale (default: 128)")
    shape.add_argument("--head-bits", type=int, choices=BITS, help="bits of the output head (default: as --bits)")
    shape.add_argument(
        "--kv-cache", choices=KV_CACHES, help="what keys and values of past tokens are kept in (default: float16)"
    )
    shape.add_argument("--target", metavar="NAME", help="build for this target (default: native)")
    gpu_size_argument(shape)
    board = parser.add_argument_group("a board, instead of this machine, with BUNDLE")
    board.add_argument(
        "--host", metavar="[USER@]HOST[:DIR]",
        help="measure there over SSH, after `deploy` if need be, and print the forecast beside it",
    )  # fmt: skip
    board.add_argument("--board", choices=("qemu",), help="forecast only: count on an emulated Raspberry Pi 4")
    connection_arguments(board)
    work = parser.add_argument_group("workload")
    work.add_argument(
        "--threads", type=_counts, metavar="N[,N]",
        help="threads, or several numbers one after the other (default: what the runtime would take)",
    )  # fmt: skip
    work.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of a prefill (default: 512)")
    work.add_argument("--decode-tokens", type=int, metavar="N", help="tokens decoded a round (default: 16)")
    work.add_argument("--context", type=int, metavar="N", help="tokens before these (default: 128)")
    work.add_argument("--rounds", type=int, metavar="N", help="how often each is run (default: 5)")
    peers = parser.add_argument_group("other engines, run in turns with quern")
    peers.add_argument(
        "--against", action="append", default=[], metavar="PEER[:VARIANT]",
        help="llama.cpp (variants native, no-amx, avx2), openvino or onnxruntime-genai; may be repeated",
    )  # fmt: skip
    peers.add_argument("--model", type=Path, metavar="DIR", help="with BUNDLE: the checkpoint it was built from")
    peers.add_argument("--install-peers", action="store_true", help="install what is missing, each in its environment")
    peers.add_argument("--peers-dir", type=Path, metavar="DIR", help="where peers are (default: ~/.cache/quern/peers)")
    more = parser.add_argument_group("more")
    more.add_argument("--perplexity", type=Path, metavar="TEXT", help="with BUNDLE: perplexity on a text file, too")
    more.add_argument("--windows", type=int, metavar="N", help="windows of 256 tokens of it, at most (default: all)")
    more.add_argument(
        "--profile", action="store_true",
        help="where a decoded token and a prompt spend their time, kernel by kernel, instead of their speed alone",
    )  # fmt: skip
    more.add_argument("--growth", choices=GROWTH, help="a table over one of these instead of a single workload")
    more.add_argument("--growth-values", metavar="V,V", help="its points (default: a fixed list)")
    more.add_argument("--plot", type=Path, metavar="FILE", help="with --growth: draw it, .svg or .png")
    more.add_argument(
        "--cost", choices=("time", "model"), default="time",
        help="with --shape: 'model' forecasts a device that is not at hand from instructions under qemu and modelled "
        "cycles, or for a GPU from bytes and launches (default: time)",
    )  # fmt: skip
    more.add_argument("--record", type=Path, metavar="FILE", help="append the results as JSON lines")
    more.add_argument("--json", action="store_true", help="print JSON to stdout")


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor several with commas") from None
    if len(set(counts)) != len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} has a number twice")
    return counts


def run(options: argparse.Namespace) -> int:
    """Build the shape if asked, measure, print."""
    import targets
    from compiler.errors import UserError
    from compiler.measure import bench_options

    bench_options.check(options)
    bench_options.complete(options)
    if options.record is not None:
        from compiler.measure import record_file

        record_file.require_writable(options.record)
    if options.host is not None or options.board:
        return _on_device(options)
    target = targets.load(options.target).sized(options.multiprocessors)
    if options.cost == "model":
        from compiler.measure import forecast_report, gpu_forecast_report

        made = (forecast_report if target.gpu is None else gpu_forecast_report).show(options, target)
        _record(options.record, [{**made, **_made_with()}])
        return 0
    if options.bundle is None:
        _require(target)
    on_gpu = target.gpu is not None if options.bundle is None else _on_gpu(options.bundle)
    if on_gpu and options.threads != [None]:
        what = options.bundle or target.name
        raise UserError(f"{what}: runs on a GPU, and threads are the CPU's. Leave --threads out.")
    if options.growth is not None:
        return _grow(options, target)
    from compiler.measure import shapes
    from compiler.measure.shape_bundle import built

    if options.shape is not None:
        shapes.settings(options.shape)
    engines = _engines(options)
    setup = _setup(options)
    with ExitStack() as stack:
        path = options.bundle or stack.enter_context(built(setup, target, options.json))
        setup = replace(setup, work=_fitting(path, setup.work))
        found: list[dict[str, object]] = []
        for threads in options.threads:
            if options.profile:
                latest = _profile(options, path, target, setup.work, threads)
            elif engines.others or options.perplexity:
                latest = _beside(options, path, setup, engines, threads)
            else:
                latest = _alone(options, path, target, setup.work, threads)
            _record(options.record, latest)  # one number of threads after the other, before it can be interrupted
            found += latest
    if options.json:
        print("\n".join(json.dumps(record) for record in found))
    return 0


def _on_device(options: argparse.Namespace) -> int:
    """Measure there if there is a device, forecast, print."""
    import asyncio

    from compiler.progress import Reporter

    if options.host is not None:
        require_asyncssh("bench --host")
    from compiler.measure import on_device

    (threads,), report = options.threads, Reporter(quiet=options.json)
    work = _fitting(options.bundle, _workload(options))
    found = None
    if options.host is not None:
        device = on_device.Device(options.host, options.port, options.identity)
        found = asyncio.run(on_device.measured(options.bundle, device, work, threads, report))
        made = on_device.modelled_or_reason(options.bundle, work, found["max_mhz"], report)
    else:
        with report.stage("Count"):
            made = on_device.model(options.bundle, work, None, report)
    record = {**on_device.record(options.bundle, work, found, made), **_made_with()}
    if options.json:
        print(json.dumps(record))
    else:
        on_device.print_table(work, found, made)
    _record(options.record, [record])
    return 0


def _made_with() -> dict[str, object]:
    """quern's commit, TVM and the time; the processor of this machine is no matter."""
    from compiler.measure import machine

    return {name: value for name, value in machine.describe().items() if name not in ("cpu", "cpus")}


def _require(target: Target) -> None:
    """Raise UserError where this machine cannot run what would be built."""
    from compiler import pipeline
    from compiler.errors import UserError
    from runtime import device

    if refusals := device.refusals(pipeline.manifest_target(target)):
        raise UserError(
            f"{target.name}: bench builds a shape and measures it on this machine, which cannot run it: "
            f"{'; '.join(refusals)}. --cost model forecasts, and a BUNDLE with --host is measured on its device."
        )


def _engines(options: argparse.Namespace) -> Engines:
    """Those asked for beside quern, installed."""
    from compiler.measure import peers
    from compiler.measure.engines import Engines
    from compiler.progress import Reporter

    say, folder = Reporter(quiet=options.json).line, peers.place(options.peers_dir)
    return Engines.installed(options.against, folder, options.model, options.install_peers, say)


def _setup(options: argparse.Namespace) -> Setup:
    from compiler.measure.growth import Setup

    bits = options.bits
    head = options.head_bits or bits
    return Setup(options.shape or DEFAULT_SHAPE, bits, options.group_size, head, _workload(options), options.kv_cache)


def _workload(options: argparse.Namespace) -> Workload:
    from compiler.measure.compare import Workload

    return Workload(options.prompt_tokens, options.context, options.decode_tokens, options.rounds)


def _fitting(path: Path, work: Workload) -> Workload:
    """The workload, cut to what the bundle's context holds, which is told."""
    from runtime.bundle import read_manifest

    positions = read_manifest(path).model.context
    cut = work.within(positions)
    if cut != work:
        print(
            f"{path} has a context of {positions} tokens: a prompt of {cut.prompt_tokens} is measured, and "
            f"{cut.decode_tokens} decoded after {cut.context}",
            file=sys.stderr,
        )
    return cut


def _alone(
    options: argparse.Namespace, path: Path, target: Target, work: Workload, threads: int | None
) -> list[dict[str, object]]:
    from compiler.measure import speed, speed_report

    if _on_gpu(path):
        return _alone_on_gpu(options, path, work)
    measured = speed.measure(path, target, work.prompt_tokens, work.decode_tokens, work.rounds, threads, work.context)
    if not options.json:
        speed_report.alone(measured, work)
    return [{**measured.record(), **asdict(work), **_where(options)}]


def _profile(
    options: argparse.Namespace, path: Path, target: Target, work: Workload, threads: int | None
) -> list[dict[str, object]]:
    from compiler.measure import profile, profile_report

    found = profile.measure(path, target, work, threads)
    if not options.json:
        profile_report.show(found, work)
    return [{**found.record(), **asdict(work), **_where(options)}]


def _on_gpu(path: Path) -> bool:
    from runtime.bundle import read_manifest

    return read_manifest(path).target.gpu is not None


def _alone_on_gpu(options: argparse.Namespace, path: Path, work: Workload) -> list[dict[str, object]]:
    from compiler.measure import gpu_speed, speed_report

    measured = gpu_speed.measure(path, work.prompt_tokens, work.decode_tokens, work.rounds, work.context)
    if not options.json:
        speed_report.on_gpu(measured, work)
    return [{**measured.record(), **asdict(work), **_where(options)}]


def _where(options: argparse.Namespace) -> dict[str, object]:
    """What was measured and where, for a record."""
    from compiler.measure import machine
    from runtime.bundle import read_manifest

    if options.bundle is None:
        return {"shape": options.shape, "bundle": None, "target": options.target, **machine.describe()}
    target = read_manifest(options.bundle).target.name
    return {"shape": None, "bundle": str(options.bundle), "target": target, **machine.describe()}


def _beside(
    options: argparse.Namespace, path: Path, setup: Setup, engines: Engines, threads: int | None
) -> list[dict[str, object]]:
    """One run of quern and the peers in turns, and perplexity where it is asked for."""
    from compiler.measure import compare, perplexity, speed_report
    from runtime.bundle import open_bundle

    parts: list[list[int]] | None = None
    if options.perplexity:
        parts = perplexity.windows(open_bundle(path, verify_weights=False), options.perplexity, options.windows)
    with ExitStack() as stack:
        sides = engines.opened(stack, path, setup, threads)
        rows = compare.compare(sides, setup.work)
        perplexities = [None] * len(rows) if parts is None else perplexity.beside(sides, parts)
    if not options.json:
        speed_report.beside(rows, setup.work, perplexities)
    found = compare.records(rows, setup.work, _where(options))
    return [{**record, "perplexity": value} for record, value in zip(found, perplexities, strict=True)]


def _grow(options: argparse.Namespace, target: Target) -> int:
    """Every round goes through all points, so that what the machine drifts meanwhile does not look like growth."""
    from compiler.measure import compare, growth, growth_report, record_file, shapes

    if options.plot is not None:
        growth.require_plot(options.plot)
        record_file.require_writable(options.plot)
    values = growth.values(options.growth, options.growth_values)
    todo = growth.setups(options.growth, _setup(options), values)
    for _, setup in todo:
        shapes.settings(setup.shape)  # a wrong name is told before the first minutes have passed
    grown = growth_report.Growth(options.growth, todo, _engines(options))
    found: list[dict[str, object]] = []
    try:
        for value, setup, rows in grown.run(target, options.threads):
            more = {**_where(options), "shape": setup.shape, "growth": options.growth, "value": value}
            latest = compare.records(rows, setup.work, more)
            _record(options.record, latest)
            found += latest
            if not options.json:
                growth_report.show(options.growth, value, setup, rows)
    finally:  # hours may have been measured when it is interrupted
        if options.json and found:
            print("\n".join(json.dumps(record) for record in found))
        if options.plot is not None and grown.points:
            growth.plot(options.growth, grown.points, growth.title(options.growth, _setup(options)), options.plot)
        if grown.stopped is not None:
            print(grown.stopped.told(f"in {options.record}" if options.record else "above"), file=sys.stderr)
    return 0


def _record(file: Path | None, found: Sequence[dict[str, object]]) -> None:
    if file is not None:
        from compiler.measure import record_file

        record_file.append(file, found)

"""Measure the knobs of a model's kernels, here or on boards, and record what is fastest for later builds."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.cli.build import gpu_size_argument, positive
from compiler.cli.deploy import remote_port

if TYPE_CHECKING:
    from compiler.tune.measure import Setting
    from compiler.tune.records import Database
    from compiler.tune.search import Outcome, Task
    from targets import Target

UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """A time for an option: 90s, 10m, 2h, or a bare number of seconds."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smh]?)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a time like 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2] or "s"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--target", default="native", metavar="NAME", help="build target (default: this machine)")
    gpu_size_argument(parser)
    parser.add_argument("--model", metavar="MODEL", help="tune what this checkpoint needs; as in build")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="tune published shapes, e.g. tinyllama-1.1b")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="bits of dense linear layers, and of --shapes (4)")
    parser.add_argument("--group-size", type=positive, metavar="G", help="with --bits, and --shapes (default: 128)")
    parser.add_argument("--head-bits", type=int, choices=(4, 8), help="bits of a dense head (--shapes: as --bits)")
    parser.add_argument("--activations", choices=("int8", "float16", "exact"), help="as in build")
    parser.add_argument("--context", type=positive, metavar="N", help="positions to keep, as in build")
    parser.add_argument(
        "--tokens", type=positive, nargs="+", metavar="M", default=[1, 128], help="tokens a call (default: 1 128)"
    )
    parser.add_argument("--operators", nargs="+", metavar="NAME", help="only these, e.g. linear_int8 attention")
    parser.add_argument(
        "--trials", type=positive, default=48, metavar="N", help="points tried a shape, counting earlier runs (48)"
    )
    parser.add_argument("--time-budget", type=seconds, metavar="T", help="stop after this time, e.g. 10m")
    parser.add_argument(
        "--cost", choices=("time", "model"), default="time",
        help="choose by measured time, or without the device by counted instructions and llvm-mca's cycles (time)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (default: what the runtime would take)")
    parser.add_argument(
        "--drift", type=positive, metavar="PERCENT", help="repeat a batch whose canaries drift further (default: 25)"
    )
    boards = parser.add_argument_group("boards", "candidates are linked here and timed there; see docs/boards.md")
    boards.add_argument("--rpc", metavar="HOST:PORT", help="TVM's RPC tracker, where boards offer themselves")
    boards.add_argument("--key", metavar="NAME", help="what they are offered as (default: the target's name)")
    boards.add_argument("--boards", type=positive, metavar="N", help="how many to use at once (default: 1)")
    boards.add_argument(
        "--ssh", action="append", metavar="[USER@]HOST", help="start everything on this board, and end it afterwards;"
        " may be repeated",
    )  # fmt: skip
    boards.add_argument("--port", type=remote_port, metavar="N", help="of the SSH servers (~/.ssh/config, 22)")
    boards.add_argument("--identity", type=Path, metavar="FILE", help="private key (default: agent and ~/.ssh)")
    boards.add_argument(
        "--patience", type=seconds, metavar="T", help="give up a board after this time (default: 15m)"
    )
    parser.add_argument("--tuning-logs", type=Path, metavar="DIR", help="databases (default: the repository's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")


def run(options: argparse.Namespace) -> int:
    """Measure what the database lacks, decide, print. Ends early, but whole, when the time is up."""
    import targets
    from compiler.errors import UserError

    if (options.model is None) == (options.shapes is None):
        raise UserError("tune needs either a --model or --shapes: give one of the two.")
    _check_boards(options)
    target = targets.load(options.target).sized(options.multiprocessors)
    if options.cost == "model":
        return _run_modelled(options, target)
    if target.gpu is not None and options.threads:
        raise UserError(f"{target.name}: runs on a GPU, and threads are the CPU's. Leave --threads out.")
    if options.rpc is not None or options.ssh:
        return _run_there(options, target)
    _require(target)
    if target.gpu is not None:
        return _run_there(options, target)
    if options.patience is not None:
        raise UserError("--patience belongs to --rpc or --ssh, which is missing. Give one of them.")
    return _run_here(options, target)


def _run_here(options: argparse.Namespace, target: Target) -> int:
    """On this machine, one task after the other. An interrupt ends it, with a summary of what is complete."""
    from compiler.errors import UserError
    from runtime import device

    threads, cpus = options.threads or device.default_threads(), len(device.affinity())
    if threads > cpus:
        raise UserError(
            f"--threads is {threads}, but this process has {cpus} processors: threads that wait for each other say "
            f"nothing about kernels. Give at most {cpus}."
        )
    os.environ["TVM_NUM_THREADS"] = str(threads)  # before TVM is loaded
    from compiler.tune import records, report, search, tasks
    from compiler.tune.local import LocalMeasurer
    from compiler.tune.measure import LOCAL, Setting

    stop = search.until(options.time_budget)
    database = records.Database.writing(options.tuning_logs or records.DEFAULT_FOLDER, target.tuning_key)
    measurer = LocalMeasurer(Setting.here(threads), most_drift=_drift(options))
    outcomes: list[Outcome] = []
    found: list[Task] = []
    try:
        database.admit(LOCAL)
        measurer.start()  # loads TVM while we do
        found = tasks.of(options, target)
        tuner = search.Tuner(database, measurer, options.trials, stop)
        for task in report.shown(tuner, found, quiet=options.json):
            outcomes.append(tuner.tune(task))  # noqa: PERF401 those before an interrupt count
        database.keep()
    except KeyboardInterrupt:
        if outcomes:
            report.summary(options, target, threads, database.path, outcomes, len(found))
        raise
    finally:
        measurer.close()
        database.close()
    report.summary(options, target, threads, database.path, outcomes, len(found))
    return 0


def _run_modelled(options: argparse.Namespace, target: Target) -> int:
    """On no device: under qemu, by a model of the target's pipelines, into a database of its own."""
    os.environ["TVM_NUM_THREADS"] = "1"  # of this process, which only compiles
    from compiler.tune import records, report, search, tasks
    from compiler.tune.model import ModelMeasurer

    measurer = ModelMeasurer.of(target)
    stop = search.until(options.time_budget)
    folder = options.tuning_logs or records.DEFAULT_FOLDER
    database = records.Database.writing(folder, target.tuning_key, records.MODEL_FILE_NAME)
    try:
        found = tasks.of(options, target)
        tuner = search.Tuner(database, measurer, options.trials, stop)
        outcomes = [tuner.tune(task) for task in report.shown(tuner, found, quiet=options.json)]
        database.keep()
    finally:
        database.close()
    report.summary(options, target, measurer.setting.threads, database.path, outcomes, len(found))
    return 0


def _run_there(options: argparse.Namespace, target: Target) -> int:
    """On boards, each of which takes what is to be measured next; this machine is one for its own GPU."""
    os.environ["TVM_NUM_THREADS"] = "1"  # of this process, which only links
    from compiler.errors import UserError
    from compiler.tune import records, report, search, tasks
    from compiler.tune.boards import BoardMeasurer
    from compiler.tune.fleet import PATIENCE_S, Fleet
    from compiler.tune.measure import Setting

    try:
        from tvm import rpc  # noqa: F401
    except ImportError as error:
        raise UserError(f"Tuning on boards needs {error.name}. Install it: pip install 'quern[tune]'.") from None
    stop = search.until(options.time_budget)
    folder = options.tuning_logs or records.DEFAULT_FOLDER
    database = records.Database.writing(folder, target.tuning_key)
    threads = options.threads or (target.cores if target.gpu is None else 1)
    count = options.boards or len(options.ssh or "1")
    try:
        found = tasks.of(options, target)
        with _tracker(options, target) as (address, key), _scratch() as scratch:
            setting = replace(Setting.here(threads), cpu="unknown", measured="rpc")
            slots = [
                BoardMeasurer(
                    setting, most_drift=_drift(options), tracker=address, key=key, target=target, folder=scratch,
                    admit=partial(_admit, database, target),
                )
                for _ in range(count)
            ]  # fmt: skip
            tuner = search.Tuner(database, slots[0], options.trials, stop, devices=count)
            with report.bar(options.json) as bar:
                if bar is not None:
                    tuner.advance = partial(bar.advance, bar.add_task("trials", total=sum(map(tuner.wanted, found))))
                tell = partial(print, file=sys.stderr, flush=True)
                fleet = Fleet(tuner, slots, tell, PATIENCE_S if options.patience is None else options.patience)
                outcomes = fleet.run(found)
        database.keep()
    finally:
        database.close()
    report.summary(options, target, threads, database.path, outcomes, len(found))
    return 0


def _check_boards(options: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other."""
    from compiler.errors import UserError
    from runtime.rpc_tracker import Address

    if options.rpc is not None and options.ssh:
        raise UserError("--rpc takes boards from a tracker that runs already, --ssh starts one: give one of the two.")
    if options.cost == "model":
        for name in ("rpc", "ssh", "threads", "drift", "key", "boards", "port", "identity", "patience"):
            if getattr(options, name) is not None:
                raise UserError(f"--cost model asks no device and no clock: leave out --{name}.")
    given = [f"--{name}" for name in ("key", "boards", "port", "identity") if getattr(options, name) is not None]
    if given and options.rpc is None and not options.ssh:
        raise UserError(f"{given[0]} belongs to --rpc or --ssh, which is missing. Give one of them.")
    if options.rpc is not None:
        for name in ("port", "identity"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} belongs to --ssh: with --rpc, boards come by themselves. Leave it out.")
        try:
            Address.parse(options.rpc)
        except ValueError as error:
            raise UserError(f"--rpc: {error}. Give the address of `python -m tvm.exec.rpc_tracker`.") from None


def _admit(database: Database, target: Target, setting: Setting) -> None:
    """Raise UserError when records of this board may not stand in the database."""
    from compiler.tune.boards import BoardError
    from compiler.tune.measure import EMULATED
    from compiler.tune.records import DEFAULT_FOLDER

    if setting.measured == EMULATED and database.path.parent.parent.resolve() == DEFAULT_FOLDER.resolve():
        raise BoardError(
            f"This board is emulated: its times say nothing about a real one and never go into {DEFAULT_FOLDER.name}/. "
            f"Give them a folder of their own with --tuning-logs DIR."
        )
    told = database.gpu is not None
    database.admit(setting.measured, setting.gpu)
    size = None if target.gpu is None else target.gpu.multiprocessors
    if setting.gpu is None or told or setting.measured == EMULATED or setting.gpu.multiprocessors == size:
        return
    option = f"--multiprocessors {setting.gpu.multiprocessors}, here and in `build`,"
    print(f"This GPU is {setting.gpu}; defaults are for {size}. {option} is for this one.", file=sys.stderr)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="quern-tune-") as folder:
        yield Path(folder)


@contextmanager
def _tracker(options: argparse.Namespace, target: Target) -> Iterator[tuple[str, str]]:
    """Where boards offer themselves, and as what."""
    from compiler.errors import UserError

    key = options.key or target.name
    if options.rpc:
        _find_tracker(options.rpc)
        yield options.rpc, key
        return
    if not options.ssh:
        from compiler.tune import own_gpu

        with own_gpu.offered(key) as address:
            yield str(address), key
        return
    try:
        from compiler.tune import ssh
    except ImportError:
        raise UserError("--ssh needs the package asyncssh. Install it: pip install 'quern[deploy]'.") from None
    with ssh.boards(options.ssh, key, target, options.port, options.identity) as address:
        yield str(address), key


def _find_tracker(address: str) -> None:
    """Raise UserError unless a tracker answers there: later it may come and go, but at first a name may be wrong."""
    from compiler.errors import UserError
    from runtime.rpc_tracker import Address, Tracker

    try:
        Tracker(Address.parse(address)).close()
    except OSError as error:
        raise UserError(
            f"--rpc {address}: no tracker of TVM answers there: {error.strerror or error}. Start one with `python -m "
            f"tvm.exec.rpc_tracker --host ADDRESS --port PORT`."
        ) from None


def _drift(options: argparse.Namespace) -> float:
    from compiler.tune.measure import DRIFT

    return DRIFT if options.drift is None else options.drift / 100


def _require(target: Target) -> None:
    """Raise UserError where this machine cannot run the target's code."""
    from compiler import pipeline
    from compiler.errors import UserError
    from runtime import device, manifest

    machine = manifest.Target(target.name, target.arch, target.triple, target.mcpu, target.cpuinfo, target.glibc)
    if refusals := device.refusals(machine if target.gpu is None else pipeline.manifest_target(target)):
        why = "; ".join(refusals)
        raise UserError(
            f"{target.name}: candidates are timed on this machine, and it cannot run them: {why}. Let a "
            f"board time them: --ssh pi@host, or --rpc HOST:PORT."
        )

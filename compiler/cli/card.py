"""Check CUDA bundles on the GPU at hand: numerics against this machine's CPU, then speed; one JSON line a result.

A part that fails is a line with the words of what failed, and the next one begins; so does one that hangs, when its
time is up. Numerics of all targets come first: they take seconds. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import targets
from compiler.cli.build import DEFAULT_MODEL
from compiler.cli.tune import seconds

if TYPE_CHECKING:
    from compiler.measure.gpu_checks import Checks
    from runtime.cuda_driver import Found
    from targets import Target

TARGETS = "cuda-sm90,cuda-sm87,cuda-sm72,cuda-sm53"  # a card's own first: what matters most, should time run out
SHAPES = "tinyllama-1.1b,llama-2-7b"
ACTIVATIONS = ("exact", "int8", "float16", "default")  # of `build`; default: what it does by itself
LEAST_S = 90  # no part begins with less time left

Record = dict[str, Any]
Part = tuple[str, Callable[[float], Record]]  # a name for people; its record, within so many seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--targets", default=TARGETS, metavar="T,T", help=f"CUDA targets to check (default: {TARGETS})")
    parser.add_argument(
        "--shapes", default=SHAPES, metavar="S,S", help=f"shapes to time; NAME:N is N layers of it (default: {SHAPES})"
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR", help="checkpoint for the numerics")
    parser.add_argument(
        "--activations", default="exact,default", metavar="A,A", help="numerics to check (default: exact,default)"
    )
    parser.add_argument(
        "--time-budget", type=seconds, default=3600.0, metavar="T", help="skip what would begin later (default: 1h)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the results as JSON lines")


def run(options: argparse.Namespace) -> int:
    """Exit code 0 when something was checked, no part failed, and all numerics are within their bounds."""
    from compiler.codegen import nvrtc
    from compiler.errors import UserError
    from compiler.measure import gpu_clocks, machine, record_file, shapes
    from compiler.measure.gpu_checks import Checks
    from runtime import cuda_driver
    from runtime.errors import DeviceError

    chosen = [targets.load(name) for name in _names(options.targets)]
    if not chosen:
        raise UserError("--targets names none, and card checks one after the other. Give some, or leave it out.")
    for activations in _names(options.activations):
        if activations not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"--activations {activations}: there are no such numerics. Take some of {known}.")
    for shape in _names(options.shapes):
        shapes.settings(shape)
    if not options.model.exists():
        raise UserError(
            f"{options.model}: is not there, and card compares the logits of a model. Give --model a checkpoint "
            f"folder; a clone of quern brings one."
        )
    if options.record is not None:
        record_file.require_writable(options.record)
    found = cuda_driver.find()
    if isinstance(found, str):
        raise DeviceError(f"card: {found}. Run it on a machine with an NVIDIA GPU and its driver.")
    nvrtc.require()
    end = time.monotonic() + options.time_budget
    card: Record = {"device": found.name, "sm": found.arch, "driver": _version(found.driver)}
    if found.emulated:
        card["emulated"] = True
    _say(f"{found.name}, sm_{found.arch}, driver of CUDA {card['driver']}")
    about = {"multiprocessors": found.multiprocessors, **gpu_clocks.about(), **machine.describe()}
    _write(options.record, {**card, "check": "card", **about})
    done = {"passed": 0, "failed": 0, "skipped": 0}
    with tempfile.TemporaryDirectory(prefix="quern-card-") as folder:
        parts = list(_parts(options, chosen, found, Checks(Path(folder), options.model, _still)))
        for number, (label, part) in enumerate(parts, 1):
            _say(f"[{number}/{len(parts)}] {label} ...")
            started = time.monotonic()
            record = part(end - started)
            outcome = "skipped" if record["check"] == "skipped" else "passed" if record.get("good", True) else "failed"
            done[outcome] += 1
            took = time.monotonic() - started
            _write(options.record, {**card, **record, "took_s": round(took, 1)})
            _say(f"[{number}/{len(parts)}] {label}: {outcome} after {took:.0f} s: {_summary(record)}")
    _say(", ".join(f"{count} {outcome}" for outcome, count in done.items()))
    return 0 if done["passed"] and not done["failed"] else 1


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parts(options: argparse.Namespace, chosen: list[Target], found: Found, checks: Checks) -> Iterator[Part]:
    """What there is to do, what matters most first."""
    for target in chosen:
        name = target.name
        if why := _unfit(target, found):
            yield name, partial(_skipped, name, why)
            continue
        for activations in _names(options.activations):
            call = partial(checks.numerics, name, activations)
            about = {"check": "numerics", "target": name, "asked": activations}
            yield f"numerics of {name}, activations {activations}", partial(_checked, about, call)
    for target in chosen:
        for shape in [] if _unfit(target, found) else _names(options.shapes):
            about = {"check": "speed", "target": target.name, "shape": shape}
            timed = partial(checks.speed, shape, target.name)
            yield f"speed of {shape}, {target.name}", partial(_checked, about, timed)


def _unfit(target: Target, found: Found) -> str:
    """Why this card cannot run a target; empty when it can."""
    from compiler import pipeline

    if target.gpu is None:
        return f"{target.name} has no GPU"
    if target.arch != targets.load("native").arch:
        return f"its host code is for {target.arch}"
    if target.gpu.sm > found.arch:
        return f"this GPU is sm_{found.arch}"
    gpu = pipeline.manifest_target(target).gpu
    assert gpu is not None
    major, minor = map(int, gpu.driver.split("."))
    if found.driver < 1000 * major + 10 * minor:
        return f"it needs a driver of CUDA {gpu.driver}, and this one is of {_version(found.driver)}: update the driver"
    return ""


def _skipped(target: str, why: str, left_s: float) -> Record:
    return {"check": "skipped", "target": target, "why": why}


def _checked(about: Record, call: Callable[[float], Record], left_s: float) -> Record:
    """The record of a part, or of its failure: whatever it is, no part takes the others with it."""
    from compiler.errors import UserError

    if left_s < LEAST_S:
        return {**about, "check": "skipped", "left_out": about["check"], "why": "the time budget is used up"}
    try:
        return {**about, **call(left_s)}
    except (UserError, OSError, subprocess.SubprocessError) as error:
        return {**about, "good": False, "error": str(error)}
    except Exception as error:  # a mistake of ours in one part is that part's failure
        return {**about, "good": False, "error": f"{type(error).__name__}: {error}"}


def _summary(record: Record) -> str:
    """A result in a line, for people."""
    for reason in ("error", "why"):
        if reason in record:
            return str(record[reason])
    if record["check"] == "numerics":
        wrong = f", {record['not_finite']} logits are no numbers" if record["not_finite"] else ""
        return f"worst logit off by {record['worst']:.2g} (bound {record['bound']:.2g}){wrong}"
    ratio, plain = record["decode_bandwidth_ratio"], record["decode_plain_tok_s"]
    return (
        f"decode {record['decode_tok_s']:.1f} tokens/s ({ratio:.0%} of a copy; {plain:.1f} without graphs), "
        f"prefill {record['prefill_tok_s']:.0f} tokens/s, {record['prefill_tflop_s']:.3g} TFLOP/s, code: "
        f"{record['code']}"
    )


def _version(driver: int) -> str:
    return f"{driver // 1000}.{driver % 1000 // 10}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _still(what: str, seconds_so_far: float) -> None:
    _say(f"    {what}: {seconds_so_far:.0f} s so far")


def _write(file: Path | None, record: Record) -> None:
    print(json.dumps(record), flush=True)
    if file is not None:
        from compiler.measure import record_file

        record_file.append(file, [record])

"""Check CUDA bundles on the GPU at hand: numerics against this machine's CPU, then speed; one JSON line a result.

A part that fails is a line with the words of what failed, and the next one begins. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.cuda_driver import Found
    from targets import Target

TARGETS = "cuda-sm53,cuda-sm72,cuda-sm87,cuda-sm90"
SHAPES = "tinyllama-1.1b,llama-2-7b"
TOKENS = 160  # a whole chunk of a prompt, a padded one, and single tokens
# Largest difference of a logit. Exact: fp32 sums in another order, 1e-5 of logits up to 20 and as much again. Rounded
# activations: what moves one of them over the edge of a rounding moves a logit by up to 0.14 (tests/end_to_end).
BOUNDS = {"exact": 5e-4, "int8": 0.3, "float16": 0.3}
SAME = 0.9  # of the most likely tokens, at least
PART_S = 1800  # a part that takes longer hangs: a build of 7 billion weights takes minutes
# CUdevice_attribute: peak clocks in kHz, bits of the memory bus, bytes of the second-level cache.
ATTRIBUTES = {"clock_khz": 13, "memory_clock_khz": 36, "memory_bus_bits": 37, "l2_bytes": 38}
# What nvidia-smi says besides, where it is: Jetsons have none.
SMI = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu", "pstate")

Part = tuple[str, Callable[[], dict[str, object]]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--targets", default=TARGETS, metavar="T,T", help=f"CUDA targets to check (default: {TARGETS})")
    parser.add_argument("--shapes", default=SHAPES, metavar="S,S", help=f"shapes to time (default: {SHAPES})")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR", help="checkpoint for the numerics")
    parser.add_argument(
        "--activations", default="exact,default", metavar="A,A", help="numerics to check (default: exact,default)"
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the results as JSON lines")


def run(options: argparse.Namespace) -> int:
    """Exit code 0 when something was checked, no part failed, and all numerics are within their bounds."""
    from compiler.codegen import nvrtc
    from runtime import cuda_driver
    from runtime.errors import DeviceError

    chosen = [targets.load(name) for name in filter(None, options.targets.split(","))]
    found = cuda_driver.find()
    if isinstance(found, str):
        raise DeviceError(f"card: {found}. Run it on a machine with an NVIDIA GPU and its driver.")
    nvrtc.require()
    card: dict[str, object] = {"device": found.name, "sm": found.arch, "driver": _version(found.driver)}
    if found.emulated:
        card["emulated"] = True
    _say(f"{found.name}, sm_{found.arch}, driver of CUDA {card['driver']}")
    _write(options.record, {**card, "check": "card", "multiprocessors": found.multiprocessors, **_clocks()})
    done = {"passed": 0, "failed": 0, "skipped": 0}
    with tempfile.TemporaryDirectory(prefix="quern-card-") as folder:
        parts = list(_parts(options, chosen, found, Path(folder)))
        for number, (label, part) in enumerate(parts, 1):
            _say(f"[{number}/{len(parts)}] {label} ...")
            started = time.monotonic()
            record = part()
            outcome = "skipped" if record["check"] == "skipped" else "passed" if record.get("good", True) else "failed"
            done[outcome] += 1
            _write(options.record, {**card, **record})
            took = time.monotonic() - started
            _say(f"[{number}/{len(parts)}] {label}: {outcome} after {took:.0f} s: {_summary(record)}")
    _say(", ".join(f"{count} {outcome}" for outcome, count in done.items()))
    return 0 if done["passed"] and not done["failed"] else 1


def _parts(options: argparse.Namespace, chosen: list[Target], found: Found, folder: Path) -> Iterator[Part]:
    """What there is to do: a name for people, and what does it."""
    for target in chosen:
        name = target.name
        if why := _unfit(target, found):
            yield name, partial(dict, target=name, check="skipped", why=why)
            continue
        for activations in filter(None, options.activations.split(",")):
            place = folder / f"{name}-{activations}"
            call = partial(_numerics, options.model, name, activations, place)
            yield f"numerics of {name}, activations {activations}", partial(_checked, "numerics", name, {}, call)
    for shape in filter(None, options.shapes.split(",")):  # the numerics of all targets first: they take seconds
        for target in chosen:
            if not _unfit(target, found):
                name, call = target.name, partial(_speed, shape, target.name)
                yield f"speed of {shape}, {name}", partial(_checked, "speed", name, {"shape": shape}, call)


def _unfit(target: Target, found: Found) -> str:
    """Why this card cannot run a target; empty when it can."""
    from compiler import pipeline

    if target.gpu is None:
        return f"{target.name} has no GPU"
    if target.gpu.sm > found.arch:
        return f"this GPU is sm_{found.arch}"
    gpu = pipeline.manifest_target(target).gpu
    assert gpu is not None
    major, minor = map(int, gpu.driver.split("."))
    if found.driver < 1000 * major + 10 * minor:
        return f"it needs a driver of CUDA {gpu.driver}, and this one is of {_version(found.driver)}: update the driver"
    return ""


def _checked(
    check: str, target: str, more: dict[str, object], call: Callable[[], dict[str, object]]
) -> dict[str, object]:
    """The record of a part, or of its failure: no part takes the others with it."""
    from compiler.errors import UserError

    try:
        return call()
    except (UserError, OSError, subprocess.TimeoutExpired) as error:
        return {"check": check, "target": target, **more, "good": False, "error": str(error)}


def _summary(record: dict[str, Any]) -> str:
    """A result in a line, for people."""
    for reason in ("error", "why"):
        if reason in record:
            return str(record[reason])
    if record["check"] == "numerics":
        return f"worst logit off by {record['worst']:.2g} (bound {record['bound']:.2g})"
    ratio, plain = record["decode_bandwidth_ratio"], record["decode_plain_tok_s"]
    return (
        f"decode {record['decode_tok_s']:.1f} tokens/s ({ratio:.0%} of a copy; {plain:.1f} without graphs), "
        f"prefill {record['prefill_tok_s']:.0f} tokens/s, {record['prefill_tflop_s']:.3g} TFLOP/s"
    )


def _version(driver: int) -> str:
    return f"{driver // 1000}.{driver % 1000 // 10}"


def _clocks() -> dict[str, object]:
    """Peak clocks by the driver, and what nvidia-smi says now; what is not told is left out."""
    from runtime import cuda_driver

    driver, found = ctypes.CDLL(cuda_driver.path()), dict[str, object]()
    for name, attribute in ATTRIBUTES.items():
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0:
            found[name] = value.value
    return {**found, **_smi()}


def _smi() -> dict[str, object]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, "--id=0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return {"nvidia_smi": dict(zip(SMI, values, strict=True))} if len(values) == len(SMI) else {}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(file: Path | None, record: dict[str, object]) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _numerics(model: Path, target: str, activations: str, folder: Path) -> dict[str, object]:
    """The logits of one text from the GPU's bundle and from this CPU's, of the same model and activations."""
    import numpy as np

    from runtime.bundle import read_manifest

    folder.mkdir()
    given = [] if activations == "default" else ["--activations", activations]
    build = ["build", "--model", str(model), "--quiet"]
    _python("compiler", *build, "--target", target, "--out", str(folder / "gpu"), *given)
    manifest = read_manifest(folder / "gpu")
    used, head, cache = (str(manifest.quantization[key]) for key in ("activations", "head_bits", "kv_cache"))
    on_cpu = used if used in ("exact", "int8") else "exact"  # half precision is nearest to none
    same = ["--activations", on_cpu, "--head-bits", head, "--kv-cache", cache]
    _python("compiler", *build, "--out", str(folder / "cpu"), *same)
    count = min(TOKENS, manifest.model.context)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, manifest.model.vocab_size, count))
    want, got = (_logits(folder, side) for side in ("cpu", "gpu"))
    worst, agree = float(np.abs(got - want).max()), float((got.argmax(1) == want.argmax(1)).mean())
    return {
        "check": "numerics", "target": target, "activations": used, "tokens": count, "worst": worst,
        "largest": float(np.abs(want).max()), "bound": BOUNDS[used], "same_tokens": agree,
        "good": worst <= BOUNDS[used] and agree >= SAME,
    }  # fmt: skip


def _logits(folder: Path, side: str) -> NDArray[np.float32]:
    import numpy as np

    out = folder / f"{side}.npy"
    _python("runtime", "logits", str(folder / side), "--ids", str(folder / "ids.npy"), "--out", str(out))
    logits: NDArray[np.float32] = np.load(out)
    return logits


def _speed(shape: str, target: str) -> dict[str, object]:
    """What `bench --shape` says."""
    done = _python("compiler", "bench", "--shape", shape, "--target", target, "--json")
    return {"check": "speed", **json.loads(done), **_smi()}


def _python(module: str, *arguments: str) -> str:
    """A command of ours in a process of its own, as a user starts it."""
    from compiler.errors import UserError

    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PART_S)
    if done.returncode:
        said = done.stderr.strip().removeprefix("error: ") or f"it said nothing and left with {done.returncode}"
        raise UserError(f"{module} {' '.join(arguments)} failed: {said}")
    return done.stdout

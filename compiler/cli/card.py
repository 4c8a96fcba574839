"""Check CUDA bundles on the GPU at hand: numerics against this machine's CPU, then speed; one JSON line a result."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import targets
from compiler.cli.build import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TARGETS = "cuda-sm53,cuda-sm72,cuda-sm87,cuda-sm90"
SHAPES = "tinyllama-1.1b,llama-2-7b"
TOKENS = 160  # a whole chunk of a prompt, a padded one, and single tokens
# Largest difference of a logit. Exact: fp32 sums in another order, 1e-5 of logits up to 20 and as much again. Rounded
# activations: what moves one of them over the edge of a rounding moves a logit by up to 0.14 (tests/end_to_end).
BOUNDS = {"exact": 5e-4, "int8": 0.3, "float16": 0.3}
SAME = 0.9  # of the most likely tokens, at least


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
    """Exit code 0 when all numerics are within their bounds."""
    from runtime import cuda_driver
    from runtime.errors import DeviceError

    found = cuda_driver.find()
    if isinstance(found, str):
        raise DeviceError(f"card: {found}. Run it on a machine with an NVIDIA GPU and its driver.")
    card = {"device": found.name, "sm": found.arch, "driver": f"{found.driver // 1000}.{found.driver % 1000 // 10}"}
    good = True
    for record in _records(options, found.arch):
        good &= bool(record.get("good", True))
        line = json.dumps({**card, **record})
        print(line, flush=True)
        if options.record is not None:
            with options.record.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
    return 0 if good else 1


def _records(options: argparse.Namespace, arch: int) -> Iterator[dict[str, object]]:
    with tempfile.TemporaryDirectory(prefix="quern-card-") as folder:
        for name in filter(None, options.targets.split(",")):
            target = targets.load(name)
            if target.gpu is None or target.gpu.sm > arch:
                yield {"target": name, "check": "skipped", "why": f"this GPU is sm_{arch}"}
                continue
            for activations in filter(None, options.activations.split(",")):
                yield _numerics(options.model, name, activations, Path(folder) / f"{name}-{activations}")
            for shape in filter(None, options.shapes.split(",")):
                yield _speed(shape, name)


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
    return {"check": "speed", **json.loads(done)}


def _python(module: str, *arguments: str) -> str:
    """A command of ours in a process of its own, as a user starts it."""
    from compiler.errors import UserError

    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{module} {' '.join(arguments)} failed:\n{done.stderr.strip().removeprefix('error: ')}")
    return done.stdout

"""What a bundle is and whether it runs here, for people and as JSON. Any machine will do.

Reads the manifest and the sizes of the files; what is in them only if asked to: whoever runs the bundle checks that.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import device
from .bundle import missing, read_manifest, require_whole
from .errors import printable
from .manifest import Gpu, Manifest


def as_json(path: Path, verify: bool = False) -> dict[str, Any]:
    """The manifest's keys (chunk digests left out) and `refusals`: why it cannot run here; empty if it can.

    verify: check every digest first, which reads all of the bundle; BundleError for a file that is damaged.
    """
    manifest = read_manifest(path)
    if verify:
        require_whole(path, manifest)
    data = asdict(manifest)
    for digest in data["files"].values():
        del digest["chunks"]
    return {**data, "refusals": _refusals(path, manifest), **({"verified": True} if verify else {})}


def as_text(path: Path, verify: bool = False) -> str:
    """The same in a dozen lines."""
    manifest = read_manifest(path)
    if verify:
        require_whole(path, manifest)
    model, target, refusals = manifest.model, manifest.target, _refusals(path, manifest)
    rows = {
        "model": f"{model.name} ({model.type}), {model.parameters:,} parameters, {model.layers} layers, "
        f"vocabulary {model.vocab_size}",
        "context": f"{model.context} tokens",
        "quantisation": ", ".join(f"{k} {v}" for k, v in manifest.quantization.items() if v is not None),
        "target": f"{target.name}: {target.triple}, {target.cpu}, glibc {target.glibc}"
        + (f", {' '.join(target.features)}" if target.features else ""),
        **({} if target.gpu is None else {"gpu": _gpu(target.gpu)}),
        "tvm": f"{manifest.tvm.version}, ffi {manifest.tvm.ffi_version}",
        "tuning": _tuning(manifest),
        "memory": _memory(manifest),
        "functions": " ".join(manifest.functions),
        "chat": "turns" if manifest.chat else "none (plain text)",
        "files": ", ".join(f"{name} {digest.bytes:,} B" for name, digest in sorted(manifest.files.items())),
        **({"digests": "right, of every file"} if verify else {}),
        "runs here": "no: " + "; ".join(refusals) if refusals else "yes",
    }
    return "".join(f"{name + ':':<14}{printable(value)}\n" for name, value in rows.items())


def _refusals(path: Path, manifest: Manifest) -> list[str]:
    return device.refusals(manifest.target) + missing(path, manifest)


def _gpu(gpu: Gpu) -> str:
    code = f"machine code for {gpu.arch}, and PTX {gpu.ptx}" if gpu.cubin else f"PTX {gpu.ptx} for {gpu.arch}"
    return f"NVIDIA {gpu.arch} or later, driver of CUDA {gpu.driver} or later; {code}"


def _tuning(manifest: Manifest) -> str:
    if not manifest.tuning:
        return "none: every kernel has its schedule's default knobs"
    records = sorted({tuned.record for tuned in manifest.tuning.values()})
    modelled = sum(bool(tuned.modelled) for tuned in manifest.tuning.values())
    note = f"; {modelled} of them chosen by a model's cycles, not measured" if modelled else ""
    return f"{len(manifest.tuning)} kernels by records {' '.join(records)}{note}"


def _memory(manifest: Manifest) -> str:
    memory = manifest.memory
    parts = (
        ("weights", memory.weights_bytes),
        ("caches", memory.cache_bytes),
        ("activations", memory.activation_bytes),
        ("planned peak", memory.planned_peak_bytes),
    )
    return ", ".join(f"{name} {count / (1 << 20):.1f} MiB" for name, count in parts)

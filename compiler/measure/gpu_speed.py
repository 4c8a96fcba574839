"""Prefill and decode speed of a CUDA bundle on the GPU at hand, beside the speed of a copy within its memory.

The session is in a process of its own that has loaded the runtime only (bundle_process.py), as on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from compiler.measure.speed import QuernSide, Spread, open_side
from runtime.bundle import read_manifest
from runtime.manifest import Manifest

Note = Callable[[str, float], None]
COPY_BYTES = 1 << 30  # far beyond any cache
PROFILED = 5  # calls, launch by launch


@dataclass(frozen=True)
class GpuSpeed:
    """tokens/s, GB/s (10^9 bytes), bytes of weights that a decoded token reads; `gpu`: bundle_process's words of it,
    and what the manifest says of bits, activations and caches.

    decode_plain_tok_s: without CUDA graphs. kernels_ms: a token's kernels by the GPU's own clock. copy_gb_s counts
    bytes read and bytes written. decode_bandwidth_ratio: weights a second by copy_gb_s.
    kernels: by function, [kernel, launches, milliseconds of all of them], the longest first.
    """

    prefill_tok_s: Spread
    prefill_tflop_s: float
    decode_tok_s: Spread
    decode_plain_tok_s: Spread
    kernels_ms: Spread
    copy_gb_s: Spread
    decode_bandwidth_ratio: Spread
    weight_bytes_per_token: int
    gpu: dict[str, object]
    kernels: dict[str, list[list[object]]]

    def record(self) -> dict[str, object]:
        """One JSON object, medians by themselves and all spreads under `spread`."""
        spreads = {name: value for name, value in vars(self).items() if isinstance(value, Spread)}
        found: dict[str, object] = {name: value.median for name, value in spreads.items()}
        found |= {"prefill_tflop_s": self.prefill_tflop_s, "weight_bytes_per_token": self.weight_bytes_per_token}
        found |= {"spread": {name: asdict(value) for name, value in spreads.items()}, **self.gpu}
        return {**found, "kernels": self.kernels}


def for_every_token(weight: str, layers: int) -> bool:
    """Whether all tokens of a prompt meet a linear layer: head and the last layer's end are for the last one."""
    last = f"layers.{layers - 1}."
    return weight.partition(".")[0] != "head" and (not weight.startswith(last) or weight.startswith(f"{last}qkv"))


def flops_per_token(manifest: Manifest) -> int:
    """Two for each weight of the matrices that every token of a prompt meets: without embedding and head.

    Of the last layer that is q, k and v, by their share of its bytes.
    """
    prefill = next((f for name, f in manifest.functions.items() if name.startswith("prefill_")), None)
    hidden = prefill.output.shape[1] if prefill is not None else 0
    names = {w.name.partition(".")[0] for w in manifest.weights.tensors}
    tables = manifest.model.vocab_size * hidden * len(names & {"embedding", "head"})
    layers = manifest.model.layers
    sizes = {w.name: w.nbytes for w in manifest.weights.tensors if w.name.startswith(f"layers.{layers - 1}.")}
    met = sum(size for name, size in sizes.items() if for_every_token(name, layers)) / max(1, sum(sizes.values()))
    return round(2 * max(0, manifest.model.parameters - tables) * (layers - 1 + met) / layers)


def measure(path: Path, prompt: int, steps: int, rounds: int, context: int) -> GpuSpeed:
    """`rounds` times: prefill `prompt` tokens, decode `steps` after `context` with and without graphs, copy."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with open_side(path, None) as side:
        _round(side, prompt, steps, context, _ignore)  # graphs are captured, clocks go up
        for _ in range(rounds):
            _round(side, prompt, steps, context, note)
        side.process.ask("graphs", on=True)
        side.decode(context, 1)
        gpu = {**read_manifest(path).quantization, **side.process.ask("gpu")}
        used, kernels = side.used, _profile(side, path, prompt, context)
    spreads = {name: Spread.of(values) for name, values in found.items()}
    flops = flops_per_token(read_manifest(path)) * spreads["prefill_tok_s"].median / 1e12
    return GpuSpeed(prefill_tflop_s=flops, weight_bytes_per_token=used, gpu=gpu, kernels=kernels, **spreads)


def _profile(side: QuernSide, path: Path, prompt: int, context: int) -> dict[str, list[list[object]]]:
    """Where the time of a token goes, and that of the prompt function that this prompt mostly takes."""
    functions = read_manifest(path).functions
    chunks = {f.tokens: name for name, f in functions.items() if name.startswith("prefill_") and f.tokens <= prompt}
    side.decode(context, 1)
    found = {"decode": side.process.ask("profile", function="decode", rounds=PROFILED)["kernels"]}
    if chunks:
        name = chunks[max(chunks)]
        side.prefill(max(chunks))
        found[name] = side.process.ask("profile", function=name, rounds=PROFILED)["kernels"]
    return found


def _ignore(name: str, value: float) -> None:
    """What is measured while warming up."""


def _round(side: QuernSide, prompt: int, steps: int, context: int, note: Note) -> None:
    side.process.ask("graphs", on=True)
    note("prefill_tok_s", side.prefill(prompt))
    before = float(side.process.ask("copy", nbytes=COPY_BYTES)["gb_s"])
    speed = side.decode(context, steps)
    note("decode_tok_s", speed)
    copy = max(before, float(side.process.ask("copy", nbytes=COPY_BYTES)["gb_s"]))
    note("copy_gb_s", copy)
    note("decode_bandwidth_ratio", side.used * speed / 1e9 / copy)
    note("kernels_ms", 1000 * float(side.process.ask("kernels", context=context)["seconds"]))
    side.process.ask("graphs", on=False)
    note("decode_plain_tok_s", side.decode(context, steps))

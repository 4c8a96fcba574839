"""What `card` checks: a bundle's logits against this CPU's, and a shape's speed; every step in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compiler.errors import UserError
from compiler.measure import commands
from compiler.measure.gpu_clocks import Busy
from runtime.bundle import read_manifest

TOKENS = 160  # a whole chunk of a prompt, a padded one, and single tokens
# Largest difference of a logit. Exact: fp32 sums in another order, 1e-5 of logits up to 20 and as much again. Rounded
# activations: what goes over the edge of a rounding moves a logit by up to 0.24, as much as rounding itself does
# (tests/end_to_end); twice that. 0.18 was seen with emulated kernels of sm_90.
BOUNDS = {"exact": 5e-4, "int8": 0.5, "float16": 0.5}
SAME = 0.9  # of the most likely tokens, at least
STEP_S = 1200  # a command that takes longer hangs: a build of 7 billion weights takes minutes
TELL_S = 30  # how often a command that runs is told of
HEAD_BITS = (4, 8, 16)  # of `build --head-bits`
BY_LAUNCH = {"QUERN_CHECK_LAUNCHES": "1"}  # runtime/on_cuda.py

Record = dict[str, Any]
Environment = Mapping[str, str]
Still = Callable[[str, float], None]  # told now and then: what runs, and for how many seconds


class Checks:
    """Bundles and results lie in `folder`, temporary files of what is started as well."""

    def __init__(self, folder: Path, model: Path, still: Still) -> None:
        self.folder, self.model, self._still, self._left_s = folder, model, still, 0.0
        self._on_cpu: dict[tuple[str, ...], Path] = {}

    def numerics(self, target: str, activations: str, left_s: float) -> Record:
        """The logits of one text from the GPU's bundle and from this CPU's, of the same model and activations.

        The last row is what follows the text as a prompt, whose function computes that alone.
        """
        self._left_s = left_s
        folder = self.folder / f"{target}-{activations}"
        folder.mkdir()
        given = [] if activations == "default" else ["--activations", activations]
        self._build(folder / "bundle", "--target", target, *given)
        manifest = read_manifest(folder / "bundle")
        used, head, cache = (str(manifest.quantization[key]) for key in ("activations", "head_bits", "kv_cache"))
        on_cpu = used if used in ("exact", "int8") else "exact"  # half precision is nearest to none
        count = min(TOKENS, manifest.model.context)
        ids = folder / "ids.npy"
        np.save(ids, np.random.default_rng(0).integers(0, manifest.model.vocab_size, count))
        want = self._logits(self._cpu_bundle(on_cpu, head, cache), ids, folder / "cpu.npy")
        got = self._of_gpu(folder / "bundle", ids, folder / "gpu.npy")
        return {"activations": used, "tokens": count, **compared(got, want, BOUNDS[used])}

    def speed(self, shape: str, target: str, left_s: float) -> Record:
        """What `bench --shape` says, and the clocks meanwhile."""
        self._left_s, busy = left_s, Busy()
        done = self._run("compiler", "bench", "--shape", shape, "--target", target, "--json", look=busy.look)
        return {**json.loads(done), **busy.record()}

    def _cpu_bundle(self, activations: str, head: str, cache: str) -> Path:
        """Built once for all targets that are compared with it."""
        key = (activations, head, cache)
        if key not in self._on_cpu:
            place = self.folder / "-".join(("cpu", *key))
            # Bits that `build` cannot be asked for are the checkpoint's own.
            bits = ["--head-bits", head] if int(head) in HEAD_BITS else []
            self._build(place, "--activations", activations, *bits, "--kv-cache", cache)
            self._on_cpu[key] = place
        return self._on_cpu[key]

    def _build(self, out: Path, *more: str) -> None:
        self._run("compiler", "build", "--model", str(self.model), "--quiet", "--out", str(out), *more)

    def _of_gpu(self, bundle: Path, ids: Path, out: Path) -> NDArray[np.float32]:
        """As `_logits`. Where the GPU fails, it is asked once more, kernel by kernel, which one it was."""
        try:
            return self._logits(bundle, ids, out)
        except UserError as error:
            try:
                self._logits(bundle, ids, out, BY_LAUNCH)
            except UserError as named:
                raise UserError(f"{error} Kernel by kernel: {named}") from None
            raise UserError(f"{error} Kernel by kernel nothing fails.") from None

    def _logits(self, bundle: Path, ids: Path, out: Path, more: Environment | None = None) -> NDArray[np.float32]:
        parts = []
        for last in ([], ["--last"]):
            self._run("runtime", "logits", str(bundle), "--ids", str(ids), "--out", str(out), *last, more=more)
            parts.append(np.load(out))
        return np.concatenate(parts)

    def _run(
        self, module: str, *arguments: str, look: Callable[[], None] | None = None, more: Environment | None = None
    ) -> str:
        """stdout of a command. What it leaves behind when it is ended goes with the folder."""
        told = 0.0

        def still(seconds: float) -> None:
            nonlocal told
            if look is not None:
                look()
            if seconds - told >= TELL_S:
                told = seconds
                self._still(f"{module} {arguments[0]}", seconds)

        own = {"TMPDIR": str(self.folder), **(more or {})}
        return commands.run(module, *arguments, limit_s=min(STEP_S, self._left_s), look=still, more=own)


def compared(got: NDArray[np.float32], want: NDArray[np.float32], bound: float) -> Record:
    """Logits f32[tokens, vocab] of the GPU and the CPU: whether they agree, and if not, from which token on."""
    finite = np.isfinite(got)
    off = np.where(finite, np.abs(got - np.where(finite, want, 0)), np.inf)
    rows = np.flatnonzero(off.max(1) > bound)
    agree = float((got.argmax(1) == want.argmax(1)).mean())
    return {
        "worst": float(off[finite].max(initial=0.0)), "largest": float(np.abs(want).max()), "bound": bound,
        "same_tokens": agree, "not_finite": int((~finite).sum()), "wrong_rows": len(rows),
        "first_wrong_row": int(rows[0]) if len(rows) else None, "good": not len(rows) and agree >= SAME,
    }  # fmt: skip

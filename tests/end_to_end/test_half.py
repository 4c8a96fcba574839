"""--activations float16 from checkpoint to logits, on a mock driver with emulated kernels; its default and its
refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from compiler import pipeline
from compiler.__main__ import main
from tests.end_to_end import commands, gpu
from tests.end_to_end.bundles import Bundles, Sessions, all_logits
from tests.end_to_end.places import DEMO, STORIES260K

# Logits up to 14, of 5 layers that each round activations, queries and weights of attention to 2^-11. Seen: 0.019.
HALF_BOUND = 0.05


def test_a_cpu_has_no_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--activations", "float16", "--target", "rpi4", "--out", str(tmp_path / "out"), "--quiet"]
    code = main(["build", "--model", str(DEMO), *out])
    assert commands.message(code, *capsys.readouterr()) == (
        "rpi4: --activations float16 is for targets with a GPU, and this one computes on its CPU. "
        "Leave --activations out, or give int8 or exact."
    )
    assert not (tmp_path / "out").exists()


def test_the_default_is_what_multiplies_fast() -> None:
    chosen = {name: pipeline.default_activations(targets.load(name)) for name in ("native", "rpi4", "jetson-nano")}
    assert chosen == {"native": "int8", "rpi4": "int8", "jetson-nano": "float16"}
    assert pipeline.default_activations(targets.load("jetson-xavier")) == "int8"


def test_options_that_follow_from_it(tmp_path: Path) -> None:
    """As with int8: a dense head gets 8 bits and the cache is float16, because the exact path is not asked for."""
    request = pipeline.Request(tmp_path, targets.load("jetson-nano"), activations="float16")
    assert (request.head, request.cache) == (8, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-sm72", "cuda-sm87"])
def test_logits(target: str, bundles: Bundles, sessions: Sessions, tmp_path: Path) -> None:
    """4-bit weights and an 8-bit head, chunks and single tokens, against the CPU's exact path. sm_53: test_cuda."""
    settings: dict[str, Any] = {"bits": 4, "head_bits": 8, "chunks": (16,)}
    built = gpu.build(STORIES260K, tmp_path / "out", target, activations="float16", **settings)
    ids = np.arange(3, 3 + 35) % 512
    np.save(tmp_path / "ids.npy", ids)
    done = built.run("logits", "--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    want = all_logits(sessions(bundles(STORIES260K, activations="exact", **settings)), ids.tolist())
    worst = np.abs(np.load(tmp_path / "logits.npy") - want).max()
    assert worst < HALF_BOUND

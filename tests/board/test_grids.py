"""Codebooks and bit planes on the board: the logits of the emulated A72 are those of this machine."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quant import samples

pytestmark = [pytest.mark.board, pytest.mark.slow]
REPO = Path(__file__).parents[2]
TOKENS = 5
# Integer sums are the same to the bit; fp32 operations may be fused differently: a few of 2^-24 of logits around 5.
TOLERANCE = 1e-4


@pytest.mark.parametrize("sample", ["bitsandbytes-nf4", "gptqmodel-gptq-3bit-sym-g128",
                                    "gptqmodel-gptq-4bit-sym-g128-descact"])
def test_logits_of_the_board(board: Any, tmp_path: Path, sample: str) -> None:
    model = samples.folder("checkpoints", sample)
    ids = np.load(model / "logits.npz")["input_ids"].reshape(-1)[:TOKENS].astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    device = tmp_path / "device"
    device.mkdir()
    (device / "runtime").symlink_to(REPO / "runtime")
    logits = []
    for target in ("rpi4", "native"):
        bundle, out = tmp_path / target, tmp_path / f"{target}.npy"
        build = [sys.executable, "-m", "compiler", "build", "--model", str(model), "--target", target, "--quiet"]
        subprocess.run([*build, "--out", str(bundle)], cwd=REPO, check=True)
        ask = ["-m", "runtime", "logits", bundle, "--ids", tmp_path / "ids.npy", "--out", out]
        if target == "rpi4":
            board.run(ask, pythonpath=[device], cwd=device)
        else:
            subprocess.run([sys.executable, *map(str, ask)], cwd=REPO, check=True)
        logits.append(np.load(out))
    assert np.abs(logits[0] - logits[1]).max() < TOLERANCE

"""One model of each format group: the emulated A72 gives the logits of this machine, and with them the same text."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets
from compiler import pipeline
from compiler.checkpoint import hub
from compiler.progress import Reporter
from tests.checkpoint.gguf_files import write_llama
from tests.quant import samples

pytestmark = [pytest.mark.board, pytest.mark.slow]
REPO = Path(__file__).parents[2]
PROMPT, TOKENS = [1, *range(3, 20)], 16
# Integer sums are the same to the bit; fp32 operations may be fused differently: a few of 2^-24 of logits around 5.
TOLERANCE = 1e-4
# Now and then that moves an activation over the edge between two int8 values, once in some 10^5: the logits of that
# token and of all after it then differ as they do between chunks (tests/end_to_end/test_chunks.py).
MOVED = 0.14
GROUPS = {
    "dense": "stories260k",
    "gptq": "gptqmodel-gptq-4bit-sym-g128-descact",  # act-order
    "awq": "autoawq-awq-4bit-gemm-g128",
    "bitsandbytes": "bitsandbytes-nf4",
    "compressed-tensors": "llmcompressor-compressed-tensors-w8a8",
    "gguf": "Q4_K, Q6_K",
}
# argv: prompt, tokens, then bundles; a line of JSON and a file of logits for each.
GREEDY = """
import json, sys
from pathlib import Path
import numpy as np
from runtime.bundle import open_bundle
from runtime.session import Session
for path in map(Path, sys.argv[3:]):
    session = Session(open_bundle(path), 1)
    rows = [session.prefill(json.loads(sys.argv[1])).copy()]
    while len(rows) < int(sys.argv[2]):
        rows.append(session.step(int(rows[-1].argmax())).copy())
    np.save(path.with_suffix(".npy"), rows)
    print(json.dumps([int(row.argmax()) for row in rows]))
"""


def checkpoint(name: str, folder: Path) -> Path:
    if name == "dense":
        return REPO / "tests" / "models" / GROUPS[name]
    if name == "gguf":
        return write_llama(folder / "model.gguf", "Q4_K", "Q6_K", "Q6_K", "Q6_K", "Q6_K")
    return samples.folder("checkpoints", GROUPS[name])


def test_the_board_writes_what_this_machine_writes(board: Any, tmp_path: Path) -> None:
    places: dict[str, list[Path]] = {"rpi4": [], "native": []}
    for name in GROUPS:
        for target, made in places.items():
            made.append(tmp_path / f"{name}-{target}")
            request = pipeline.Request(made[-1], targets.load(target), context=64, chunks=(16,))
            pipeline.build(hub.resolve(str(checkpoint(name, tmp_path))), request, Reporter(quiet=True))
    arguments = ["-c", GREEDY, json.dumps(PROMPT), str(TOKENS)]
    there = board.run([*arguments, *places["rpi4"]], pythonpath=[board.runtime_folder()]).stdout.splitlines()
    command = [sys.executable, *arguments, *map(str, places["native"])]
    here = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(here) == len(GROUPS)
    for i, name in enumerate(GROUPS):
        logits = [np.load(made[i].with_suffix(".npy")) for made in places.values()]
        apart = np.abs(logits[0] - logits[1]).max(axis=1)
        best = np.sort(logits[1], axis=1)
        lead = best[:, -1] - best[:, -2]
        assert apart[0] < TOLERANCE and apart.max() < MOVED, f"{name}: {apart}"
        assert (lead > 2 * apart).all(), f"{name}: of two tokens so close either may win: {lead} {apart}"
        assert there[i] == here[i], name

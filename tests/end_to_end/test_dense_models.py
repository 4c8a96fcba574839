"""Dense checkpoints, as they are and quantised by --bits: widths and groups that divide nothing, right all the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.quant.ir import DenseWeight
from compiler.quant.reference import dequantize
from compiler.quantize import rtn
from runtime.tokenizer import Tokenizer
from tests.end_to_end import reference
from tests.end_to_end.bundles import Bundles, Sessions, all_logits, greedy
from tests.end_to_end.conftest import Figure
from tests.end_to_end.perplexity import perplexity, windows
from tests.end_to_end.places import BABYLLAMA, OWN_TEXT, STORIES260K

pytestmark = pytest.mark.slow
STEPS = 64
torch = pytest.importorskip("torch")

PROMPTS = ("Once upon a time", "One day, Tom", "The sun was")
# What int8 activations and an 8-bit head may cost; at most 0.26 % seen, with one scale for a whole row.
INT8_COST = 0.01
CASES = [  # model, --bits, --group-size
    (STORIES260K, None, None),
    (STORIES260K, 4, None),
    (STORIES260K, 8, None),
    (STORIES260K, 4, 43),  # 64 = 43 + 21, 172 = 4 * 43
    (STORIES260K, 8, 7),
    (STORIES260K, 4, 1000),  # more than a row has: one scale a row
]
if BABYLLAMA is not None:
    CASES += [(BABYLLAMA, None, None), (BABYLLAMA, 4, None), (BABYLLAMA, 8, None)]


@pytest.mark.parametrize(("model", "bits", "group_size"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_dense_model(
    model: Path, bits: int | None, group_size: int | None, bundles: Bundles, sessions: Sessions, figure: Figure
) -> None:
    options: dict[str, Any] = {"bits": bits, "group_size": group_size}
    exact, int8 = sessions(bundles(model, activations="exact", **options)), sessions(bundles(model, **options))
    oracle = reference.model(model, bits, group_size)
    tokenizer = Tokenizer(model / "tokenizer.json")
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        tokens, stepped = greedy(exact, ids, STEPS)
        want = reference.logits(oracle, ids + tokens)
        bound = reference.tolerance(oracle, want)
        worst = max(
            np.abs(stepped - want[len(ids) - 1 : -1]).max(), np.abs(all_logits(exact, ids + tokens) - want).max()
        )
        figure(f"{prompt!r} differs by", float(worst))
        figure(f"{prompt!r} may differ by", bound)
        assert worst < bound
        best = np.sort(want[len(ids) - 1 : -1], axis=1)
        assert (best[:, -1] - best[:, -2]).min() > 2 * bound, "a tie within the bound: take another prompt"
        assert want[len(ids) - 1 : -1].argmax(axis=1).tolist() == tokens
    parts = windows(OWN_TEXT.read_text(encoding="utf-8"), model / "tokenizer.json")
    of_exact = perplexity(lambda ids: all_logits(exact, ids), parts)
    of_int8 = perplexity(lambda ids: all_logits(int8, ids), parts)
    figure("perplexity of the exact path", of_exact)
    figure("perplexity with int8 activations", of_int8)
    assert abs(of_int8 / of_exact - 1) < INT8_COST


def test_a_head_of_4_bits(bundles: Bundles, sessions: Sessions) -> None:
    """The exact path against the same model with its head rounded, but not the embedding it is tied to."""
    exact = sessions(bundles(STORIES260K, activations="exact", head_bits=4))
    assert exact.manifest.quantization["head_bits"] == 4
    oracle = copy.deepcopy(reference.model(STORIES260K))
    weight = DenseWeight(oracle.lm_head.weight.detach().numpy().copy(), "float32")
    coded = dequantize(rtn.quantize(weight, 4, rtn.default_group_size(weight.type.k)))
    oracle.lm_head.weight = torch.nn.Parameter(torch.from_numpy(coded))
    ids = Tokenizer(STORIES260K / "tokenizer.json").encode(PROMPTS[0])
    want = reference.logits(oracle, ids)
    assert np.abs(all_logits(exact, ids) - want).max() < reference.tolerance(oracle, want)
    assert np.abs(reference.logits(reference.model(STORIES260K), ids) - want).max() > 0.01  # the rounding shows

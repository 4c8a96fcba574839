"""A tiny random checkpoint as transformers writes it, its bundle, and transformers' own forward to compare with.

`check` is the whole test of an architecture: exact logits, prompt chunks against single tokens, greedy text, int8.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import targets
from compiler import pipeline
from compiler.progress import Reporter
from runtime.bundle import open_bundle
from runtime.session import Session

# Odd widths: no multiple of 16 but the head's; three query heads for each key head.
SMALL: dict[str, Any] = {
    "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPT, GREEDY = 44, 32
# Of the largest logit. Each of about 15 steps in a row rounds sums of up to 104 products: up to 104 * 2^-24 = 6e-6 a
# step if all errors had one sign, about 1e-6 as they come. Both sides err.
TOLERANCE = 2e-5
# Prompt chunks and single tokens add up in the same order, but for the scores' blocks.
CHUNK_TOLERANCE = 4e-6
# Standard deviation of the error over that of the logits. The largest of 100 normal numbers is about 2.7 deviations, so
# a step is 2.7 / 127 and rounding to steps errs by 2.7 / 127 / sqrt(12) = 0.006, in weights and in activations: over
# five layers on the way, 0.006 * sqrt(2 * 5) = 0.02, and norms and attention carry that on: three times that is a bug.
INT8_TOLERANCE = 0.06


def save(folder: Path, config: Any, seed: int = 0) -> Any:
    """A random float32 model, saved into `folder` with a tokenizer. Norms and biases are random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 0.3 if value.ndim == 1 or "embed" in name else 1.5 / value.shape[1] ** 0.5
            around_one = "norm" in name and not config.model_type.startswith("gemma")  # Gemma's lie around 0
            value.copy_(torch.randn_like(value) * spread + around_one)
    model.save_pretrained(folder)
    Tokenizer(WordLevel({"<unk>": 0, "a": 1}, "<unk>")).save(str(folder / "tokenizer.json"))
    return model


def build(folder: Path, activations: str, chunks: tuple[int, ...] = (7,)) -> Session:
    """The bundle of the checkpoint in `folder`, ready to run."""
    request = pipeline.Request(
        folder / f"bundle-{activations}",
        targets.load("native"),
        activations,
        bits=8 if activations == "int8" else None,
        chunks=chunks,
    )
    pipeline.build(folder, request, Reporter(quiet=True))
    return Session(open_bundle(request.out), threads=1)


def logits(session: Session, ids: np.ndarray) -> np.ndarray:
    """f32[n, vocab] from an empty context, through prompt chunks."""
    session.reset()
    return np.concatenate([np.array(rows) for rows in session.logits(ids)])


def by_steps(session: Session, ids: np.ndarray) -> np.ndarray:
    """The same, one token a call."""
    session.reset()
    return np.stack([np.array(session.step(int(token))) for token in ids])


def greedy(session: Session, ids: np.ndarray, count: int) -> list[int]:
    """`count` tokens after a prompt, each the most likely one."""
    session.reset()
    row, made = session.prefill(ids), []
    for _ in range(count):
        made.append(int(row.argmax()))
        row = session.step(made[-1])
    return made


def reference_greedy(model: Any, ids: np.ndarray, count: int) -> list[int]:
    """The same by transformers, without its cache."""
    made = ids.tolist()
    for _ in range(count):
        with torch.no_grad():
            made.append(int(model(torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
    return made[len(ids) :]


def check(folder: Path, config: Any, int8: bool = True) -> dict[str, float]:
    """All comparisons of one architecture; gives the errors found."""
    model = save(folder, config)
    ids = np.random.default_rng(1).integers(3, config.vocab_size, PROMPT)
    with torch.no_grad():
        want = model(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()
    largest = float(np.abs(want).max())
    session = build(folder, "exact")
    got = logits(session, ids)
    found = {"exact": float(np.abs(got - want).max()), "largest": largest}
    assert found["exact"] <= TOLERANCE * largest, found
    found["chunks"] = float(np.abs(got - by_steps(session, ids)).max())
    assert found["chunks"] <= CHUNK_TOLERANCE * largest, found
    assert greedy(session, ids[:20], GREEDY) == reference_greedy(model, ids[:20], GREEDY)
    if int8:
        error = logits(build(folder, "int8"), ids) - want
        found["int8"] = float(error.std() / want.std())
        assert found["int8"] <= INT8_TOLERANCE, found
    return found


def edited(folder: Path, **changes: Any) -> Path:
    """The checkpoint with other values in config.json; None removes a key."""
    file = folder / "config.json"
    values = copy.copy(json.loads(file.read_text(encoding="utf-8")))
    values.update(changes)
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8")
    return folder

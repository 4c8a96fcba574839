"""Real quantised checkpoints, made by the libraries themselves. They are large, so they live beside the repository."""
from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
STORYTELLER_GPTQ = REPO / "tests" / "models" / "storyteller-5m-gptq-4bit-g128"


def folder(*parts: str) -> Path:
    """shared/data/PARTS, in the checkout or beside it; skips the test where there is none."""
    for root in (REPO / "shared", REPO.parent / "shared"):
        if (found := root.joinpath("data", *parts)).is_dir():
            return found
    pytest.skip(f"no shared/data/{'/'.join(parts)} in or beside the repository: a sample of a real checkpoint")

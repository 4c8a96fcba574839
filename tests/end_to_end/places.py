"""Where models and texts are. What is too large for the repository lies beside it on some machines."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).parents[2]
MODELS = REPO / "tests" / "models"
DEMO = MODELS / "storyteller-5m-gptq-4bit-g128"
STORIES260K = MODELS / "stories260k"
OWN_TEXT = Path(__file__).with_name("stories.txt")


def beside(*parts: str) -> Path | None:
    """shared/data/PARTS, in the checkout or beside it, or None."""
    found = (root.joinpath("data", *parts) for root in (REPO / "shared", REPO.parent / "shared"))
    return next((path for path in found if path.exists()), None)


BABYLLAMA = beside("models", "babyllama-105")
STORYTELLER = beside("models", "storyteller-5m")  # what DEMO was quantised from
EVALUATION = beside("text", "tinystories-eval.txt")

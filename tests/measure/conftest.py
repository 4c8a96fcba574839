"""One small bundle for all tests of measuring."""

from __future__ import annotations

from pathlib import Path

import pytest

import targets
from compiler import pipeline
from compiler.progress import Reporter

REPO = Path(__file__).parents[2]
CONTEXT = 32


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k in 4 bits, for this machine, with prompts in calls of 16 tokens."""
    bundle = tmp_path_factory.mktemp("measure") / "bundle"
    request = pipeline.Request(bundle, targets.load("native"), bits=4, context=CONTEXT, chunks=(16,))
    pipeline.build(REPO / "tests" / "models" / "stories260k", request, Reporter(quiet=True))
    return bundle

"""Phi-3 against transformers: fused projections, sliding window."""

from __future__ import annotations

from pathlib import Path

from transformers import Phi3Config

from tests.models import oracle


def test_agrees_with_transformers(tmp_path: Path) -> None:
    oracle.check(tmp_path, Phi3Config(**oracle.SMALL, sliding_window=9))

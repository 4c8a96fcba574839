"""Gemma 2 against transformers, with caps so low and a window so short that each would show."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Gemma2Config

from tests.models import gguf_oracle, oracle


@pytest.mark.parametrize("caps", [True, False])
def test_agrees_with_transformers(tmp_path: Path, caps: bool) -> None:
    config = Gemma2Config(
        **oracle.SMALL,
        head_dim=20,
        query_pre_attn_scalar=13,
        sliding_window=9,
        attn_logit_softcapping=1.5 if caps else None,
        final_logit_softcapping=2.5 if caps else None,
    )
    oracle.check(tmp_path, config, int8=caps)


def test_the_same_from_gguf(tmp_path: Path) -> None:
    config = Gemma2Config(**oracle.SMALL, head_dim=20, query_pre_attn_scalar=20, sliding_window=9)
    own = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 9}
    gguf_oracle.check(tmp_path, config, "gemma2", plus_one=True, metadata=own)

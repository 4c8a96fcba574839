"""What a bundle of a shape is built as; nothing is compiled here."""

from __future__ import annotations

import pytest

from compiler import pipeline
from compiler.measure.compare import Workload
from compiler.measure.growth import Setup
from compiler.measure.shape_bundle import built
from compiler.progress import Reporter
from targets import load


@pytest.mark.parametrize(("asked", "kept"), [(None, "float16"), ("int8", "int8"), ("float32", "float32")])
def test_the_cache_that_was_asked_for(asked: str | None, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compiled(inputs: pipeline.Inputs, request: pipeline.Request, _: Reporter) -> None:
        seen.append((inputs.model.caches[0].dtype, inputs.model.context, request.head_bits))

    monkeypatch.setattr(pipeline, "compile_inputs", compiled)
    setup = Setup("a72-count", 4, 128, 8, Workload(512, 128, 16, 5), asked)
    with built(setup, load("x86-64"), quiet=True) as path:
        assert path.name == "bundle"
    assert not path.parent.exists()
    assert seen == [(kept, 2048, 8)]

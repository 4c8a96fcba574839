"""A bundle of a published shape with random weights, to measure and throw away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compiler import models, pipeline
from compiler.measure import shapes
from compiler.measure.growth import Setup
from compiler.progress import Reporter
from targets import Target

LEAST_POSITIONS = 2048  # as much context as the shapes' models have, if they have it


@contextmanager
def built(setup: Setup, target: Target, quiet: bool) -> Iterator[Path]:
    """A bundle of the setup's shape, gone at the end."""
    config = shapes.config(setup.shape, setup.positions)
    source = shapes.RandomSource(setup.shape, setup.bits, setup.group_size, setup.head_bits)
    with tempfile.TemporaryDirectory(prefix="quern-bench-") as folder:
        request = pipeline.Request(
            Path(folder) / "bundle",
            target,
            activations=pipeline.default_activations(target),
            head_bits=setup.head_bits,
            context=min(config.integer("max_position_embeddings", 1, 1 << 30), max(setup.positions, LEAST_POSITIONS)),
            kv_cache=setup.kv_cache,
        )
        model = models.build(config, source.describe, pipeline.model_options(request))
        inputs = pipeline.Inputs(setup.shape, "random", model, source, None)
        pipeline.compile_inputs(inputs, request, Reporter(quiet=quiet))
        yield request.out

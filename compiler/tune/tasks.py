"""What there is to tune: the calls of a model, or of published shapes, whose kernels have knobs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compiler import models, pipeline
from compiler.checkpoint import hub
from compiler.errors import UserError
from compiler.measure import shapes
from compiler.passes.lower_to_schedules import requests
from compiler.tune.search import Task
from schedules.kernel import space
from targets import Target


def of(options: argparse.Namespace, target: Target) -> list[Task]:
    """Every call with something to choose, each workload once, in the order of the model. Raises UserError."""
    chunks = tuple(m for m in options.tokens if m > 1) or (128,)
    request = pipeline.Request(
        Path(), target, bits=options.bits, group_size=options.group_size, head_bits=options.head_bits,
        context=options.context, chunks=chunks, activations=options.activations or pipeline.default_activations(target),
    )  # fmt: skip
    pipeline.refuse_half_without_gpu(request)
    made = []
    if options.model is not None:
        made.append(pipeline.import_checkpoint(hub.resolve(options.model), request).model)
    for name in options.shapes or ():
        bits = options.bits or 4
        source = shapes.RandomSource(name, bits, options.group_size or 128, options.head_bits or bits)
        made.append(models.build(shapes.config(name), source.describe, pipeline.model_options(request)))
    wanted = {"decode" if m == 1 else f"prefill_{m}" for m in options.tokens}
    found: dict[Any, Task] = {}
    for model in made:
        asked = requests(pipeline.fuse(model.graph.module(), request), target)
        for function in sorted(wanted & asked.keys()):
            for call in asked[function]:
                room = space(call)
                if room is not None and _wanted(options.operators, call.op, room.schedule):
                    found.setdefault((room.schedule, tuple(room.workload.items())), Task(call, room))
    if not found:
        raise UserError("Nothing to tune: no kernel of this model, with these --tokens and --operators, has knobs.")
    return list(found.values())


def _wanted(names: list[str] | None, operator: str, schedule: str) -> bool:
    """Whether --operators names an operator, with or without its variants, or the schedule that lowers it."""
    own = operator.removeprefix("quern.")
    named = (own == name or own.startswith(f"{name}_") or schedule.split(".")[0] == name for name in names or ())
    return names is None or any(named)

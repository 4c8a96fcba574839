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
    tunable: dict[str, str] = {}  # operators with knobs: the schedule that lowers each
    for model in made:
        asked = requests(pipeline.fuse(model.graph.module(), request), target)
        for function in sorted(wanted & asked.keys()):
            for call in asked[function]:
                if (room := space(call)) is None:
                    continue
                own = call.op.removeprefix("quern.")
                tunable[own] = room.schedule
                if options.operators is None or any(_names(name, own, room.schedule) for name in options.operators):
                    found.setdefault((room.schedule, tuple(room.workload.items())), Task(call, room))
    if not tunable:
        raise UserError("Nothing to tune: no kernel of this model, with these --tokens, has knobs.")
    for name in options.operators or ():
        if not any(_names(name, *pair) for pair in tunable.items()):
            there = ", ".join(sorted(tunable))
            raise UserError(f"--operators {name}: no kernel of that name is there to tune. There are {there}.")
    return list(found.values())


def _names(name: str, operator: str, schedule: str) -> bool:
    """Whether --operators means an operator by `name`, with or without its variants, or the schedule that lowers it."""
    return operator == name or operator.startswith(f"{name}_") or schedule.split(".")[0] == name

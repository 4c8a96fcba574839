"""CUDA bundles run without a GPU: the driver is a mock, the kernels are emulated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from compiler import pipeline
from compiler.codegen import nvrtc
from compiler.codegen.cuda import device_code
from compiler.passes.lower_to_schedules import requests
from compiler.progress import Reporter
from compiler.tune.records import Database
from schedules.kernel import space
from tests.emulator import cuda as emulator
from tests.end_to_end import commands
from tests.mock import cuda as mock
from tests.tune.test_records import choice


@dataclass(frozen=True)
class Built:
    """A bundle, the kernels' source, and the architecture that they were made for."""

    bundle: Path
    source: str
    sm: int

    def run(self, verb: str, *arguments: object, emulated: bool = True, **settings: Any) -> commands.Done:
        """`python -m runtime VERB BUNDLE ARGUMENTS` with a mock GPU; settings are those of tests/mock/libcuda.c."""
        return commands.run("runtime", verb, self.bundle, *arguments, env=self.environment(emulated, **settings))

    def environment(self, emulated: bool = True, **settings: Any) -> dict[str, str]:
        """Variables that bring the mock."""
        kernels = emulator.library(self.source, self.sm) if emulated else None
        return mock.environment(kernels, **{"arch": self.sm, **settings})

    def generate(self, prompt: str, count: int, counts: Path, *arguments: object, **settings: Any) -> Any:
        """What `generate --json` says, and what the mock counted."""
        options = ("--prompt", prompt, "--max-new-tokens", count, "--ignore-eos", "--json", *arguments)
        done = self.run("generate", *options, counts=counts, **settings)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout), json.loads(counts.read_text())


def tune(model: Path, folder: Path, target: str, **settings: Any) -> dict[str, dict[str, int]]:
    """A database for a build of `model`: its attention and every token's first layer have knobs of their own.

    Gives these by record. A much smaller card, tuned later, has chosen otherwise.
    """
    request = pipeline.Request(Path(), targets.load(target), **settings)
    gpu = request.target.gpu
    assert gpu is not None
    fused = pipeline.fuse(pipeline.import_checkpoint(model, request).model.graph.module(), request)
    calls = [call for calls in requests(fused, request.target).values() for call in calls]
    spaces = [room for call in calls if (room := space(call)) is not None]
    chosen = [room for room in spaces if "attention" in room.schedule]
    chosen.append(next(room for room in spaces if "linear" in room.schedule and room.workload["m"] == 1))
    database, found = Database.writing(folder, request.target.tuning_key), dict[str, dict[str, int]]()
    for room in chosen:
        first, *_, last = room.points()
        about: dict[str, Any] = {"schedule": room.schedule, "workload": dict(room.workload), "threads": 1}
        about["default"] = dict(room.default)
        card = {"name": "Card", "multiprocessors": gpu.multiprocessors}
        database.append(choice(**about, knobs=last, measured="rpc", gpu=card))
        found[database.names[-1]] = last
        database.append(choice(**about, knobs=first, measured="rpc", gpu=card | {"multiprocessors": 1}))
    database.close()
    return found


def build(model: Path, out: Path, target: str, **settings: Any) -> Built:
    """Compile a checkpoint and keep the kernels' source; none of them may spill."""
    request = pipeline.Request(out / "bundle", targets.load(target), dump_ir=out / "ir", **settings)
    out.mkdir()
    pipeline.build(model, request, Reporter(quiet=True))
    gpu = request.target.gpu
    assert gpu is not None
    source = (out / "ir" / "4_code.cu").read_text()
    assert device_code.spills(nvrtc.compile(source, gpu)) == ""  # compiled before: that is kept
    return Built(request.out, source, gpu.sm)

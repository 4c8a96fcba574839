"""The launches of a model as C: constant tables in the types of model.h, with the device code beside them.

The device code is the only thing that is embedded as bytes: PTX with the NUL that the driver wants, and machine code.
"""

from __future__ import annotations

from compiler.codegen.nvrtc import DeviceCode
from compiler.passes.lower_to_launches import HEADER, FunctionPlan, Launches, Place
from targets import Gpu

# The CUDA version whose driver is the first to read a PTX version: PTX ISA manual, release history.
DRIVERS = {"6.5": 10020, "7.0": 11000, "7.4": 11040, "7.8": 11080, "8.0": 12000}
BYTES_A_LINE = 24


def driver_version(gpu: Gpu) -> int:
    """The oldest driver that takes this GPU's device code, as cuDriverGetVersion says it: 11040 for 11.4."""
    return DRIVERS[gpu.ptx]


def source(launches: Launches, code: DeviceCode, gpu: Gpu) -> str:
    """A C file that defines what model.h declares `extern`."""
    kernels = sorted({step.launch.function for plan in launches.functions for step in plan.steps})
    numbers = {name: i for i, name in enumerate(kernels)}
    steps: list[str] = []
    places: list[str] = []
    functions = []
    for plan in launches.functions:
        functions.append(_function(plan, len(steps)))
        for step in plan.steps:
            launch = step.launch
            grid, block = (", ".join(map(str, three)) for three in (launch.grid, launch.block))
            steps.append(
                f"{{{numbers[launch.function]}, {{{grid}}}, {{{block}}}, {launch.shared_bytes}, {len(places)}, "
                f"{len(step.arguments)}}}"
            )
            places += [_place(place) for place in step.arguments]
    names = [f'"{name}"' for name in kernels]
    parameters = [f'"{name}"' for name in launches.parameters]
    counts = ", ".join(str(len(table)) for table in (names, steps, places, functions, parameters))
    cubin = code.cubin or b""
    return "\n".join(
        [
            '#include "model.h"',
            _bytes("ptx", code.ptx + b"\0"),
            _bytes("cubin", cubin or b"\0"),
            _table("const char *const quern_kernel_names", names),
            _table("const quern_step quern_steps", steps),
            _table("const uint64_t quern_places", places),
            _table("const quern_function quern_functions", functions),
            _table("const char *const quern_parameters", parameters),
            f"const quern_model quern_this = {{{gpu.sm}, {driver_version(gpu)}, {launches.arena_bytes}u, {HEADER}, "
            f"ptx, cubin, {len(code.ptx) + 1}, {len(cubin)}, {counts}}};",
            "",
        ]
    )


def _function(plan: FunctionPlan, first_step: int) -> str:
    takes_ids = int(plan.takes == "ids")
    places = (plan.input_at, plan.input_bytes, plan.result_at, plan.result_bytes)
    numbers = (first_step, len(plan.steps), takes_ids, *places)
    return f'{{"{plan.name}", {", ".join(map(str, numbers))}}}'


def _place(place: Place) -> str:
    return f"QUERN_PARAMETER | {place.at}" if place.parameter else f"{place.at}u"


def _table(declared: str, rows: list[str]) -> str:
    return f"{declared}[] = {{\n  " + ",\n  ".join(rows) + "\n};"


def _bytes(name: str, content: bytes) -> str:
    """Aligned as the driver may want machine code (it is an ELF file)."""
    lines = (content[i : i + BYTES_A_LINE] for i in range(0, len(content), BYTES_A_LINE))
    text = ",\n".join(",".join(map(str, line)) for line in lines)
    return f"static const _Alignas(64) unsigned char {name}[] = {{\n{text}\n}};"

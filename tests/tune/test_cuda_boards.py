"""CUDA kernels timed on a board: the real server, tracker and libraries, a mock driver and emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import targets
from compiler.codegen.cuda import device_code
from compiler.tune import candidates, cuda_candidates, tracker
from compiler.tune.boards import BoardError, BoardMeasurer
from compiler.tune.measure import EMULATED, RPC, DeviceLost, Setting
from runtime.rpc_tracker import Address
from schedules import kernel
from schedules.cuda.kernel import CudaKernel
from schedules.kernel import Request, Space, TensorSpec
from targets import Target
from tests.emulator import cuda as emulator
from tests.mock import cuda as mock
from tests.tune import fake_board

SM90 = targets.load("cuda-sm90")
KEY = "gpu-mill"
N, K, GROUP = 32, 4096, 128
LEAST_BYTES = 1 << 20
DRIFT = 1e6  # an emulated kernel's times are no times


def linear(target: Target = SM90) -> Request:
    """One token, 4 bits, fp16 sums."""
    specs = [((1, K), "float32"), ((N, K), "uint8"), ((N, K // GROUP), "float16"), ((N, K // GROUP), "uint8")]
    args = tuple(TensorSpec(shape, dtype) for shape, dtype in specs)
    return Request("quern.linear_half", args, (TensorSpec((1, N), "float32"),), {"bits": 4, "group": GROUP}, target)


def room() -> Space:
    found = kernel.space(REQUEST)
    assert found is not None
    return found


REQUEST = linear()
SPACE = room()
GOOD, WRONG = {**SPACE.default, "rows": 16}, {**SPACE.default, "threads": 64}


def lowered(knobs: dict[str, int]) -> CudaKernel:
    made = candidates.lower(REQUEST, knobs)
    assert isinstance(made, CudaKernel)
    return made


@pytest.fixture(scope="module")
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The mock runs what these kernels' sources say, but for one, which leaves its results unwritten there."""
    wrong = lowered(WRONG)
    wrong = replace(wrong, source=wrong.source.replace("  run(x, ", "  if (threadIdx.x > 4096) run(x, "))
    assert wrong != lowered(WRONG)
    kernels = [lowered(dict(SPACE.default)), lowered(GOOD), wrong, cuda_candidates.canary()]
    library = emulator.library(device_code.unit(kernels), 90)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mock.environment(library, arch=90).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def address(_gpu: None) -> Iterator[Address]:
    with tracker.running() as found:
        yield found


@pytest.fixture(scope="module")
def measurer(address: Address, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoardMeasurer]:
    setting = replace(Setting.here(1), cpu="unknown", measured=RPC)
    made = BoardMeasurer(
        setting, reply_s=30, most_drift=DRIFT, tracker=str(address), key=KEY, target=SM90,
        folder=tmp_path_factory.mktemp("libraries"), least_bytes=LEAST_BYTES,
    )  # fmt: skip
    yield made
    made.close()


def test_candidates_beside_the_default(measurer: BoardMeasurer, address: Address, tmp_path: Path) -> None:
    with fake_board.offered(address, KEY, "Board", tmp_path):
        batch = measurer.measure(REQUEST, SPACE, [GOOD, WRONG], rounds=3)
        again = measurer.measure(REQUEST, SPACE, [GOOD], rounds=2)
    good, wrong = batch.timings
    assert good.failure is None and len(good.speedups) == 3 and all(0 < s < 10 for s in good.seconds)
    assert wrong.failure is not None and "wrong results" in wrong.failure and wrong.seconds == []
    assert len(batch.reads) == 3 and len(batch.spins) == 4
    one = N * K // 2 + 2 * N * K // GROUP + N * K // GROUP
    assert batch.bytes_per_call == one and batch.rotated_bytes >= LEAST_BYTES
    assert again.timings[0].failure is None and len(again.timings[0].speedups) == 2
    assert (measurer.setting.measured, measurer.setting.cpu) == (EMULATED, "Mock GPU, 2 multiprocessors")

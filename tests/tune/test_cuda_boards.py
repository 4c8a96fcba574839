"""CUDA kernels timed on a board: the real server, tracker and libraries, a mock driver and emulated kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler.codegen.cuda import device_code
from compiler.tune import candidates, cuda_candidates, tracker
from compiler.tune.boards import BoardError, BoardMeasurer
from compiler.tune.measure import EMULATED, RPC, Device, Setting
from compiler.tune.records import Database, DatabaseError, Tuned
from runtime.rpc_tracker import Address
from schedules import kernel
from schedules.cuda.kernel import CudaKernel
from schedules.cuda.kernel import lowerings as cuda_lowerings
from schedules.kernel import Request, Space, TensorSpec
from targets import Target
from tests.emulator import cuda as emulator
from tests.mock import cuda as mock
from tests.tune import fake_board
from tests.tune.test_records import choice, database, trial

SM90 = targets.load("cuda-sm90")
KEY = "gpu-mill"
N, K, GROUP = 64, 4096, 128
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
ABOUT_SPACE: dict[str, Any] = {"schedule": SPACE.schedule, "workload": dict(SPACE.workload),
                               "default": dict(SPACE.default), "threads": 1, "measured": RPC}  # fmt: skip
DEADLY = {"rows": 16, "threads": 64}


def lowered(knobs: dict[str, int]) -> CudaKernel:
    made = candidates.lower(REQUEST, knobs)
    assert isinstance(made, CudaKernel)
    return made


def altered(knobs: dict[str, int], text: str, other: str) -> CudaKernel:
    found = lowered(knobs)
    assert found.source.count(text) == 1
    return replace(found, source=found.source.replace(text, other))


@pytest.fixture(scope="module")
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The mock runs what these kernels' sources say, but for two: one writes nothing, one reads beyond its inputs."""
    wrong = altered(WRONG, "  run(x, ", "  if (threadIdx.x > 4096) run(x, ")
    deadly = altered(DEADLY, "  run(x, ", "  run(x + (1 << 24), ")
    kernels = [lowered(dict(SPACE.default)), lowered(GOOD), wrong, deadly, cuda_candidates.canary()]
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


@pytest.mark.slow
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
    assert (measurer.setting.measured, measurer.setting.gpu) == (EMULATED, Device("Mock GPU", 2))


@pytest.mark.slow
def test_a_kernel_that_takes_the_gpu_down(measurer: BoardMeasurer, address: Address, tmp_path: Path) -> None:
    """Its session ends, twice; the default does well in between, and so do those that come after it."""
    with fake_board.offered(address, KEY, "Board", tmp_path):
        dead, good = measurer.measure(REQUEST, SPACE, [DEADLY, GOOD], rounds=2).timings
    assert dead.failure is not None and dead.failure.endswith(": a kernel failed on its GPU")
    assert good.failure is None and len(good.speedups) == 2


GPU = {"name": "Orin", "arch": 90, "driver": 11080, "multiprocessors": 8, "emulated": False}
ABOUT = {"address": "stone:1", "name": "stone", "session": 1, "arch": SM90.arch, "features": [], "glibc": "2.40",
         "cpu": "stone", "tvm_ffi": [0, 1, 15], "emulator": None, "gpu": GPU}  # fmt: skip


def admitted(gpu: dict[str, Any]) -> Setting:
    made = BoardMeasurer(Setting.here(1), key=KEY, target=SM90)
    made._admit(ABOUT | {"gpu": gpu})
    return made.setting


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ({"error": "the NVIDIA driver is not there"},
         "The board at stone:1 (stone) is offered as 'gpu-mill', but it has no GPU: the NVIDIA driver is not there."),
        (GPU | {"arch": 87},
         "The board at stone:1 (stone) is offered as 'gpu-mill', but its GPU is sm_87 (Orin, 8 multiprocessors) and "
         "kernels are tuned for sm_90. Give boards of another kind another --key."),
        (GPU | {"driver": 11040},
         "The board at stone:1 (stone) has an NVIDIA driver of CUDA 11.4, but kernels need 11.8. Update it."),
        (GPU | {"multiprocessors": 0},
         "The board at stone:1 (stone) says nonsense of its GPU: 'Orin', 0 multiprocessors."),
    ],
    ids=["none", "another", "old", "nonsense"],
)  # fmt: skip
def test_another_gpu_is_refused(gpu: dict[str, Any], said: str) -> None:
    with pytest.raises(BoardError) as caught:
        admitted(gpu)
    assert str(caught.value) == said


def test_a_gpu_gives_records_its_name() -> None:
    found = admitted(GPU)
    assert (found.measured, found.cpu, found.gpu) == (RPC, "stone", Device("Orin", 8))
    assert admitted(GPU | {"emulated": True}).measured == EMULATED


def test_a_build_takes_a_gpus_records(tmp_path: Path) -> None:
    """By the knobs of a CUDA schedule; threads are none of a GPU's business. The nearest in size decides."""
    other = WRONG

    def record(multiprocessors: int, knobs: dict[str, int]) -> dict[str, Any]:
        return choice(**ABOUT_SPACE, knobs=knobs, gpu={"name": "H", "multiprocessors": multiprocessors})

    assert SM90.gpu is not None and SM90.gpu.multiprocessors == 132
    for records, want in (
        ([record(2, GOOD)], GOOD),
        ([record(132, GOOD), record(2, other)], GOOD),
        ([record(132, other), record(114, other), record(132, GOOD)], GOOD),
        ([record(60, other), record(264, GOOD)], GOOD),
    ):
        database(tmp_path, *records, key=SM90.tuning_key)
        tuned = Tuned.of(tmp_path, SM90)
        found = tuned(REQUEST)
        assert found is not None and found.knobs == want and tuned.threads == 1
        tuned.database.path.unlink()
    name = lowered(GOOD).name
    assert name != lowered(dict(SPACE.default)).name
    assert cuda_lowerings()[REQUEST.op](replace(REQUEST, knobs=GOOD)).name == name


def test_a_build_says_whose_records_it_took(tmp_path: Path) -> None:
    """Of an Orin Nano and of an AGX Orin in one file: the target's size decides, and --multiprocessors is that."""
    sizes = {8: GOOD, 16: WRONG}
    orins = [asdict(Device("Orin", size)) for size in sizes]
    lines = [choice(**ABOUT_SPACE, knobs=sizes[orin["multiprocessors"]], gpu=orin) for orin in orins]
    database(tmp_path, *lines, key=SM90.tuning_key)
    for size, nearest, other in ((8, 8, 16), (16, 16, 8), (14, 16, 8)):
        tuned = Tuned.of(tmp_path, SM90.sized(size))
        assert tuned.devices() == ""
        found = tuned(REQUEST)  # the space's default does not depend on the size
        assert found is not None and found.knobs == sizes[nearest]
        assert tuned.devices() == (
            f"records are of Orin with {nearest} multiprocessors, nearest to {size}; there are others of Orin with "
            f"{other} multiprocessors. --multiprocessors says how many your GPU has."
        )
    (tmp_path / SM90.tuning_key / "tune.jsonl").unlink()
    database(tmp_path, lines[0], key=SM90.tuning_key)
    alone, far = Tuned.of(tmp_path, SM90.sized(8)), Tuned.of(tmp_path, SM90)
    assert alone(REQUEST) == far(REQUEST) is not None and alone.devices() == ""
    assert far.devices() == (
        "records are of Orin with 8 multiprocessors, nearest to 132. --multiprocessors says how many your GPU has."
    )


def test_each_device_has_trials_of_its_own(tmp_path: Path) -> None:
    """Two Orins in one file: what one of them measured is no trial of the other, and boards of both are not mixed."""
    nano, agx = Device("Orin", 8), Device("Orin", 16)
    lines = (trial(**ABOUT_SPACE, knobs=GOOD, gpu=asdict(nano)), choice(**ABOUT_SPACE, knobs=GOOD, gpu=asdict(agx)))
    database(tmp_path, *lines, key=SM90.tuning_key)
    for device, trials, decided in ((nano, 1, False), (agx, 0, True)):
        writer = Database.writing(tmp_path, SM90.tuning_key)
        writer.admit(RPC, device)
        assert (len(writer.trials(SPACE, 1)), writer.choice(SPACE, 1) is not None) == (trials, decided)
        writer.close()
    with pytest.raises(DatabaseError) as caught:
        writer.admit(RPC, nano)
    assert str(caught.value) == (
        f"{writer.path}: this run tunes for Orin with 16 multiprocessors, and another board is Orin with 8 "
        f"multiprocessors. Give boards of another kind another --key."
    )


@pytest.mark.parametrize(
    ("gpu", "why"),
    [
        (None, "key 'gpu' is missing"),
        ({"name": "Orin"}, "gpu must have name and multiprocessors"),
        ({"name": "Orin", "multiprocessors": 0}, "gpu.multiprocessors is 0"),
    ],
    ids=str,
)
def test_a_record_says_which_gpu_made_it(gpu: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "mill").mkdir()
    line = {"target": "mill", **trial(**ABOUT_SPACE), **({} if gpu is None else {"gpu": gpu})}
    (tmp_path / "mill" / "tune.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DatabaseError) as caught:
        Database.read(tmp_path, "mill")
    assert f":1: not a tuning record of mill: {why}. " in str(caught.value)

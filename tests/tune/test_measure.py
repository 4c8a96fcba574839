"""The worker on this machine: honest figures, wrong candidates, and a worker that dies."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from compiler.tune import measure
from compiler.tune.local import LocalMeasurer
from compiler.tune.measure import NoisyError, Setting
from runtime import timing
from schedules import kernel
from schedules.kernel import Space
from tests.tune.test_records import linear

REQUEST = linear(64)
LEAST_BYTES = 1 << 20


def room() -> Space:
    found = kernel.space(REQUEST)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def device() -> Iterator[LocalMeasurer]:
    made = LocalMeasurer(Setting.here(1), most_drift=100, least_bytes=LEAST_BYTES)
    yield made
    made.close()


def test_candidates_beside_the_default(device: LocalMeasurer) -> None:
    space = room()
    good, wrong = {**space.default, "row_blocks": 1}, {**space.default, "row_blocks": 3, "unroll": 5}
    batch = device.measure(REQUEST, space, [good, wrong, space.default], rounds=3)
    first, second, third = batch.timings
    assert second.failure is not None and second.seconds == []
    for each in (first, third, batch.default):
        assert each.failure is None
        assert len(each.speedups) == 3 and len(each.seconds) >= 3 * 2
        assert all(0 < seconds < 1 for seconds in each.seconds)
    assert len(batch.reads) == 3 and min(batch.reads) > 0
    # 4 blocks of 16 rows, 32 inputs: 1 KiB of codes, 128 bytes of scales, 64 of zeros
    assert batch.bytes_per_call == 1024 + 128 + 64
    assert batch.rotated_bytes >= LEAST_BYTES and batch.page_kib in (4, 2048)


def test_a_worker_that_dies_costs_one_candidate(device: LocalMeasurer) -> None:
    space = room()
    device.measure(REQUEST, space, [], rounds=1)
    assert device._process is not None
    device._process.kill()
    device._process.wait()
    lost, good = device.measure(REQUEST, space, [space.default, {**space.default, "row_blocks": 1}], rounds=1).timings
    assert lost.failure == "the process ended with -9"
    assert good.failure is None and good.seconds


def test_a_worker_that_hangs_is_killed(device: LocalMeasurer) -> None:
    space = room()
    device.measure(REQUEST, space, [], rounds=1)
    process, device.reply_s = device._process, 0.0
    try:
        with pytest.raises(measure.CandidateLost) as caught:
            device._ask("prepare", space.default)
    finally:
        device.reply_s = measure.REPLY_S
    assert str(caught.value) == "no answer within 0 s"
    assert process is not None and process.poll() == -9
    assert device._process is None


def test_a_busy_machine_gives_no_figures(device: LocalMeasurer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "drift", lambda values: 0.5)
    monkeypatch.setattr(measure, "PAUSE_S", 0)
    monkeypatch.setattr(device, "most_drift", 0.25)
    with pytest.raises(NoisyError) as caught:
        device.measure(REQUEST, room(), [], rounds=1)
    said = (
        r"other processes take \d+% of the processors, and the speed of one kernel drifts by \d+% \(25% is the limit\)"
    )
    assert re.fullmatch(said, str(caught.value))


def test_what_others_took_by_hand() -> None:  # 2 processors for 3 s, 5 s busy, 4 s of them ours
    assert timing.foreign_share((10.0, 1.0, 1.0), (16.0, 6.0, 5.0)) == pytest.approx(1 / 6)
    assert timing.foreign_share((0.0, 0.0, 0.0), (4.0, 1.0, 1.01)) == 0


def test_the_processors_clocks_go_forward() -> None:
    before = timing.processor_seconds()
    while time.process_time() < before[2] + 0.05:
        pass
    after = timing.processor_seconds()
    assert after[0] > before[0] and after[1] > before[1] and after[2] > before[2]

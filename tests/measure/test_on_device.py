"""Forecast beside measurement: the arithmetic by hand, what is printed, what is refused. The way: end_to_end."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import targets
from compiler.__main__ import main
from compiler.errors import UserError
from compiler.measure import bundle_cost, forecast, on_device
from compiler.measure.bundle_cost import Cost
from compiler.measure.compare import Workload
from compiler.measure.forecast import Spread, Work
from compiler.measure.on_device import Modelled
from runtime.bundle import read_manifest
from tests.runtime import tiny

PI = replace(targets.load("rpi4"), cores=4, clock_mhz=1000, dram_read_mb_per_s=1000, storage_read_mb_per_s=50)
WORK = Workload(64, 128, 16, 3)
COST = Cost(1, 128, 1_700_000, 100_000, 1e6, 1e5, 30, {})
FORECAST = forecast.Forecast(Spread(2, 4, 8), Spread(20, 40, 80), Spread(50, 60, 70), 1.5)


def test_a_forecast_by_hand() -> None:
    """4 million shared and 1 million other cycles at 1 GHz on 4 cores: 2 ms. 0.93 MB at 1 GB/s: 0.93 or 1 ms."""
    work = Work(tokens=2, shared_cycles=4e6, own_cycles=1e6, launches=100, nbytes=930_000)
    made = forecast.forecast(work, work, planned_bytes=10 << 20, weights_bytes=100_000_000, target=PI)
    assert made.decode_tok_s.high == pytest.approx(2 / 2e-3)  # arithmetic hides the memory
    assert made.decode_tok_s.expected == pytest.approx(2 / (2e-3 + 1e-3 + 100 * 5e-6))
    assert made.decode_tok_s.low == pytest.approx(2 / (1.3 * 2e-3 + 1e-3 + 100 * 20e-6))
    assert made.peak_mib == Spread(44, 67, 90)
    assert made.load_s == 2.0


def measured() -> dict[str, object]:
    return {
        "host": "pi@board", "device": "Raspberry Pi 4", "threads": 4, "prefill_tok_s": [30.0, 50.0, 40.0],
        "decode_tok_s": [3.0, 3.0, 3.5], "load_s": 2.0, "peak_rss_mib": 61.0, "mhz": [600, 1500],
        "celsius": [None, None],
    }  # fmt: skip


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    on_device.print_table(WORK, measured(), Modelled(COST, replace(COST, tokens=16), 1500, FORECAST))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "measured min max forecast (a model) low high measured / forecast",
        "decode after 128 (tokens/s) 3 3 3.5 4 2 8 0.75",
        "prefill of 64 (tokens/s) 40 30 50 40 20 80 1.00",
        "peak memory (MiB) 61 61 61 60 50 70 1.02",
        "ready after (s; forecast: weights from its card) 2 2 2 1.5 1.5 1.5 1.33",
        "measured on pi@board: Raspberry Pi 4, mhz 600 -> 1500, 4 threads",
        "counted on an emulated Cortex-A72: 1.80 million instructions a decoded token, 0.11 a prompt token",
        "forecast at 1500 MHz from these, llvm-mca's cycles and the target's bandwidth",
    ]


def test_a_measurement_without_a_forecast(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    on_device.print_table(WORK, measured(), "there is no qemu.")
    out = capsys.readouterr().out
    assert "forecast (a model)" not in out and out.endswith("no forecast: there is no qemu.\n")
    tiny.build(tmp_path / "toy")
    record = on_device.record(tmp_path / "toy", WORK, measured(), "there is no qemu.")
    assert (record["cost"], record["forecast"], record["no_forecast"]) == ("time", None, "there is no qemu.")
    assert record["spread"] == {
        "prefill_tok_s": {"median": 40.0, "min": 30.0, "max": 50.0},
        "decode_tok_s": {"median": 3.0, "min": 3.0, "max": 3.5},
    }


def test_an_emulated_board_gives_no_times(tmp_path: Path) -> None:
    tiny.build(tmp_path / "toy")
    record = on_device.record(tmp_path / "toy", WORK, None, Modelled(COST, COST, 1500, FORECAST))
    assert (record["cost"], record["instructions"], record["cycles"]) == ("model", 1_800_000, 1_100_000)
    assert not [name for name in record if name.endswith(("_s", "rss_mib"))]


def test_a_bundle_of_another_machine_is_refused(tmp_path: Path) -> None:
    found = tiny.build(tmp_path / "toy").target
    with pytest.raises(UserError) as caught:
        bundle_cost.require(tmp_path / "toy", read_manifest(tmp_path / "toy"), print)
    assert str(caught.value) == (
        f"{tmp_path / 'toy'}: the emulated board is a Raspberry Pi 4, but the bundle is for {found.name} "
        f"({found.arch}, {found.cpu}): build it with --target rpi4."
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "pi@b", "--board", "qemu", "x"],
         "--host measures on a device, --board counts on an emulated one: give one of the two."),
        (["--host", "pi@b"], "--host needs a BUNDLE: what `build` wrote for that board."),
        (["--board", "qemu", "x", "--growth", "context"], "--growth runs on this machine: leave it or --board out."),
        (["--host", "pi@b", "x", "--threads", "1,2"], "--host takes one number of --threads at a time."),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")

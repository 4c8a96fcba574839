"""The profile of a small bundle: every byte of weights is in some kernel's row, and rows and rest make the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import targets
from compiler.__main__ import main
from compiler.errors import UserError
from compiler.measure import profile, profile_report
from compiler.measure.compare import Workload
from compiler.measure.profile import Round, multiply_adds
from compiler.measure.speed import Spread
from runtime.bundle import read_manifest
from runtime.manifest import Manifest
from tests.runtime import tiny

NATIVE = targets.load("native")
LAYERS, HEAD_DIM = 5, 8


def test_rows_and_rest_make_the_whole(stories: Path) -> None:
    found = profile.measure(stories, NATIVE, Workload(16, 4, 2, 3), threads=1)
    decode, prefill = found.phases
    rows = {row.kernel.partition("_m1_")[0]: row for row in decode.rows}
    assert {name.partition("_w")[0].partition("_float")[0]: row.calls for name, row in rows.items() if "linear" not in
            name} == {"attention": 5, "embedding": 1, "quantize": 5, "rms_norm_quantize": 11, "rope_append": 5,
                      "swiglu_quantize": 5}  # fmt: skip
    assert sum(row.calls for row in decode.rows if row.kernel.startswith("linear")) == 4 * LAYERS + 1
    # The rotary table's row is read in every layer, and counts once in what a token must read: HEAD_DIM floats.
    read = sum(row.calls * row.nbytes for row in decode.rows)
    assert read - (LAYERS - 1) * 4 * HEAD_DIM == found.weight_bytes_per_token
    # The last row of two arrays, and its span; the head is a call of its own, and as long.
    assert sum(row.calls for row in prefill.rows) == sum(row.calls for row in decode.rows) + 3
    for phase in found.phases:
        assert 0 < phase.clock_us < 50
        assert all(row.us.min <= row.us.median <= row.us.max for row in phase.rows)
        # Not of every row: a kernel that is called once may be as quick as the clock, whose cost is subtracted.
        assert min(row.ms for row in phase.rows) >= 0 < sum(row.ms for row in phase.rows)


def test_a_table_by_hand(stories: Path) -> None:
    """Two rounds of two tokens: 3 and 5 us a call of a kernel that reads a layer's qkv, 128 rows of 64 inputs."""
    kernel, manifest = "linear_w4a8_isa_m1_n128_k64_g64_s16", read_manifest(stories)
    sizes = {w.name: w.nbytes for w in manifest.weights.tensors}
    codes = next(name for name in sizes if sizes[name] == 128 * 32 and name.startswith("layers.0."))
    made = [
        Round(2, 10e-6, read, clock, {kernel: [taken] * 4}, {kernel: [codes]})
        for read, clock, taken in ((20.0, 700, 3000), (10.0, 900, 5000))
    ]
    found = profile.phase("decode", made, manifest, 1)
    (row,) = found.rows
    assert (row.calls, row.us.median, row.us.min, row.us.max, row.ms) == (2, 4, 3, 5, 0.008)
    assert row.share == pytest.approx(0.8)
    assert row.nbytes == 4096
    assert (row.gb_s, row.of_ceiling) == (None, None), "too few bytes to speak of streaming"
    assert row.gmac_s == pytest.approx(128 * 64 / 4e-6 / 1e9)
    assert [found.ms.median, found.other_ms.median, found.clock_us] == pytest.approx([0.01, 0.002, 0.8])


def test_a_prompt_function_computes_the_rows_that_are_real(stories: Path) -> None:
    """25 tokens in calls of up to 16: 13 and 12 rows, which took 4 and 2 us."""
    kernel, manifest = "linear_w4a8_isa_m16_n128_k64_g64_s16", read_manifest(stories)
    assert profile.rows(manifest, Workload(25, 4, 1, 1)) == {16: 12.5}
    assert profile.rows(manifest, Workload(1, 4, 1, 1)) == {}
    calls = Round(1, 10e-6, 20.0, 700, {kernel: [4000, 2000]}, {kernel: []})
    found = profile.phase("prefill", [calls], manifest, 1, {16: 12.5})
    assert found.rows[0].gmac_s == pytest.approx(12.5 * 128 * 64 / 3e-6 / 1e9)


def _shown(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The table of rounds in which one kernel took 8 us of so many in all."""
    made = [Round(1, plain, 20.0, 700, {"rms_norm_m1_d64": [8000]}, {"rms_norm_m1_d64": []}) for plain in seconds]
    phase = profile.phase("decode", made, Manifest.__new__(Manifest), 1)
    profile_report.show(profile.Profile((phase,), Spread.of([20.0]), 4096, 1), Workload(16, 4, 1, len(seconds)))
    return capsys.readouterr().out.splitlines()


def test_what_kernels_leave_is_told_where_it_can_be_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "bytes_read", lambda manifest, tokens: {})
    lines = _shown([9e-6, 10e-6, 20e-6], capsys)
    assert lines[3].split() == ["virtual", "machine,", "Python,", "between", "kernels", "0.002", "20.0%"]
    lines = _shown([7e-6, 7.6e-6, 10e-6], capsys)
    assert lines[3].split() == ["virtual", "machine,", "Python,", "between", "kernels", "-", "-"]
    assert lines[4] == (
        "timed one by one, kernels take 5.3% more than the whole does without that: what is between them is too little "
        "to see beside how rounds differ"
    )


def test_multiply_adds_by_name() -> None:
    assert multiply_adds("linear_w4a8_avx512_vnni_m16_n2560_k2048_g128_s16_symmetric_residual", 9) == 16 * 2560 * 2048
    attention = "attention_float16_m1_h32_kv4_d64_c2048_x1_25em01_t1b128k8x1v4x4p1"
    assert multiply_adds(attention, 100.5) == 2 * 32 * 64 * 100.5
    assert multiply_adds("rope_append_float16_m1_h32_kv4_d64_p2048_c2048", 9) == 0


def test_the_verb(stories: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--profile", "--rounds", "1", "--prompt-tokens", "16", "--decode-tokens", "2", "--context", "4"]
    assert main(["bench", str(stories), *options, "--threads", "1", "--record", str(tmp_path / "r.jsonl")]) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("a token decoded after 4: ") and lines[1].split()[:2] == ["kernel", "calls"]
    assert sum(line.startswith("virtual machine, Python, between kernels") for line in lines) == 2
    assert "read ceiling" in lines[-1] and "which are subtracted" in lines[-1]
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert sorted(record["profile"]) == ["decode", "prefill"] and record["threads"] == 1
    assert record["profile"]["decode"]["rows"][0]["ms"] >= record["profile"]["decode"]["rows"][-1]["ms"]


def test_weights_too_few_to_time(tmp_path: Path) -> None:
    tiny.build(tmp_path / "toy")
    with pytest.raises(UserError) as caught:
        profile.measure(tmp_path / "toy", NATIVE, Workload(4, 4, 1, 1), 1)
    assert str(caught.value) == f"{tmp_path / 'toy'}: its 1536 bytes of weights are too few to time reading them."

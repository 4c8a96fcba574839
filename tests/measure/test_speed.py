"""Speed of a small bundle: figures that fit together, and the byte count by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import targets
from compiler.__main__ import main
from compiler.cli import bench
from compiler.errors import UserError
from compiler.measure import bundle_process, speed
from compiler.measure.speed import Spread
from runtime.bundle import Bundle, open_bundle
from runtime.session import Session
from tests.measure.conftest import CONTEXT
from tests.runtime import tiny

NATIVE = targets.load("native")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more, the runtime would pin the test process to a CPU."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")


def test_spread_by_hand() -> None:
    assert Spread.of([3, 1, 2, 10]) == Spread(2.5, 1, 10)
    assert Spread.of([4]) == Spread(4, 4, 4)


def test_bytes_a_token_by_hand(stories: Path) -> None:
    """4 bits a code with rows in 32s, 2 bytes for a span's scale, 1 for a weight's zero; 8 bits for the head.

    qkv [128, 64] and o [64, 64] in groups of 64, gate and up [344 -> 352, 64] too; down [64, 172] in 6 groups of 32,
    the last one short; head [512, 64] in one group; 11 norms of 64 floats; a row of the embedding in float16, and one
    of the rotary table, 8 floats.
    """
    layer = sum(rows * (spans * width // 2 + 2 * spans) + 1 for rows, spans, width in
                ((128, 1, 64), (64, 1, 64), (352, 1, 64), (64, 6, 32)))  # fmt: skip
    head, norms, rows = 512 * (64 + 2) + 1, 11 * 64 * 4, 64 * 2 + 8 * 4
    assert speed.weight_bytes_per_token(open_bundle(stories).manifest) == 5 * layer + head + norms + rows


@pytest.mark.parametrize(("prompt", "steps", "context"), [(16, 2, 4), (CONTEXT, 1, CONTEXT - 1)])
def test_figures_fit_together(stories: Path, prompt: int, steps: int, context: int) -> None:
    measured = speed.measure(stories, NATIVE, prompt, steps, rounds=2, threads=1, context=context)
    assert measured.threads == 1
    for spread in (measured.prefill_tok_s, measured.decode_tok_s, measured.read_gb_s, measured.decode_bandwidth_ratio):
        assert 0 < spread.min <= spread.median <= spread.max
    used = measured.weight_bytes_per_token / 1e9
    ratio, decode, read = measured.decode_bandwidth_ratio, measured.decode_tok_s, measured.read_gb_s
    assert used * decode.min / read.max <= ratio.median * (1 + 1e-9)
    assert ratio.median <= used * decode.max / read.min * (1 + 1e-9)


def test_a_prompt_without_tiles_is_computed_by_a_session_of_its_own(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Tiled(Session):
        """Says that it uses tiles unless told not to: what code it runs is no matter here."""

        def __init__(
            self, bundle: Bundle, threads: int | None = None, tiles: bool = True, timed: bool = False
        ) -> None:
            super().__init__(bundle, threads, tiles, timed=timed)
            self.tiles = tiles
            made.append(tiles)

    monkeypatch.setattr(bundle_process, "Session", Tiled)
    measured = bundle_process.Measured(open_bundle(stories), 1)
    assert measured.about()["tiles"]
    assert measured.prefill_plain(16)["seconds"] > 0
    assert measured.prefill_plain(16)["seconds"] > 0
    assert made == [True, False]


def test_with_tiles_prefill_is_measured_without_them_too(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.QuernSide, "tiles", property(lambda side: True, lambda side, value: None), raising=False)
    measured = speed.measure(stories, NATIVE, 16, 1, rounds=2, threads=1, context=4)
    assert measured.prefill_plain_tok_s is not None
    assert 0 < measured.prefill_plain_tok_s.min <= measured.prefill_plain_tok_s.max


def test_weights_too_few_to_time(tmp_path: Path) -> None:
    tiny.build(tmp_path / "toy")
    with pytest.raises(UserError) as caught:
        speed.measure(tmp_path / "toy", NATIVE, 4, 1, 1, 1, 4)
    assert str(caught.value) == f"{tmp_path / 'toy'}: its 1536 bytes of weights are too few to time reading them."


def test_a_record_names_the_bundles_own_target(tmp_path: Path) -> None:
    made = tiny.build(tmp_path / "toy")
    tiny.edit_manifest(tmp_path / "toy", target={**vars(made.target), "name": "x86-64"})
    found = bench._where(argparse.Namespace(bundle=tmp_path / "toy", shape=None, target="native"))
    assert (found["target"], found["bundle"]) == ("x86-64", str(tmp_path / "toy"))


def test_the_verb_prints_a_record(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--prompt-tokens", "999", "--decode-tokens", "2", "--threads", "1", "--json"]
    assert main(["bench", str(stories), *options]) == 0
    out, err = capsys.readouterr()
    assert err == f"{stories} has a context of 32 tokens: a prompt of 32 is measured, and 2 decoded after 30\n"
    record = json.loads(out)
    medians = ("start_s", "prefill_tok_s", "decode_tok_s", "read_gb_s", "decode_bandwidth_ratio")
    assert all(record[name] > 0 for name in medians)
    assert sorted(record["spread"]) == sorted(medians)
    assert record["start_s"] > 1 / record["prefill_tok_s"]
    assert 0 < record["planned_mib"] < record["peak_rss_mib"]
    assert (record["prompt_tokens"], record["context"], record["rounds"], record["threads"]) == (CONTEXT, 30, 1, 1)
    assert (record["bundle"], record["shape"], record["target"]) == (str(stories), None, "native")


def test_the_verb_prints_a_table(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--prompt-tokens", "16", "--decode-tokens", "2", "--context", "4", "--threads", "1"]
    assert main(["bench", str(stories), *options]) == 0
    out, _ = capsys.readouterr()
    header, *lines = out.splitlines()
    assert header.split() == ["median", "min", "max"]
    starts = (
        "start to logits after 16 tokens (s)",
        "prefill, 16 tokens (tokens/s)",
        "decode after 4 (tokens/s)",
        "read ceiling (GB/s)",
        "decode / ceiling",
        "0.2 MB",
    )
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 6

"""Growth tables: what each point measures, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

import targets
from compiler.__main__ import main
from compiler.errors import UserError
from compiler.measure import growth, growth_report, peers, shapes, speed
from compiler.measure.compare import Row, Workload
from compiler.measure.engines import Engines
from compiler.measure.growth import Point, Setup
from compiler.measure.growth_report import Stopped
from compiler.measure.peers import PeerModel
from compiler.measure.speed import Spread
from tests.measure.test_compare import Scripted

BASE = Setup("tinyllama-1.1b", 4, 128, 4, Workload(512, 128, 16, 5))


def test_only_what_depends_on_the_value_is_measured() -> None:
    assert growth.setups("context", BASE, [0, 4096])[1] == (
        4096, Setup("tinyllama-1.1b", 4, 128, 4, Workload(0, 4096, 16, 5)))  # fmt: skip
    assert growth.setups("prompt", BASE, [1])[0][1].work == Workload(1, 128, 0, 5)
    assert growth.setups("size", BASE, ["llama-2-7b"])[0][1].shape == "llama-2-7b"
    assert growth.setups("group", BASE, [32])[0][1].group_size == 32
    assert growth.setups("bits", BASE, [6])[0][1] == Setup("tinyllama-1.1b", 6, 128, 6, BASE.work)


def test_a_model_has_room_for_its_point() -> None:
    [(_, setup)] = growth.setups("context", BASE, [4096])
    assert setup.positions == 4112
    assert shapes.settings(setup.shape, setup.positions)["max_position_embeddings"] == 4112


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("group", "32,x", "--growth-values is '32,x', but --growth group needs numbers, as in 32,64."),
        ("bits", "4,7", "--growth-values: quern has no 7-bit weights. Take some of 2, 3, 4, 5, 6, 8."),
        ("prompt", "0", "--growth-values: 0 is too few for --growth prompt."),
        ("context", "-1", "--growth-values: -1 is too few for --growth context."),
    ],
)
def test_refused(kind: str, given: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        growth.values(kind, given)
    assert str(caught.value) == said


def test_setups_share_a_bundle_where_only_the_workload_differs() -> None:
    made = [setup for _, setup in growth.setups("context", BASE, [0, 4096, 128])]
    assert growth.shared(made) == [made[1]] * 3
    made = [setup for _, setup in growth.setups("bits", BASE, [4, 8])]
    assert growth.shared(made) == made


def test_the_sizes_grow() -> None:
    counts = [shapes.parameters(shape) for shape in growth.SIZES]
    assert counts == sorted(counts)
    assert counts[2] == 1_099_956_224  # TinyLlama's 1,100,048,384 without its 45 norms of 2048
    assert 0.1e9 < counts[0] < 0.15e9 and 6.7e9 < counts[-1] < 6.8e9


def test_a_title_is_what_the_points_share() -> None:
    titles = {kind: growth.title(kind, BASE) for kind in growth.KINDS}
    assert titles == {
        "context": "tinyllama-1.1b, 4 bits, groups of 128", "prompt": "tinyllama-1.1b, 4 bits, groups of 128",
        "size": "4 bits, groups of 128", "group": "tinyllama-1.1b, 4 bits", "bits": "tinyllama-1.1b, groups of 128",
    }  # fmt: skip


def test_a_plot_is_drawn_and_repeats(tmp_path: Path) -> None:
    def point(value: int, name: str, speed: float, threads: int = 2) -> Point:
        return Point(value, value, Row(name, {}, threads, None, Spread(speed, speed - 1, speed + 1), None, None))

    points = [point(v, name, s / (1 + v)) for v in (0, 128) for name, s in (("quern", 40.0), ("llama.cpp", 20.0))]
    growth.plot("context", points, "tinyllama-1.1b, 4 bits", tmp_path / "a" / "context.svg")
    growth.plot("context", points, "tinyllama-1.1b, 4 bits", tmp_path / "again.svg")
    drawn = (tmp_path / "a" / "context.svg").read_text()
    assert drawn == (tmp_path / "again.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("quern", "llama.cpp", "tokens of context", "decode"))
    assert "<!-- prefill -->" not in drawn
    growth.plot("context", [*points, point(0, "quern", 30.0, 1)], "", tmp_path / "threads.svg")
    drawn = (tmp_path / "threads.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("quern, 1 thread", "quern, 2 threads", "llama.cpp, 2 threads"))


def test_an_engine_that_cannot_run_a_point_is_told_once_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rounds of two points in one and in two threads: 3 bits are refused, 4 bits go on."""
    log: list[str] = []

    @contextmanager
    def quern(path: Path, threads: int | None) -> Iterator[Scripted]:
        yield Scripted("quern", [2.0, 2.0], [2.0, 2.0], [], threads or 2)

    class Peer:
        @staticmethod
        @contextmanager
        def opened(place: Path, variant: str, model: PeerModel, threads: int) -> Iterator[Scripted]:
            log.append(f"{variant} {model.bits}")
            if model.bits == 3:
                raise UserError("has no 3 bits.")
            yield Scripted("other", [1.0, 1.0], [1.0, 1.0], [], threads)

    monkeypatch.setattr(speed, "open_side", quern)
    monkeypatch.setattr(growth_report, "built", lambda setup, target, quiet: nullcontext(Path()))
    todo = growth.setups("bits", replace(BASE, work=Workload(512, 128, 16, 3)), [3, 4])
    engines = Engines({"other:plain": (cast(peers.Peer, Peer), "plain")}, Path())
    rows = list(growth_report.Growth("bits", todo, engines).run(targets.load("native"), [1, 2]))
    assert [(value, [row.name for row in found]) for value, _, found in rows] == [
        (3, ["quern"]), (4, ["quern", "other"])] * 2  # fmt: skip
    assert log == ["plain 3", *["plain 4"] * 6]
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [f"building tinyllama-1.1b, {bits} bits, groups of 128" for bits in (3, 4)]
    assert said[2:5] == ["round 1 of 3: bits 3", "left out at bits 3: has no 3 bits.", "round 1 of 3: bits 4"]
    assert sum("left out" in line for line in said) == 1


@pytest.mark.parametrize("end", [KeyboardInterrupt(), UserError("The measured process died.")], ids=repr)
@pytest.mark.parametrize("record", [True, False])
def test_what_was_measured_outlives_an_interrupt(
    end: BaseException, record: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of three rounds of two points in one thread and in two, it comes in the second round's second point."""
    opened: list[int] = []

    @contextmanager
    def quern(path: Path, threads: int | None) -> Iterator[Scripted]:
        opened.append(threads or 0)
        if len(opened) == 6 + 4:
            raise end
        yield Scripted("quern", [9.0, len(opened)], [9.0, len(opened)], [], threads or 2)

    monkeypatch.setattr(speed, "open_side", quern)
    monkeypatch.setattr(growth_report, "built", lambda setup, target, quiet: nullcontext(Path()))
    more = ["--record", str(tmp_path / "r.jsonl")] if record else []
    options = ["--growth", "bits", "--growth-values", "4,8", "--threads", "1,2", "--rounds", "3", "--json", *more]
    plot = ["--plot", str(tmp_path / "r.svg")]
    assert main(["bench", *options, *plot]) == (130 if isinstance(end, KeyboardInterrupt) else 2)
    out, err = capsys.readouterr()
    made = [json.loads(line) for line in out.splitlines()]
    kept = [(r["threads"], r["value"], r["rounds"], r["decode_tok_s"]["max"]) for r in made]
    assert kept == [(1, 4, 3, 5), (1, 8, 3, 6), (2, 4, 2, 9), (2, 8, 1, 8)]
    assert not record or (tmp_path / "r.jsonl").read_text() == out
    assert "quern, 2 threads" in (tmp_path / "r.svg").read_text()
    where = f"in {tmp_path / 'r.jsonl'}" if record else "above"
    assert err.splitlines()[-2:] == [
        f"stopped in round 2 of 3: what was measured is kept {where}. To go on: the same command with --rounds 2 "
        f"--threads 2",
        "interrupted" if isinstance(end, KeyboardInterrupt) else "error: The measured process died.",
    ]


def test_how_to_go_on() -> None:
    assert Stopped(0, 5, [None]).told("above") == (
        "stopped in round 1 of 5: what was measured is kept above. To go on: the same command with --rounds 5")
    assert Stopped(1, 5, [1, 2, 4]).told("above") == (
        "stopped in round 2 of 5: what was measured is kept above. To go on: the same command with --rounds 4 "
        "--threads 1, then with --threads 2,4")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "installed", "said"),
    [
        ("x.pdf", True, "--plot x.pdf: the name must end in .svg or .png."),
        ("/proc/x.svg", True, "/proc/x.svg: No such file or directory."),
        ("x.svg", False, "--plot needs the package matplotlib. Install it: pip install 'quern[plot]'."),
    ],
)
def test_what_cannot_be_drawn_is_told_before_it_is_measured(
    name: str, installed: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--growth", "bits", "--plot", name]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


@pytest.mark.slow
def test_the_verb_grows_over_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every width that quern packs, on a shape of its own, through build, process and record."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    monkeypatch.setitem(shapes.SHAPES, "small", {**shapes.LLAMA, **small, **rest})
    options = ["--growth", "bits", "--growth-values", "3,8", "--shape", "small", "--group-size", "32", "--threads", "1"]
    work = ["--prompt-tokens", "4", "--context", "0", "--decode-tokens", "2", "--rounds", "2"]
    assert main(["bench", *options, *work, "--record", str(tmp_path / "r.jsonl"), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["growth"], r["value"], r["about"]["bits"], r["name"]) for r in printed] == [
        ("bits", 3, 3, "quern"), ("bits", 8, 8, "quern")]  # fmt: skip
    for record in printed:
        for spread in (record["prefill_tok_s"], record["decode_tok_s"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert (record["shape"], record["rounds"], record["context"], record["threads"]) == ("small", 2, 0, 1)

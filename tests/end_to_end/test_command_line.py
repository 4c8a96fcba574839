"""`build` and `generate` as processes: what they print, what --dump-ir writes, and the same bytes every time."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from runtime import manifest
from runtime.tokenizer import Tokenizer
from tests.end_to_end import commands
from tests.end_to_end.bundles import Bundles, Sessions, all_logits
from tests.end_to_end.places import DEMO

pytestmark = pytest.mark.slow
PATIENCE_S = 300
# On the exact path this ends by itself, and every token is ahead of the next best by more than 0.1.
PROMPT = "There was a big tree in the garden. Under the tree lived"
BEGINNING = " in a big tree. The tree was very happy."
STAGES = ["import", "fuse", "schedule", "codegen", "link", "pack", "seal"]
IR_FILES = ["1_graph.py", "2_fused.py", "3_scheduled.py", "4_code.s"]
GENERATED = {
    "text", "tokens", "prompt_tokens", "prefill_s", "decode_s", "first_token_s", "load_s", "stop_reason", "threads",
    "peak_rss_mib",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A build as a process."""

    folder: Path
    bundle: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Built, Built]:
    """The demo model twice, side by side: other folders, other hash seeds, --json with --dump-ir, and --quiet."""
    starts = []
    for seed, options in (("1", ["--json", "--dump-ir", "ir"]), ("2", ["--quiet"])):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        process = subprocess.Popen(
            commands.command("compiler", "build", "--out", "b" * int(seed), *options),
            cwd=folder,
            env=commands.environment({"PYTHONHASHSEED": seed}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        starts.append((folder, folder / ("b" * int(seed)), process))
    ends = [(folder, bundle, process, *process.communicate(timeout=PATIENCE_S)) for folder, bundle, process in starts]
    first, second = (Built(folder, bundle, process.returncode, out, err) for folder, bundle, process, out, err in ends)
    return first, second


@pytest.fixture(scope="module")
def exact(bundles: Bundles) -> Path:
    """Its text does not hang on how this CPU sums."""
    return bundles(DEMO, activations="exact")


def test_quiet_prints_nothing(built: tuple[Built, Built]) -> None:
    assert (built[1].code, built[1].out, built[1].err) == (0, "", "")
    assert [path.name for path in built[1].folder.iterdir()] == ["bb"]


def test_the_same_bytes_every_time(built: tuple[Built, Built], demo: Path) -> None:
    """Other processes, folders, hash seeds and options, and a third build in this process."""
    first = commands.listing(built[0].bundle)
    assert set(first) == {"manifest.json", "model.so", "tokenizer.json", "tokenizer_config.json", "weights.bin"}
    assert first == commands.listing(built[1].bundle)
    assert first == commands.listing(demo)


def test_json_tells_about_the_build(built: tuple[Built, Built]) -> None:
    assert (built[0].code, built[0].err) == (0, "")
    said = json.loads(built[0].out)
    assert built[0].out.count("\n") == 1
    made = manifest.load(built[0].bundle / manifest.FILE_NAME)
    stages = said.pop("stages")
    assert said == {
        "bundle": "b",
        "target": "native",
        "model": DEMO.name,
        "parameters": made.model.parameters,
        "quantization": {
            "format": "gptq", "bits": 4, "group_size": 128, "activations": "int8", "checkpoint_activations": None,
            "head_bits": 8, "kv_cache": "float16",
        },
        "weights_bytes": (built[0].bundle / "weights.bin").stat().st_size,
        "tuned_kernels": len(made.tuning),
        "modelled_kernels": 0,
        "planned_peak_bytes": made.memory.planned_peak_bytes,
    }  # fmt: skip
    assert [stage["stage"] for stage in stages] == STAGES
    assert all(set(stage) == {"stage", "seconds", "bytes"} and stage["seconds"] >= 0 for stage in stages)
    sizes = {stage["stage"]: stage["bytes"] for stage in stages if stage["bytes"] is not None}
    assert sizes == {
        "link": (built[0].bundle / "model.so").stat().st_size,
        "pack": (built[0].bundle / "weights.bin").stat().st_size,
    }


def test_dump_ir_writes_every_stage(built: tuple[Built, Built]) -> None:
    folder = built[0].folder / "ir"
    assert sorted(path.name for path in folder.iterdir()) == IR_FILES
    graph, fused, scheduled, code = ((folder / name).read_text(encoding="utf-8") for name in IR_FILES)
    for stage in (graph, fused, scheduled):
        for function in ("decode", "prefill_128", "head_1", "logits_128"):
            assert f"def {function}(" in stage
    assert "quern.linear" in graph
    assert "quern." in fused
    assert graph != fused
    assert "@T.prim_func" in scheduled
    assert ".text" in code


@pytest.mark.parametrize(
    ("name", "options"), [("plain", ()), ("early", ("--max-new-tokens", 7)), ("stop", ("--stop", "happy"))]
)
def test_generate_json(exact: Path, name: str, options: tuple[object, ...]) -> None:
    done = commands.run("runtime", "generate", exact, "--prompt", PROMPT, "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    assert set(said) == GENERATED
    assert all(type(token) is int and 0 <= token < 2048 for token in said["tokens"])
    assert said["prompt_tokens"] == len(Tokenizer(exact / "tokenizer.json").encode(PROMPT))
    assert 0 < said["load_s"] < said["first_token_s"]
    assert 0 < said["prefill_s"] < said["first_token_s"] - said["load_s"] + 0.001
    assert said["decode_s"] > 0
    assert said["threads"] >= 1
    assert 10 < said["peak_rss_mib"] < 200
    if name == "plain":
        assert (said["stop_reason"], len(said["tokens"])) == ("eos", 80)
        assert said["text"].startswith(BEGINNING) and said["text"].endswith(".")
    if name == "early":
        assert (said["stop_reason"], len(said["tokens"])) == ("length", 7)
        assert BEGINNING.startswith(said["text"])
    if name == "stop":
        assert said["stop_reason"] == "stop"
        assert said["text"] == " in a big tree. The tree was very "


def test_logits_as_a_file(exact: Path, sessions: Sessions, tmp_path: Path) -> None:
    """On as many threads as the runtime takes, the same bits as on the one thread of a session here."""
    ids = list(range(3, 200))
    np.save(tmp_path / "ids.npy", ids)
    done = commands.run("runtime", "logits", exact, "--ids", "ids.npy", "--out", "logits.npy", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert np.array_equal(np.load(tmp_path / "logits.npy"), all_logits(sessions(exact), ids))


def test_generate_without_json_says_the_same(exact: Path) -> None:
    options = ("generate", exact, "--prompt", PROMPT)
    done = commands.run("runtime", *options)
    assert done.returncode == 0
    assert done.stdout == json.loads(commands.run("runtime", *options, "--json").stdout)["text"] + "\n"
    assert done.stderr.count("\n") == 1
    assert " tokens (eos), decode " in done.stderr


def test_a_full_context_ends_a_text(demo: Path) -> None:
    done = commands.run(
        "runtime", "generate", demo, "--prompt", "Once", "--max-new-tokens", 9999, "--ignore-eos", "--json"
    )
    said = json.loads(done.stdout)
    assert said["stop_reason"] == "context"
    # The last token is chosen when the context is full, and is not taken in.
    assert said["prompt_tokens"] + len(said["tokens"]) == 512 + 1

"""CUDA bundles from checkpoint to text, on a mock driver with emulated kernels; and every refusal of the runtime."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.__main__ import main
from compiler.codegen import carried, elf, nvrtc
from compiler.measure import commands as measure_commands
from compiler.measure import gpu_checks
from runtime.bundle import read_manifest
from runtime.tokenizer import Tokenizer
from tests.end_to_end import commands, gpu
from tests.end_to_end.bundles import Bundles, Sessions, all_logits, greedy
from tests.end_to_end.gpu import Built
from tests.end_to_end.places import DEMO, STORIES260K
from tests.mock import cuda as mock

PROMPT, STEPS = "Once upon a time", 12
MIB = 1 << 20
CUDA_TARGETS = ("jetson-nano", "jetson-xavier", "jetson-orin", "cuda-sm90")
# Device source would have these words in it.
SOURCE_WORDS = (b"__global__", b"quern.cuh", b"threadIdx", b"blockIdx", b"__syncthreads", b"asm volatile")
# Both paths are fp32; sums of k = 172 terms differ in order. Seen: 2e-5 of logits up to 20.
EXACT_BOUND = 2e-4
# Activations of 11 bits: k = 172 roundings of 2^-12 a layer, 35 matrices deep, add up to some 2^-8 of logits up to 20.
HALF_BOUND = 0.05  # 0.017 and 0.006 seen


SETTINGS: dict[str, Any] = {"activations": "exact", "chunks": (16,)}


@pytest.fixture(scope="session")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, int]]]:
    """A tuning database for it, and the knobs that it means, by record."""
    logs = tmp_path_factory.mktemp("logs")
    return logs, gpu.tune(STORIES260K, logs, "cuda-sm90", **SETTINGS)


@pytest.fixture(scope="session")
def small(tuning: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A 260 K model for a data-centre card, exact path, prompts in chunks of 16, some kernels of it tuned."""
    out = tmp_path_factory.mktemp("cuda") / "small"
    return gpu.build(STORIES260K, out, "cuda-sm90", tuning_logs=tuning[0], **SETTINGS)


def test_records_decide_what_is_built(small: Built, tuning: tuple[Path, dict[str, dict[str, int]]]) -> None:
    """Those of a card of the target's size. What every test below runs are these kernels, beside defaults."""
    _, wanted = tuning
    tuned = read_manifest(small.bundle).tuning
    assert {kernel.record: dict(kernel.knobs) for kernel in tuned.values()} == wanted
    kernels = {"_".join(name.split("_")[:2]): name for name in tuned}
    assert kernels.keys() == {"attention_decode", "attention_tile", "linear_dense"}
    assert kernels["linear_dense"].endswith("_t1w4") and kernels["attention_tile"].endswith("_r32p64t256")
    assert all(re.search(rf"__global__.* {name}\(|\n{name}\(", small.source) for name in tuned)
    done = small.run("info", emulated=False)
    assert f"tuning:       {len(tuned)} kernels by records {' '.join(sorted(wanted))}\n" in done.stdout


@pytest.fixture(scope="session")
def expected(bundles: Bundles, sessions: Sessions) -> list[int]:
    """What the CPU's bundle says to the prompt."""
    return said_by(bundles(STORIES260K, activations="exact", chunks=(16,)), sessions)


def launches_of(built: Built) -> dict[str, int]:
    """Launches of every function."""
    script = (built.bundle.parent / "ir" / "3_launches.txt").read_text()
    return {part.partition(":")[0]: part.count("<<<") for part in script.split("\n\n")[1:]}


def said_by(bundle: Path, sessions: Sessions, prompt: str = PROMPT, steps: int = STEPS) -> list[int]:
    return greedy(sessions(bundle), Tokenizer(bundle / "tokenizer.json").encode(prompt), steps)[0]


def test_the_gpu_tells_the_cpus_story_by_graphs(small: Built, expected: list[int], tmp_path: Path) -> None:
    """Prompt in a padded chunk, head, then single tokens: one without a graph, one captured, then replays."""
    said, counts = small.generate(PROMPT, STEPS, tmp_path / "counts")
    assert said["tokens"] == expected
    memory = read_manifest(small.bundle).memory
    steps = launches_of(small)
    assert counts["graph_launches"] == STEPS - 2 and counts["captures"] == 1
    assert counts["launches"] == steps["prefill_16"] + steps["head_1"] + (STEPS - 1) * steps["decode"]
    assert counts["peak_bytes"] <= memory.planned_peak_bytes + 64 * 1024  # caches and arena on their boundaries
    assert counts["copies_out"] == STEPS  # logits, straight to where they are read
    assert memory.weights_bytes - 64 * 1024 <= counts["bytes_in"] <= memory.weights_bytes + 64 * 1024
    assert {counts[name] for name in ("graphs_alive", "modules_alive", "left", "host_left")} == {0}
    assert counts["ptx"] == 0  # machine code was taken


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (("--no-cuda-graphs",), {"graphs": True}),
        ((), {"graphs": False}),
        ((), {"refuse": "capture"}),
        ((), {"refuse": "replay"}),
        ((), {"refuse": "cubin"}),
        ((), {"integrated": 1, "arch": 100}),
    ],
    ids=["by option", "no graphs", "capture fails", "replay fails", "machine code refused", "a later board"],
)
def test_what_a_driver_lacks_changes_nothing(
    small: Built, expected: list[int], tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, Any]
) -> None:
    said, counts = small.generate(PROMPT, STEPS, tmp_path / "counts", *arguments, **settings)
    assert said["tokens"] == expected
    compiled = settings.get("refuse") == "cubin" or "arch" in settings
    assert (counts["graph_launches"] > 0, counts["ptx"]) == (compiled, int(compiled))


BURSTS = """
import ctypes, sys
from pathlib import Path
from runtime.bundle import open_bundle
from runtime.on_cuda import OnCuda
machine, found = OnCuda(open_bundle(Path(sys.argv[1])), timed=True), ctypes.c_float()
decode = machine.calls["decode"].run
for _ in range(2):
    machine.model.call("quern_measure", decode.index, 0, 3, ctypes.byref(found))
    decode()
"""


@pytest.mark.parametrize(("refuse", "replayed"), [("nothing", 2), ("replay", 0)])
def test_bursts_are_graphs_once_a_function_has_run(
    refuse: str, replayed: int, small: Built, tmp_path: Path
) -> None:
    """Three calls launch by launch, a call, three calls as a graph, and a call that is replayed."""
    settings = small.environment(False, refuse=refuse, counts=tmp_path / "counts")
    script = [sys.executable, "-c", BURSTS, str(small.bundle)]
    subprocess.run(script, env=commands.environment(settings), check=True, timeout=60)
    counts = json.loads((tmp_path / "counts").read_text())
    assert (counts["launches"], counts["graph_launches"]) == (8 * launches_of(small)["decode"], replayed)
    assert {counts[name] for name in ("graphs_alive", "modules_alive", "others_alive", "left", "host_left")} == {0}


def test_logits_of_every_token(small: Built, bundles: Bundles, sessions: Sessions, tmp_path: Path) -> None:
    """Whole chunks through the large head, and the rest one by one: hidden states go from function to function."""
    ids = np.arange(3, 3 + 35) % 512
    np.save(tmp_path / "ids.npy", ids)
    done = small.run("logits", "--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    want = all_logits(sessions(bundles(STORIES260K, activations="exact", chunks=(16,))), ids.tolist())
    assert np.abs(np.load(tmp_path / "logits.npy") - want).max() < EXACT_BOUND


LESS_MEMORY = (
    "Close what else uses the GPU, or rebuild the bundle with a shorter context or fewer bits (python -m compiler "
    "build --context, --bits)."
)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "init": (
        {"refuse": "init"},
        "cannot run here: it runs on an NVIDIA GPU, but the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE (100). "
        "Rebuild the bundle for this machine's target (python -m compiler targets).",
    ),
    "old driver": (
        {"driver": 10020},
        "cannot run here: it needs an NVIDIA driver of CUDA 11.8 or later, but this one is of CUDA 10.2. "
        "Rebuild the bundle for this machine's target (python -m compiler targets).",
    ),
    "older GPU": (
        {"arch": 87},
        "cannot run here: it is built for sm_90 and later GPUs, but Mock GPU is sm_87. "
        "Rebuild the bundle for this machine's target (python -m compiler targets).",
    ),
    "no memory": (
        {"memory": MIB},
        f"the caches need 1 MiB of GPU memory, but Mock GPU has 0 MiB free of 1 MiB. {LESS_MEMORY}",
    ),
    "a kernel fails": (
        {"refuse": "launch"},
        "quern_run: cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED (719). The GPU is lost to this process: start "
        "again; with QUERN_CHECK_LAUNCHES=1 it says which kernel failed.",
    ),
    "no memory for a context": (
        {"refuse": "context"},
        f"Mock GPU lacks the free memory for a context of its driver. {LESS_MEMORY}",
    ),
    "no memory for code": (
        {"refuse": "code memory", "memory": 8 * MIB},
        f"the kernels need 1 MiB of GPU memory, but Mock GPU has 6 MiB free of 8 MiB. {LESS_MEMORY}",
    ),
    "refused code": (
        {"refuse": "ptx", "arch": 100},
        "Mock GPU did not take the code for sm_90: CUDA_ERROR_INVALID_PTX (218): ptxas fatal   : SM version of the "
        "mock's refusal. Rebuild the bundle with this release of quern, or update the driver.",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(small: Built, case: str) -> None:
    settings, message = REFUSALS[case]
    done = small.run("generate", "--prompt", PROMPT, emulated=False, **settings)
    assert commands.message(done.returncode, done.stdout, done.stderr) == f"{small.bundle}: {message}"


def test_a_kernel_that_does_not_fit_is_named(small: Built) -> None:
    done = small.run("generate", "--prompt", PROMPT, emulated=False, refuse="threads")
    assert re.fullmatch(
        rf"{re.escape(str(small.bundle))}: \w+ has blocks of \d+ threads, and Mock GPU has room for 32 of them at "
        r"once\. Rebuild the bundle with this release of quern, or update the driver\.",
        commands.message(done.returncode, done.stdout, done.stderr),
    )  # fmt: skip


def test_a_kernel_that_fails_is_named(small: Built, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(16))
    arguments = ("logits", small.bundle, "--ids", tmp_path / "ids.npy", "--out", tmp_path / "out.npy")
    settings = small.environment(False, refuse="launch") | {"QUERN_CHECK_LAUNCHES": "1"}
    done = commands.run("runtime", *arguments, env=settings)
    first = re.search(r"logits_16: .*\n  (\w+)<<<", (small.bundle.parent / "ir" / "3_launches.txt").read_text())
    assert first is not None
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        f"{small.bundle}: quern_run: launch 1 of logits_16, {first[1]}: CUDA_ERROR_LAUNCH_FAILED (719). "
        f"The GPU is lost to this process: start again."
    )


def test_a_machine_without_a_driver(small: Built, tmp_path: Path) -> None:
    missing = {"QUERN_LIBCUDA": str(tmp_path / "libcuda.so.1")}
    done = commands.run("runtime", "generate", small.bundle, "--prompt", PROMPT, env=missing)
    why = (
        f"it runs on an NVIDIA GPU, but the NVIDIA driver is not there: {tmp_path}/libcuda.so.1: cannot open shared "
        f"object file: No such file or directory"
    )
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        f"{small.bundle}: cannot run here: {why}. "
        f"Rebuild the bundle for this machine's target (python -m compiler targets)."
    )
    done = commands.run("runtime", "info", small.bundle, env=missing)
    assert done.stdout.endswith(f"runs here:    no: {why}\n")
    assert (
        "gpu:          NVIDIA sm_90 or later, driver of CUDA 11.8 or later; machine code for sm_90, and PTX 7.8\n"
        in (done.stdout)
    )
    done = small.run("info", emulated=False)
    assert done.stdout.endswith("runs here:    yes\n")


def test_a_flipped_bit_of_the_weights_is_refused_before_anything_runs(small: Built, tmp_path: Path) -> None:
    copied = shutil.copytree(small.bundle, tmp_path / "bundle")
    weights = copied / read_manifest(copied).weights.file
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    flipped = replace(small, bundle=copied)
    options = ("--prompt", PROMPT, "--max-new-tokens", 2, "--ignore-eos")
    done = flipped.run("generate", *options, counts=tmp_path / "counts")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {weights}: is damaged: the SHA-256 of bytes 0 to {len(content) - 1} is not the manifest's. "
        "Copy the bundle again or rebuild it.\n"
    )
    assert not (tmp_path / "counts").exists()  # written by a process that loaded device code
    done = flipped.run("generate", *options, "--no-verify-weights", counts=tmp_path / "counts")
    assert done.returncode == 0 and (tmp_path / "counts").exists()


def test_threads_belong_to_the_cpu(small: Built) -> None:
    done = small.run("generate", "--prompt", PROMPT, "--threads", 2, emulated=False)
    assert commands.message(done.returncode, done.stdout, done.stderr) == (
        f"{small.bundle}: runs on a GPU, and threads are the CPU's. Leave --threads out."
    )


def test_bench_measures_what_a_card_would_do(small: Built, tmp_path: Path) -> None:
    work = ("--prompt-tokens", 16, "--decode-tokens", 3, "--context", 4, "--rounds", 1, "--json")
    counts = tmp_path / "counts"
    done = commands.run(
        "compiler", "bench", small.bundle, *work, env=small.environment(False, counts=counts, memory=64 * MIB)
    )
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["device"], record["sm"], record["driver"], record["code"]) == ("Mock GPU", 90, "12.4", "cubin")
    assert record["graphs"] is True and record["note"] == ""
    for name in ("prefill_tok_s", "decode_tok_s", "decode_plain_tok_s", "copy_gb_s", "prefill_tflop_s"):
        assert record[name] > 0, name
    assert record["decode_bandwidth_ratio"] == pytest.approx(
        record["weight_bytes_per_token"] * record["decode_tok_s"] / 1e9 / record["copy_gb_s"]
    )
    assert json.loads(counts.read_text())["graph_launches"] > 0


CARD = ["card", "--model", str(STORIES260K), "--activations", "exact"]


def test_a_card_is_checked_and_a_failure_goes_on(
    small: Built, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the mock, with the bundles that are here already: for one target the GPU fails, and then it hangs."""
    ready = {"bundle": small.bundle, "cpu-exact-16-float32": bundles(STORIES260K, activations="exact", chunks=(16,))}
    start = measure_commands.run

    def instead(module: str, verb: str, *arguments: str, limit_s: float, **others: Any) -> str:
        if verb == "build":
            out = Path(arguments[arguments.index("--out") + 1])
            out.symlink_to(ready[out.name])
            return ""
        older = any("cuda-sm72" in argument for argument in arguments)
        monkeypatch.setenv("QUERN_MOCK_REFUSE", "nothing" if not older else "hang" if verb == "bench" else "launch")
        if verb == "bench":
            work = ("--prompt-tokens", "16", "--decode-tokens", "2", "--context", "4", "--rounds", "1", "--json")
            return start(module, verb, str(small.bundle), *work, limit_s=3 if older else limit_s, **others)
        return start(module, verb, *arguments, limit_s=limit_s, **others)

    monkeypatch.setattr(measure_commands, "run", instead)
    monkeypatch.setattr(gpu_checks, "TOKENS", 20)  # a chunk of 16, and single tokens
    for name, value in small.environment(arch=90, memory=64 * MIB).items():
        monkeypatch.setenv(name, value)
    record = tmp_path / "card.jsonl"
    options = [*CARD, "--shapes", "tinyllama-1.1b:1", "--record", str(record)]
    assert main([*options, "--targets", "cuda-sm72,cuda-sm90"]) == 1
    out, err = capsys.readouterr()
    assert out == record.read_text()
    about, broken, numerics, hanging, speed = found = list(map(json.loads, out.splitlines()))
    assert all((r["device"], r["sm"], r["driver"], r["emulated"]) == ("Mock GPU", 90, "12.4", True) for r in found)
    assert (about["check"], about["multiprocessors"]) == ("card", 2)
    assert (broken["check"], broken["target"], broken["good"]) == ("numerics", "cuda-sm72", False)
    assert re.search(
        r"cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED \(719\).* Kernel by kernel: .*: launch 1 of logits_16, "
        r"embedding_\w+: CUDA_ERROR_LAUNCH_FAILED \(719\)", broken["error"],
    )  # fmt: skip
    assert numerics["good"] is True and 0 < numerics["worst"] < numerics["bound"] and numerics["same_tokens"] == 1
    assert (hanging["check"], hanging["target"], hanging["good"]) == ("speed", "cuda-sm72", False)
    assert hanging["error"].endswith("was ended after 3 s: it hangs, or the machine is too slow.")
    assert (speed["check"], speed["shape"]) == ("speed", None) and speed["prefill_tflop_s"] > 0
    assert min(speed[n] for n in ("decode_tok_s", "decode_plain_tok_s", "copy_gb_s", "prefill_tok_s")) > 0
    steps = launches_of(small)
    for function in ("decode", "prefill_16"):
        times = [ms for _, _, ms in speed["kernels"][function]]
        assert times == sorted(times, reverse=True) and min(times) > 0
        assert sum(launches for _, launches, _ in speed["kernels"][function]) == steps[function]
    told = err.splitlines()
    assert told[0] == "Mock GPU, sm_90, driver of CUDA 12.4" and told[-1] == "2 passed, 2 failed, 0 skipped"
    assert told[1] == "[1/4] numerics of cuda-sm72, activations exact ..."
    assert told[2].startswith("[1/4] numerics of cuda-sm72, activations exact: failed after ")
    assert any(line.startswith("[4/4] speed of tinyllama-1.1b:1, cuda-sm90: passed after ") for line in told)


def test_a_card_that_is_too_old_for_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was checked, and that is no success."""
    for name, value in mock.environment(None, arch=87, driver=10020).items():
        monkeypatch.setenv(name, value)
    assert main([*CARD, "--targets", "cuda-sm90,cuda-sm72"]) == 1
    out, err = capsys.readouterr()
    newer, older = map(json.loads, out.splitlines()[1:])
    assert (newer["check"], newer["target"], newer["why"]) == ("skipped", "cuda-sm90", "this GPU is sm_87")
    assert older["why"] == "it needs a driver of CUDA 11.4, and this one is of 10.2: update the driver"
    assert err.splitlines()[-1] == "0 passed, 0 failed, 2 skipped"


def test_a_card_needs_the_compilers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in mock.environment(None).items():
        monkeypatch.setenv(name, value)
    nvrtc._ptxas.cache_clear()
    monkeypatch.setattr(nvrtc, "PTXAS", ("nvidia-cuda-nvcc-cu99", "12.9.86", "ptxas"))
    assert main(CARD) == 2
    assert capsys.readouterr() == (
        "", "error: CUDA targets need nvidia-cuda-nvcc-cu99 12.9.86 (a Python package). Install what building for CUDA "
        f"needs: {sys.executable} -m pip install 'quern[cuda]'.\n",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_what_a_bundle_is_made_of(target: str, tmp_path: Path) -> None:
    """No device source, PTX of the version and architecture that the target states, little beside the weights."""
    built = gpu.build(STORIES260K, tmp_path / "out", target, activations="exact", chunks=(16,), self_contained=True)
    sealed, library = read_manifest(built.bundle), (built.bundle / "model.so").read_bytes()
    assert not [word for word in SOURCE_WORDS if word in library]
    assert sealed.target.gpu is not None
    assert re.findall(rb"^\.version (\S+)$", library, re.MULTILINE) == [sealed.target.gpu.ptx.encode()]
    assert re.findall(rb"^\.target (\S+)$", library, re.MULTILINE) == [sealed.target.gpu.arch.encode()]
    assert library.count(b"\x7fELF") == 1 + sealed.target.gpu.cubin
    found = elf.read(built.bundle / "model.so")
    assert (found.arch, found.unversioned) == (sealed.target.arch, ())
    assert {"libc.so.6", "libdl.so.2"} >= set(found.needed)
    names = set(sealed.files)
    assert not [name for name in names if "tvm" in name] and {"tokenizers.abi3.so", "runtime.zip", "run"} <= names
    without = sum(digest.bytes for name, digest in sealed.files.items() if name != "weights.bin")
    assert ("tokenizers.cpython-38-aarch64-linux-gnu.so" in names) == (sealed.target.arch == "aarch64")
    tokenizer = sum(digest.bytes for name, digest in sealed.files.items() if name.startswith("tokenizer"))
    assert without - tokenizer < MIB and without < carried.MAX_BYTES


@pytest.mark.slow
@pytest.mark.board
def test_a_board_walks_the_same_launches(board: Any, tmp_path: Path) -> None:
    """The host side as aarch64 code under qemu, from a bare Python. The mock's kernels do nothing there."""
    built = gpu.build(
        STORIES260K, tmp_path / "out", "jetson-nano", activations="exact", chunks=(16,), self_contained=True
    )
    options = ["--max-new-tokens", "6", "--ignore-eos", "--json"]
    settings: dict[str, Any] = {
        "arch": 53,
        "driver": 10020,
        "integrated": 1,
        "memory": 64 * MIB,
        "counts": tmp_path / "counts",
    }
    environment = mock.environment(triple="aarch64-linux-gnu.2.27", **settings)
    done = board.run([built.bundle / "run", PROMPT, *options], env={"PYTHONPATH": "", **environment}, cwd=tmp_path)
    assert json.loads(done.stdout)["tokens"] == [0] * 6  # logits of zeros
    counts = json.loads((tmp_path / "counts").read_text())
    steps = launches_of(built)
    assert counts["launches"] == steps["prefill_16"] + steps["head_1"] + 5 * steps["decode"]
    assert (counts["graph_launches"], counts["ptx"], counts["left"], counts["host_left"]) == (4, 1, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_the_demo_model_tells_the_cpus_story(
    activations: str, demo: Path, bundles: Bundles, sessions: Sessions, tmp_path: Path
) -> None:
    """Token by token: the prompt is too short for a chunk."""
    prompt, steps = "One day", 8
    built = gpu.build(DEMO, tmp_path / "out", "cuda-sm90", activations=activations, chunks=(16,))
    said, counts = built.generate(prompt, steps, tmp_path / "counts")
    assert counts["launches"] == launches_of(built)["decode"] * (3 + steps - 1)
    on_cpu = demo if activations == "int8" else bundles(DEMO, activations=activations)
    assert said["tokens"] == said_by(on_cpu, sessions, prompt, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "activations", "cache"),
    [
        ("cuda-sm53", "float16", "float16"),
        ("cuda-sm72", "int8", "float32"),
        ("cuda-sm87", "int8", "float32"),
        ("cuda-sm90", "int8", "float16"),
    ],
)
def test_rounded_activations_on_every_architecture(
    target: str, activations: str, cache: str, bundles: Bundles, sessions: Sessions, tmp_path: Path
) -> None:
    """Prompt chunks and single tokens of 4-bit weights. Integer sums are exact: fp32 attention gives the CPU's logits.

    Where tensor cores attend in fp16, activations go over the edge of their rounding: as much as all of int8 rounding
    moves a logit, twice over, and not more. Half precision is near the exact path.
    """
    settings: dict[str, Any] = {"bits": 4, "kv_cache": cache, "head_bits": 8, "chunks": (16,)}
    built = gpu.build(STORIES260K, tmp_path / "out", target, activations=activations, **settings)
    ptx = (tmp_path / "out" / "ir" / "4_code.ptx").read_bytes()  # a later card's driver compiles it
    assert not [name for name, used in nvrtc._assemble(ptx, "sm_90").items() if used.spill_bytes]
    assert re.search(rb"shfl\.sync", ptx) and not re.search(rb"\b(shfl|vote|match)\.(?!sync)", ptx)
    ids = np.arange(3, 3 + 35) % 512
    np.save(tmp_path / "ids.npy", ids)
    done = built.run("logits", "--ids", tmp_path / "ids.npy", "--out", tmp_path / "logits.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    got, bound = np.load(tmp_path / "logits.npy"), HALF_BOUND if activations == "float16" else EXACT_BOUND
    on_cpu = "exact" if activations == "float16" else activations
    want = all_logits(sessions(bundles(STORIES260K, activations=on_cpu, **settings)), ids.tolist())
    if target == "cuda-sm90":
        unrounded = bundles(STORIES260K, activations="exact", **settings)
        bound = 2 * np.abs(want - all_logits(sessions(unrounded), ids.tolist())).max()
        assert (got.argmax(1) == want.argmax(1)).mean() > 0.9
    assert np.abs(got - want).max() < bound

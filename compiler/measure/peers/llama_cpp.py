"""llama.cpp, built here from the source that llama-cpp-python's source distribution carries; timed by its llama-bench.

Each measurement is one llama-bench process: it loads the model, warms up, runs once. Its prompt ends with the logits of
the last token, its decoding samples nothing; bundle_process.py does the same for quern.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compiler.errors import UnsupportedError, UserError
from compiler.measure.peers import PeerModel, Say, environment, run
from compiler.measure.process import command

NAME = "llama.cpp"
VARIANTS = {
    "native": "every instruction of this CPU",
    "no-amx": "every instruction of this CPU but AMX",
    "avx2": "AVX2 and FMA only",
}
SOURCE = "llama-cpp-python==0.3.36"  # its vendor/llama.cpp
PACKAGES = ["cmake==4.4.4", "ninja==1.13.2", "gguf==0.19.0", "google-re2==1.1.20251105"]
TOOLS = ("llama-bench", "llama-perplexity")
TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_0", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}  # bits -> GGUF type
OFF = ("LLAMA_BUILD_SERVER", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI",
       "LLAMA_BUILD_APP", "LLAMA_OPENSSL", "BUILD_SHARED_LIBS")  # fmt: skip
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
CPU = ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")
FLAGS = {  # every one states all that another may have set: the variants share a build folder
    "native": ["-DGGML_NATIVE=ON", "-DCMAKE_C_FLAGS=", "-DCMAKE_CXX_FLAGS="],
    "no-amx": ["-DGGML_NATIVE=ON", f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}"],
    "avx2": ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in CPU), "-DCMAKE_C_FLAGS=", "-DCMAKE_CXX_FLAGS="],
}


def home(place: Path) -> Path:
    """One folder a version."""
    return place / f"llama.cpp-{SOURCE.rpartition('=')[2]}"


def missing(place: Path, variant: str) -> str | None:
    """The first tool of this build that is not there, or the environment that writes the models."""
    tools = [home(place) / variant / "bin" / tool for tool in TOOLS]
    wanted = [*tools, home(place) / "venv" / "packages.txt"]
    return next((str(path.relative_to(place)) for path in wanted if not path.is_file()), None)


def install(place: Path, variant: str, say: Say) -> None:
    """Fetch the source once, build the variant: ten minutes on two cores, one for a second variant."""
    if variant == "no-amx" and "amx_tile" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        raise UnsupportedError("llama.cpp:no-amx: this CPU has no AMX, so that build is the native one. Take it.")
    if shutil.which("c++") is None:
        raise UserError("llama.cpp is built from its source, but there is no C++ compiler. Run: apt-get install g++")
    python = environment(home(place) / "venv", PACKAGES, say)
    source = home(place) / "source"
    if not source.is_dir():
        say(f"{SOURCE}: fetching the source")
        _fetch(python, source)
    say(f"llama.cpp, {VARIANTS[variant]}: building, which takes minutes")
    tools, build = python.parent, home(place) / "build"
    run([str(tools / "cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
         f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", *(f"-D{name}=OFF" for name in OFF), *FLAGS[variant]])  # fmt: skip
    jobs = str(len(os.sched_getaffinity(0)))
    run([str(tools / "cmake"), "--build", str(build), "--parallel", jobs, "--target", *TOOLS])
    kept = home(place) / variant / "bin"
    kept.mkdir(parents=True, exist_ok=True)
    for tool in TOOLS:
        shutil.copy2(build / "bin" / tool, kept / tool)


def _fetch(python: Path, source: Path) -> None:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        run([str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", SOURCE.partition("=")[0],
             "--dest", folder, SOURCE])  # fmt: skip
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (vendored,) = Path(folder).glob("*/vendor/llama.cpp")
        for name, place, more in MENDS:
            mend(vendored / name, place, more)
        vendored.rename(source)


# (file, what stands there once, what is put before it)
MENDS = (
    # GCC 12 moves the stores that fill the tile configuration behind the instruction that reads it, which then faults.
    ("ggml/src/ggml-cpu/amx/mmq.cpp", "    _tile_loadconfig(&tc);", '    __asm__ volatile("" ::: "memory");\n'),
    # The log has a thread of its own, which the end of main cuts off, often before the estimate is out.
    ("tools/perplexity/perplexity.cpp", "    llama_backend_free();\n", "    common_log_flush(common_log_main());\n"),
)


def mend(file: Path, place: str, more: str) -> None:
    """Put `more` before `place`, which must stand in the file once. Other compilers and runs lose nothing by it."""
    text = file.read_text(encoding="utf-8")
    if text.count(place) != 1:
        raise UserError(f"{file}: has changed where quern mends llama.cpp. Report this to quern.")
    file.write_text(text.replace(place, more + place), encoding="utf-8")


class LlamaCpp:
    """A GGUF file and the tools of one build."""

    def __init__(self, tools: Path, variant: str, model: Path, kind: str, threads: int) -> None:
        self._tools, self._model, self.threads = tools, model, threads
        self.name = f"{NAME} {kind}" if variant == "native" else f"{NAME}:{variant} {kind}"
        self.about: dict[str, object] = {"source": SOURCE, "build": variant, "type": kind}

    def prefill(self, tokens: int) -> float:
        """llama-bench -p."""
        return self._bench("-p", str(tokens), "-n", "0")

    def decode(self, context: int, tokens: int) -> float:
        """llama-bench -n at a depth."""
        return self._bench("-p", "0", "-n", str(tokens), "-d", str(context))

    def _bench(self, *options: str) -> float:
        tool = [str(self._tools / "llama-bench"), "-m", str(self._model), "-t", str(self.threads), "-r", "1"]
        (result,) = json.loads(run([*tool, "-o", "json", *options]))
        self.about |= {key: result.get(key) for key in ("build_commit", "type_k", "flash_attn")}
        return float(result["avg_ts"])

    def perplexity(self, windows: list[list[int]]) -> float:
        """Of windows of equal length, the second half of each scored; see perplexity.py for why letters will do."""
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as text:
            text.write("".join(letter(i) for window in windows for i in window))
            text.flush()
            said = run([str(self._tools / "llama-perplexity"), "-m", str(self._model), "-t", str(self.threads),
                        "-c", str(len(windows[0])), "-b", str(len(windows[0])), "-f", text.name],
                       both=True)  # fmt: skip
        return final_estimate(said)


def final_estimate(said: str) -> float:
    """The figure in "Final estimate: PPL = 14.1234 +/- 0.56"."""
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", said)
    if found is None:
        raise UserError(f"llama-perplexity gave no estimate. It said:\n{said[-1000:]}")
    return float(found[1])


def letter(token: int) -> str:
    """The character that stands for a token in the GGUF files that quern writes: one a token, beyond all scripts."""
    return chr(0x20000 + token)


@contextmanager
def opened(place: Path, variant: str, model: PeerModel, threads: int) -> Iterator[LlamaCpp]:
    """The model as a GGUF file, written by the environment's own gguf package."""
    if {model.bits, model.head_bits} - TYPES.keys():
        raise UnsupportedError(
            f"llama.cpp: is compared with 2, 3, 4, 5, 6 and 8 bits, not {model.bits} with a head of {model.head_bits}."
        )
    kind = TYPES[model.bits]
    request: Mapping[str, Any] = {
        "config": dict(model.config), "type": kind, "head": TYPES[model.head_bits],
        "checkpoint": None if model.checkpoint is None else str(model.checkpoint),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="quern-bench-") as folder:
        file, wanted = Path(folder) / "model.gguf", Path(folder) / "request.json"
        wanted.write_text(json.dumps(request), encoding="utf-8")
        python = home(place) / "venv" / "bin" / "python"
        run(command(python, "compiler.measure.gguf_model", [str(wanted), str(file)]))
        yield LlamaCpp(home(place) / variant / "bin", variant, file, kind, threads)

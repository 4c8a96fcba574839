"""The import law of quern: who may import what. The table here is the law; the documentation explains it."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LAYERS = ("compiler", "schedules", "targets", "runtime")
STDLIB = sys.stdlib_module_names | {"tomllib"}  # the law is the same on Python 3.10, which lacks it
ANYTHING = {"*"}
# Module or package -> what it may import besides the standard library and itself. The longest matching name counts.
# A name allows everything below it. All of compiler may import compiler.errors.
LAW: dict[str, set[str]] = {
    "runtime": {"numpy"},
    "runtime.vm": {"numpy", "runtime", "tvm_ffi"},
    "runtime.tokenizer": {"numpy", "runtime", "tokenizers"},
    "targets": set(),
    "targets.files": {"targets", "tomli"},  # tomllib of Python 3.11, for 3.10
    "schedules": {"numpy", "targets", "tvm"},
    "compiler": set(),
    "compiler.__main__": {"compiler.cli", "runtime.arguments", "runtime.errors", "targets"},
    "compiler.cli": ANYTHING,
    "compiler.pipeline": ANYTHING,
    "compiler.errors": {"runtime.errors"},
    "compiler.progress": {"rich"},
    "compiler.checkpoint": {"numpy"},
    "compiler.checkpoint.hub": {"compiler.checkpoint", "huggingface_hub"},  # optional: only where a model is an id
    "compiler.quant": {"numpy"},
    "compiler.quant.patterns": {"compiler.quant", "numpy", "re2"},
    "compiler.quantize": {"compiler.checkpoint", "compiler.models", "compiler.quant", "numpy", "scipy", "torch"},
    "compiler.graph": {"compiler.quant.ir", "numpy", "tvm"},
    "compiler.models": {
        "compiler.checkpoint.config", "compiler.checkpoint.gguf_architecture", "compiler.graph", "compiler.quant.ir",
        "tvm",
    },
    "compiler.passes": {"compiler.graph", "compiler.quant", "schedules", "targets", "tvm"},
    "compiler.tune": {
        "compiler.codegen.cuda", "compiler.codegen.link", "compiler.codegen.nvrtc", "compiler.graph.ops",
        "compiler.measure.read_bandwidth", "compiler.measure.record_file", "compiler.passes", "numpy", "runtime",
        "schedules", "targets", "tvm", "xgboost",
    },
    "compiler.tune.model": {
        "compiler.measure.cycles", "compiler.measure.emulator", "compiler.measure.instructions", "compiler.tune",
        "numpy", "schedules", "targets",
    },
    "compiler.tune.report": {"compiler.tune", "rich", "targets"},
    "compiler.tune.tasks": {
        "compiler.checkpoint.hub", "compiler.measure.shapes", "compiler.models", "compiler.passes",
        "compiler.pipeline", "compiler.tune", "schedules", "targets",
    },
    "compiler.tune.ssh": {
        "asyncssh", "compiler.codegen.carried", "compiler.deploy", "compiler.tune", "runtime", "targets",
    },
    "compiler.board": {"compiler.codegen.link", "runtime"},
    "compiler.codegen": {"numpy", "runtime.manifest", "runtime.manifest_check", "targets", "tvm"},
    "compiler.codegen.chat_format": {"jinja2", "runtime.manifest"},
    "compiler.codegen.cuda": {
        "compiler.codegen", "compiler.passes.lower_to_launches", "schedules.cuda.kernel", "targets",
    },
    "compiler.codegen.tokenizer_files": {"tokenizers"},
    "compiler.deploy": {"asyncssh", "compiler.progress", "runtime"},
    "compiler.measure": {
        "compiler.checkpoint.config", "compiler.codegen", "compiler.graph", "compiler.quant", "numpy", "runtime",
        "targets", "tvm",
    },
    # The measured process is the device's runtime and nothing else; the peers' run in environments of their own.
    "compiler.measure.bundle_process": {"compiler.measure.kernel_clock", "numpy", "runtime"},
    "compiler.measure.kernel_clock": {"runtime"},
    "compiler.measure.process": set(),
    "compiler.measure.gguf_model": {"compiler.checkpoint", "compiler.quant", "gguf", "numpy"},
    "compiler.measure.growth": {"compiler.measure", "matplotlib"},
    "compiler.measure.growth_report": {"compiler.measure", "targets"},
    "compiler.measure.engines": {"compiler.checkpoint", "compiler.measure", "runtime"},
    "compiler.measure.peers": {"compiler.measure.process"},
    "compiler.measure.peers.openvino": {"compiler.measure.peers", "compiler.measure.process", "numpy", "openvino"},
    "compiler.measure.peers.onnxruntime_genai": {
        "compiler.measure.peers", "compiler.measure.process", "numpy", "onnx", "onnxruntime_genai",
    },
    "compiler.measure.shape_forecast": {
        "compiler.codegen", "compiler.graph", "compiler.measure", "compiler.models", "compiler.passes",
        "compiler.pipeline", "numpy", "targets", "tvm",
    },
    "compiler.measure.gpu_forecast": {
        "compiler.codegen.nvrtc", "compiler.graph", "compiler.measure", "compiler.models", "compiler.passes",
        "compiler.pipeline", "numpy", "targets",
    },
    "compiler.measure.gpu_forecast_report": {"compiler.measure", "rich", "targets"},
    "compiler.measure.forecast_report": {"compiler.measure", "rich", "targets"},
    "compiler.measure.profile_report": {"compiler.measure", "rich"},
    "compiler.measure.speed_report": {"compiler.measure", "rich"},
    "compiler.measure.shape_bundle": {
        "compiler.measure", "compiler.models", "compiler.pipeline", "compiler.progress", "targets",
    },
    "compiler.measure.bundle_cost": {
        "compiler.board", "compiler.codegen.elf", "compiler.measure", "runtime", "targets",
    },
    "compiler.measure.on_device": {
        "compiler.deploy", "compiler.measure", "compiler.progress", "rich", "runtime", "targets",
    },
    "compiler.report": {"jinja2"},
    "compiler.weights": {
        "compiler.codegen.weights_file", "compiler.graph.weights", "compiler.quant", "compiler.quantize", "numpy",
        "schedules.kernel",
    },
}


def module_name(path: Path, root: Path) -> str:
    """compiler/graph/__init__.py -> compiler.graph"""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, wherever it stands; relative ones resolved, submodules followed."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = path.parent.relative_to(root).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                below = root.joinpath(*base.split("."), alias.name)
                is_module = below.with_suffix(".py").is_file() or below.is_dir()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def within(module: str, name: str) -> bool:
    """True when `module` is `name` or lies below it."""
    return module == name or module.startswith(f"{name}.")


def breach(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None when it may."""
    if target.split(".")[0] in STDLIB:
        return None
    if module.startswith("compiler.") and within(target, "compiler.errors"):
        return None
    rule = max((name for name in LAW if within(module, name)), key=len)
    if rule == "compiler" and module != "compiler":
        return f"{module} has no line in LAW: a new part of the compiler states what it may import"
    allowed = LAW[rule] | {rule}
    if "*" in allowed or any(within(target, name) for name in allowed):
        return None
    return f"may not import {target}; {rule} may import {', '.join(sorted(LAW[rule])) or 'the standard library only'}"


def breaches(root: Path) -> list[str]:
    """All of them in the tree, as "file:line: why"."""
    found = []
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            for line, target in imported(path, root):
                if why := breach(module_name(path, root), target):
                    found.append(f"{path.relative_to(root)}:{line}: {why}")
    return found


def test_the_tree_keeps_the_law() -> None:
    assert breaches(REPO) == []


def test_every_layer_has_files() -> None:  # else the law would hold for want of anything to break it
    for layer in LAYERS:
        assert any((REPO / layer).rglob("*.py")), layer


@pytest.mark.parametrize(
    ("file", "code", "said"),
    [
        ("compiler/quant/formats/new.py", "import tvm", "may not import tvm; compiler.quant may import numpy"),
        ("compiler/quant/ir.py", "from ..checkpoint import config", "may not import compiler.checkpoint.config"),
        ("compiler/quant/ir.py", "def f():\n    import torch", "may not import torch"),
        ("compiler/quant/ir.py", "import importlib\nimportlib.import_module('torch')", "may not import torch"),
        ("compiler/models/llama.py", "from compiler.quant.formats import gptq", "not import compiler.quant.formats"),
        ("compiler/graph/linear.py", "from compiler.quant import packing", "may not import compiler.quant.packing"),
        ("compiler/passes/fuse.py", "import compiler.cli.build", "may not import compiler.cli.build"),
        ("compiler/drawer/misc.py", "import numpy", "compiler.drawer.misc has no line in LAW"),
        ("runtime/session.py", "from compiler.errors import UserError", "may not import compiler.errors"),
        ("runtime/session.py", "import tvm_ffi", "may not import tvm_ffi; runtime may import numpy"),
        ("runtime/sampler.py", "from . import vm\nimport tokenizers", "may not import tokenizers"),
        ("schedules/gemv.py", "from compiler.quant import ir", "may not import compiler.quant.ir"),
        ("targets/files.py", "import numpy", "may not import numpy; targets.files may import targets, tomli"),
        ("targets/native.py", "import tvm", "may not import tvm; targets may import the standard library only"),
    ],
)
def test_a_planted_breach_is_caught(tmp_path: Path, file: str, code: str, said: str) -> None:
    for known in ("compiler/checkpoint/config.py", "compiler/quant/packing.py", "compiler/quant/ir.py", file):
        (tmp_path / known).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / known).touch()
    (tmp_path / file).write_text(code)
    (found,) = breaches(tmp_path)
    assert found.startswith(f"{file}:")
    assert said in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("compiler/quant/ir.py", "import json\nimport numpy as np\nfrom compiler.errors import UserError"),
        ("compiler/quant/formats/gptq.py", "from ..ir import QuantWeight\nfrom compiler.quant import packing"),
        ("compiler/cli/build.py", "import rich\nfrom runtime import manifest\nfrom compiler import pipeline"),
        ("compiler/codegen/bundle.py", "from runtime.manifest import dump"),
        ("runtime/vm.py", "import tvm_ffi\nfrom .errors import UserError"),
        ("schedules/gemv.py", "import schedules\nfrom targets import Target\nimport tvm.script"),
    ],
)
def test_what_the_law_allows_passes(tmp_path: Path, file: str, code: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code)
    assert breaches(tmp_path) == []

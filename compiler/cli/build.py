"""Compile a checkpoint into a bundle for a target."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

DEFAULT_MODEL = Path(__file__).parents[2] / "tests" / "models" / "storyteller-5m-gptq-4bit-g128"

KV_CACHES = ("float16", "int8", "float32")


def positive(text: str) -> int:
    """An option's value that must be at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def gpu_size_argument(parser: argparse._ActionsContainer) -> None:
    """`--multiprocessors`, for verbs that compile; Target.sized takes it."""
    parser.add_argument(
        "--multiprocessors", type=positive, metavar="N",
        help="size of the GPU, where a target covers several: 16 for an AGX Orin (default: the target's; Orin Nano: 8)",
    )  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        metavar="MODEL",
        help="checkpoint folder, .gguf file, or Hugging Face model org/name[@revision] (default: the demo model)",
    )
    parser.add_argument(
        "--target", default="native", metavar="NAME", help="device to build for (default: this machine); see `targets`"
    )
    gpu_size_argument(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="BUNDLE", help="bundle folder to write; an older bundle is replaced"
    )
    parser.add_argument(
        "--activations",
        choices=("int8", "float16", "exact"),
        help="int8: fast; float16: fast on GPUs without dp4a, for GPUs only; exact: fp32 activations (default: int8, "
        "float16 for jetson-nano)",
    )
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), help="quantise dense linear layers to this, round to nearest"
    )
    parser.add_argument(
        "--group-size",
        type=positive,
        metavar="G",
        help="inputs that share a scale with --bits (default: 128, 64 or 32)",
    )
    parser.add_argument(
        "--head-bits", type=int, choices=(4, 8, 16), help="a dense output head: 16 keeps it (default: 8, exact: 16)"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="positions to keep (default: the model's, at most 4096)"
    )
    parser.add_argument(
        "--tuning-logs", type=Path, metavar="DIR", help="databases written by `tune` (default: the repository's)"
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        help="what keys and values of past tokens are kept in (default: float16, exact: float32)",
    )
    parser.add_argument(
        "--self-contained",
        action="store_true",
        help="carry the runtime and its libraries, 16 MB: the device needs Python 3.9 (Jetsons: 3.8) or later and "
        "nothing else, and starts the model with python3 BUNDLE/run PROMPT",
    )
    parser.add_argument(
        "--offline", action="store_true", help="download nothing: use what earlier builds left in the cache"
    )
    parser.add_argument("--dump-ir", type=Path, metavar="DIR", help="write every stage of the compile into DIR")
    parser.add_argument("--json", action="store_true", help="print one JSON object about the build to stdout")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(options: argparse.Namespace) -> int:
    """Build; the bundle is there, whole, when this returns 0."""
    import targets
    from compiler.codegen import bundle, nvrtc
    from compiler.progress import Reporter

    target = targets.load(options.target).sized(options.multiprocessors)
    bundle.check_target(target)
    bundle.check_place(options.out)  # before the compiler itself is loaded, which takes seconds
    _check_folders(options)
    if target.gpu is not None:
        nvrtc.require()
    report = Reporter(quiet=options.quiet or options.json)
    report.line(f"Building {options.out} for {target.name}")
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
    from compiler import pipeline
    from compiler.checkpoint import hub
    from compiler.tune import records

    request = pipeline.Request(
        out=options.out,
        target=target,
        activations=options.activations or pipeline.default_activations(target),
        bits=options.bits,
        group_size=options.group_size,
        head_bits=options.head_bits,
        context=options.context,
        kv_cache=options.kv_cache,
        dump_ir=options.dump_ir,
        tuning_logs=options.tuning_logs or records.DEFAULT_FOLDER,
        self_contained=options.self_contained,
        offline=options.offline,
    )
    made = pipeline.build(hub.resolve(options.model), request, report)
    if options.json:
        stages = [{"stage": s.title, "seconds": round(s.seconds, 3), "bytes": s.bytes} for s in report.stages]
        summary = {
            "bundle": str(options.out),
            "target": target.name,
            "model": made.model.name,
            "parameters": made.model.parameters,
            "quantization": made.quantization,
            "tuned_kernels": len(made.tuning),
            "modelled_kernels": sum(bool(tuned.modelled) for tuned in made.tuning.values()),
            "weights_bytes": made.memory.weights_bytes,
            "planned_peak_bytes": made.memory.planned_peak_bytes,
            "stages": stages,
        }
        print(json.dumps(summary))
    return 0


def _check_folders(options: argparse.Namespace) -> None:
    """Refuse folders that are none: nobody should believe that their kernels were tuned when a path had a typo."""
    from compiler.errors import UserError

    if options.tuning_logs is not None and not options.tuning_logs.is_dir():
        raise UserError(
            f"--tuning-logs {options.tuning_logs}: there is no such folder. Give the one that `tune --tuning-logs` "
            f"wrote, or leave it out."
        )
    if options.dump_ir is not None and options.dump_ir.exists() and not options.dump_ir.is_dir():
        raise UserError(f"--dump-ir {options.dump_ir}: is a file, but a folder is needed. Give another name.")

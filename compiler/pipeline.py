"""The whole compile, top to bottom: checkpoint folder in, bundle folder out. A newcomer starts here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from compiler import models
from compiler.checkpoint import Checkpoint, open_checkpoint
from compiler.codegen import bundle, carried, chat_format, link, nvrtc, tokenizer_files, weights_file
from compiler.codegen.build import compile_module
from compiler.codegen.cuda import device_code, library, tables
from compiler.errors import CheckpointError, ConfigError, UnsupportedError, UserError
from compiler.graph.weights import Linear, Table
from compiler.models import Model
from compiler.passes.fuse_quantize import FuseQuantize
from compiler.passes.fuse_residual import FuseResidual
from compiler.passes.half_activations import HalfActivations
from compiler.passes.lower_to_launches import lower_to_launches
from compiler.passes.lower_to_schedules import Decision, lower_to_schedules
from compiler.passes.quantize_activations import QuantizeActivations
from compiler.passes.verify import verify
from compiler.progress import Reporter
from compiler.quant.formats import open_source
from compiler.quant.grids import integer_grid
from compiler.quant.ir import WeightType
from compiler.quant.source import Source
from compiler.quantize import rtn
from compiler.tune import records
from compiler.weights import packed
from runtime import manifest
from schedules.kernel import Packing
from targets import Gpu, Target

LIBRARY, WEIGHTS = "model.so", "weights.bin"
DP4A_SM = 61  # the first architecture with dp4a: PTX ISA manual
# Prompt tokens a call; the runtime cuts a prompt into these. On a CPU they are the most that a call takes: kernels
# compute as many rows as there are. A GPU's launches have grids that never change.
CPU_CHUNKS, GPU_CHUNKS = (128,), (16, 128)


@dataclass(frozen=True)
class Request:
    """What `build` was asked for. bits: for dense linear layers; head_bits: for a dense output head, None = default.

    tuning_logs: folder of the databases that `tune` wrote; kernels without a record in it keep their defaults.
    kv_cache: element type of keys and values, None = default.
    chunks: prompt tokens of the functions for several, None = default.
    self_contained: carry the runtime and its libraries (codegen/carried.py); offline: without downloading them.
    """

    out: Path
    target: Target
    activations: str = "int8"
    bits: int | None = None
    group_size: int | None = None
    head_bits: int | None = None
    context: int | None = None
    kv_cache: str | None = None
    dump_ir: Path | None = None
    chunks: tuple[int, ...] | None = None
    tuning_logs: Path = records.DEFAULT_FOLDER
    self_contained: bool = False
    offline: bool = False

    @property
    def head(self) -> int:
        """Bits of a head that the checkpoint left dense: 8 with rounded activations, untouched on the exact path."""
        return self.head_bits or (16 if self.activations == "exact" else 8)

    @property
    def counted(self) -> bool:
        """Whether functions for several tokens compute as many rows as there are."""
        return self.target.gpu is None

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """Rows of each function for several tokens."""
        return self.chunks or (CPU_CHUNKS if self.target.gpu is None else GPU_CHUNKS)

    @property
    def cache(self) -> str:
        """Element type of keys and values: float16 with rounded activations, float32 on the exact path, or as asked."""
        return self.kv_cache or ("float32" if self.activations == "exact" else "float16")


def default_activations(target: Target) -> str:
    """What is fast and keeps a model's text: int8, or float16 on GPUs that cannot multiply bytes (before sm_61)."""
    return "float16" if target.gpu is not None and target.gpu.sm < DP4A_SM else "int8"


def refuse_half_without_gpu(request: Request) -> None:
    """Raise UnsupportedError for half precision on a CPU."""
    if request.activations == "float16" and request.target.gpu is None:
        raise UnsupportedError(
            f"{request.target.name}: --activations float16 is for targets with a GPU, and this one computes on its "
            f"CPU. Leave --activations out, or give int8 or exact."
        )


@dataclass(frozen=True)
class Code:
    """The compiled functions. packings: layouts of weights by name; link: writes the library to a path.

    tuned, tiled: as in passes.lower_to_schedules.Lowered.
    """

    packings: Mapping[str, Packing]
    activation_bytes: int
    link: Callable[[Path], None]
    tuned: Mapping[str, Decision] = field(default_factory=dict)
    tiled: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """Where a model comes from: a graph, its weights by checkpoint module, and tokenizer files if there are any."""

    name: str
    format: str
    model: Model
    source: Source
    tokenizer: Mapping[str, bytes] | None
    path: Path = Path()


def build(model_dir: Path, request: Request, report: Reporter) -> manifest.Manifest:
    """Compile the checkpoint in `model_dir`. Raises UserError; then nothing is left at or beside `request.out`."""
    bundle.check_place(request.out)
    refuse_half_without_gpu(request)
    with report.stage("import") as stage:
        inputs = import_checkpoint(model_dir, request)
        stage.note = (
            f"{inputs.name}: {inputs.format}, {inputs.model.type}, {inputs.model.parameters / 1e6:.1f} M parameters"
        )
        if inputs.model.left_out:
            stage.note += f" (without {', '.join(part.rstrip('.') for part in inputs.model.left_out)})"
    return compile_inputs(inputs, request, report)


def import_checkpoint(model_dir: Path, request: Request) -> Inputs:
    """Headers, configuration and graph; weights are read later, one at a time."""
    checkpoint = open_checkpoint(model_dir, models.gguf_architectures())
    source = open_source(checkpoint)
    model = models.build(checkpoint.config, source.describe, model_options(request))
    refuse_other_biases(model, source)
    _refuse_unused(checkpoint, source, model)
    _refuse_idle_options(checkpoint, source, model, request)
    tokenizer = checkpoint.tokenizer_files()
    tokenizer_files.check(tokenizer, model.vocab_size, checkpoint.path)
    quantization = checkpoint.config.data.get("quantization_config") or {}
    kind = str(quantization.get("quant_method", "dense"))
    model = replace(model, eos=_end_tokens(checkpoint, model))
    return Inputs(checkpoint.name, kind, model, source, tokenizer, checkpoint.path)


def _refuse_unused(checkpoint: Checkpoint, source: Source, model: Model) -> None:
    """A matrix that the graph leaves out, say of a layer that config.json does not count, means another model."""
    used = {module for weight in model.weights if isinstance(weight, Linear) for module in weight.sources}
    used |= {weight.source for weight in model.weights if isinstance(weight, Table)}
    if "lm_head" not in used:
        used.add("lm_head")  # some writers store a tied head, too
    others = (module for module in source.modules() if not module.startswith(model.left_out))
    if unused := [module for module in others if module not in used]:
        raise ConfigError(
            f"{checkpoint.path}: has the matrix {unused[0]!r} ({len(unused)} such in all), which the model that "
            f"config.json describes does not use. The configuration belongs to another checkpoint, or was edited."
        )


def _refuse_idle_options(checkpoint: Checkpoint, source: Source, model: Model, request: Request) -> None:
    """Nobody should believe that they got 4 bits, or groups of 32, when the option had nothing to act on."""
    if request.group_size is not None and request.bits is None:
        raise UnsupportedError("--group-size belongs to --bits, which is missing. Give both, or neither.")
    layers = [w.sources[0] for w in model.weights if isinstance(w, Linear) and w.name != "head"]
    if request.bits is not None and not any(source.describe(module).dense for module in layers):
        raise UnsupportedError(
            f"{checkpoint.path}: is quantised already, and --bits applies to dense linear layers. Leave --bits out."
        )
    heads = [source.describe(w.sources[0]) for w in model.weights if isinstance(w, Linear) and w.name == "head"]
    if request.head_bits is not None and not any(head.dense or head.bits == request.head_bits for head in heads):
        raise UnsupportedError(
            f"{checkpoint.path}: its output head has {heads[0].bits} bits already, and --head-bits applies to a dense "
            f"one. Leave --head-bits out."
        )


def _end_tokens(checkpoint: Checkpoint, model: Model) -> tuple[int, ...]:
    """Those of config.json and of generation_config.json, where chat models name the end of a turn."""
    generation = checkpoint.optional_json("generation_config.json")
    more = () if generation is None else generation.integers("eos_token_id", 0, model.vocab_size - 1, default=())
    return tuple(dict.fromkeys((*model.eos, *more)))


def model_options(request: Request) -> models.Options:
    """What the request means for the graph."""

    def quantised(bits: int | None, group_size: int | None, weight: WeightType) -> WeightType:
        if not weight.dense or bits not in rtn.BITS:
            return weight
        size = min(group_size or rtn.default_group_size(weight.k), weight.k)
        return replace(weight, grid=integer_grid(bits).name, group_size=size, symmetric=True)

    return models.Options(
        context=request.context,
        chunks=request.prompt_tokens,
        cache_dtype=request.cache,
        linear=lambda weight: quantised(request.bits, request.group_size, weight),
        head=lambda weight: quantised(request.head, None, weight),
    )


def refuse_other_biases(model: Model, source: Source) -> None:
    """Raise unless linear layers have biases where the graph adds them, and elsewhere none but zeros.

    No writer that we know leaves out a bias because it is zero; auto-gptq adds zeros to layers that have none.
    """
    for weight in (weight for weight in model.weights if isinstance(weight, Linear)):
        for module in weight.sources:
            bias = source.bias(module)
            if weight.bias and bias is None:
                raise CheckpointError(
                    f"{module} has no bias, but with this config.json {model.type} adds one there. The checkpoint "
                    f"belongs to another architecture, or attention_bias or mlp_bias is wrong."
                )
            if not weight.bias and bias is not None and bias.any():
                raise UnsupportedError(
                    f"{module} has a bias that is not zero, but with this config.json {model.type} has none there. "
                    f"The checkpoint belongs to another architecture, or attention_bias or mlp_bias is missing."
                )


def compile_inputs(inputs: Inputs, request: Request, report: Reporter) -> manifest.Manifest:
    """Graph to bundle: fuse, schedule, generate code, link, pack weights, seal."""
    model, target = inputs.model, request.target
    bundle.check_target(target)
    # First what may be refused or fail: a compile is long.
    chat, note = (None, "") if inputs.tokenizer is None else chat_format.derive(inputs.tokenizer, inputs.path)
    libraries = None
    if request.self_contained:
        with report.stage("carry") as stage:
            libraries = carried.fetch(target.arch, request.offline, tvm=target.gpu is None)
            stage.bytes = sum(map(len, libraries.values()))
    with report.stage("fuse"):
        mod = fuse(model.graph.module(), request)
    code = _for_cpu(mod, request, report) if target.gpu is None else _for_gpu(mod, target.gpu, request, report)
    # No layout stores codes narrower than they are.
    room = sum(w.type.n * w.type.k * w.type.bits // 8 for w in model.weights if isinstance(w, (Linear, Table)))
    room += link.ROOM_BYTES + sum(map(len, (libraries or {}).values()))
    with bundle.staged(request.out, room) as folder:
        with report.stage("link") as stage:
            code.link(folder / LIBRARY)
            stage.bytes = (folder / LIBRARY).stat().st_size
            stage.note = f"{target.zig_triple}"
        with report.stage("pack") as stage:
            stage.total(len(model.weights))
            pieces = packed(model.weights, inputs.source, code.packings, stage.advance)
            alignment = weights_file.ALIGNMENT if target.gpu is None else weights_file.GPU_ALIGNMENT
            weights, digest = weights_file.write(folder / WEIGHTS, pieces, alignment)
            stage.bytes = digest.bytes
        with report.stage("seal") as stage:
            if inputs.tokenizer is not None:
                tokenizer_files.copy(inputs.tokenizer, folder)
            if libraries is not None:
                carried.write(libraries, folder)
            digests = bundle.digests(folder, {WEIGHTS: digest})
            made = _manifest(inputs, request, code, weights, chat, digests)
            manifest.dump(made, folder / manifest.FILE_NAME)
            stage.note = note
    report.line(f"{request.out}: needs {made.memory.planned_peak_bytes / (1 << 20):.1f} MiB to run")
    return made


def _for_cpu(mod: tvm.IRModule, request: Request, report: Reporter) -> Code:
    """@fused to a Relax virtual machine with scheduled kernels."""
    target = request.target
    with report.stage("schedule") as stage:
        tuned = records.Tuned.of(request.tuning_logs, target)
        lowered = lower_to_schedules(mod, target, tuned)
        _checked(lowered.mod, "scheduled", request)
        kernels = sum(isinstance(f, tvm.tirx.PrimFunc) for _, f in lowered.mod.functions_items())
        stage.note = f"{kernels} kernels for {target.name} ({target.mcpu}), {len(lowered.tuned)} of them tuned"
        if modelled := sum(decision.modelled for decision in lowered.tuned.values()):
            stage.note += f", {modelled} by a model's cycles and not by measuring"
    _report_misfits(tuned, report)
    with report.stage("codegen"):
        compiled = compile_module(lowered.mod, target)
        _dump(request.dump_ir, "4_code.s", lambda: compiled.executable.mod.imports[0].inspect_source("asm"))
    export = partial(link.export, compiled.executable, target=target)
    return Code(lowered.packings, compiled.activation_bytes, export, lowered.tuned, lowered.tiled)


def _for_gpu(mod: tvm.IRModule, gpu: Gpu, request: Request, report: Reporter) -> Code:
    """@fused to lists of launches, device code, and the C runtime that walks them."""
    target = request.target
    with report.stage("schedule") as stage:
        tuned = records.Tuned.of(request.tuning_logs, target)
        launches = lower_to_launches(mod, target, tuned)
        _dump(request.dump_ir, "3_launches.txt", launches.script)
        decode = next(len(f.steps) for f in launches.functions if f.name == "decode")
        stage.note = f"{len(launches.kernels)} kernels for {target.name} ({gpu.arch}), {decode} launches a token"
        stage.note += f", {len(launches.tuned)} tuned" if launches.tuned else ""
    _report_misfits(tuned, report)
    if devices := tuned.devices():
        report.line(devices)
    with report.stage("codegen") as stage:
        source = device_code.unit(launches.kernels.values())
        _dump(request.dump_ir, "4_code.cu", lambda: source)
        compiled = nvrtc.compile(source, gpu)
        _dump(request.dump_ir, "4_code.ptx", compiled.ptx.decode)
        stage.bytes = len(compiled.ptx) + len(compiled.cubin or b"")
        stage.note = f"PTX {gpu.ptx}" + (f" and machine code for {gpu.arch}" if compiled.cubin else "")
    if spilled := device_code.spills(compiled):
        report.line(spilled)
    text = tables.source(launches, compiled, gpu)
    link_ = partial(library.build, text, target=target)
    return Code(launches.packings, launches.arena_bytes, link_, launches.tuned)


def _report_misfits(tuned: records.Tuned, report: Reporter) -> None:
    for why, count in tuned.misfits.items():
        report.line(f"{tuned.database.path}: {count} records do not fit any more and were passed over: {why}")


def manifest_target(target: Target) -> manifest.Target:
    """What the device must have. Where a GPU computes, the host code runs on any CPU of the architecture."""
    here = (target.name, target.arch, target.triple, target.mcpu)
    if target.gpu is None:
        return manifest.Target(*here, target.plain.cpuinfo, target.glibc)
    major, minor = divmod(tables.driver_version(target.gpu), 1000)
    gpu = manifest.Gpu(target.gpu.arch, target.gpu.ptx, target.gpu.cubin, f"{major}.{minor // 10}")
    return manifest.Target(*here, (), target.glibc, gpu)


def fuse(mod: tvm.IRModule, request: Request) -> tvm.IRModule:
    """@graph to @fused: activation quantisation as asked for, then every fusion."""
    _checked(mod, "graph", request)
    passes: dict[str, list[Any]] = {
        "exact": [],
        "int8": [QuantizeActivations(), FuseQuantize()],
        "float16": [HalfActivations()],
    }
    for rewrite in [*passes[request.activations], FuseResidual()]:
        mod = rewrite(mod)
        verify(mod, "fused")
    _checked(mod, "fused", request)
    return mod


def _checked(mod: tvm.IRModule, stage: str, request: Request) -> None:
    verify(mod, stage)
    number = {"graph": 1, "fused": 2, "scheduled": 3}[stage]
    _dump(request.dump_ir, f"{number}_{stage}.py", mod.script)


def _dump(folder: Path | None, name: str, text: Any) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / name).write_text(text(), encoding="utf-8")
        except OSError as error:
            with suppress(OSError):  # of half a stage
                (folder / name).unlink()
            raise UserError(f"--dump-ir: {folder / name}: cannot be written: {error.strerror}.") from None


def _manifest(
    inputs: Inputs,
    request: Request,
    code: Code,
    weights: manifest.Weights,
    chat: manifest.ChatFormat | None,
    files: dict[str, manifest.FileDigest],
) -> manifest.Manifest:
    model, target = inputs.model, request.target
    caches = []
    for i, cache in enumerate(model.caches):
        caches += [manifest.Cache(f"layers.{i}.{array.name}", array.dtype, array.shape) for array in cache.arrays]
    cache_bytes = sum(int(np.prod(c.shape)) * np.dtype(c.dtype).itemsize for c in caches)
    weight_bytes = files[WEIGHTS].bytes
    linears = [w.type for w in model.weights if isinstance(w, Linear)]
    return manifest.Manifest(
        model=manifest.Model(
            model.type, inputs.name, model.vocab_size, model.context, len(model.caches), model.parameters
        ),
        quantization={
            "format": inputs.format,
            "bits": linears[0].bits,
            "group_size": linears[0].group_size,
            "activations": request.activations,
            "checkpoint_activations": None if linears[0].activations == "any" else linears[0].activations,
            "head_bits": linears[-1].bits,
            "kv_cache": model.caches[0].dtype if model.caches else None,
        },
        target=manifest_target(target),
        tvm=manifest.TvmVersions(version("apache-tvm"), version("apache-tvm-ffi")),
        tuning={
            name: manifest.TunedKernel(d.record, dict(d.knobs), d.modelled or None)
            for name, d in sorted(code.tuned.items())
        },
        library=LIBRARY,
        functions={
            f.name: manifest.Function(
                f.tokens,
                f.inputs,
                manifest.TensorType("float32", f.shape),
                code.tiled.get(f.name),
                (request.counted and f.tokens > 1) or None,
            )
            for f in model.graph.functions
        },
        caches=tuple(caches),
        weights=weights,
        memory=manifest.Memory(
            weight_bytes, cache_bytes, code.activation_bytes, weight_bytes + cache_bytes + code.activation_bytes
        ),
        tokens=manifest.Tokens(model.bos, model.eos),
        chat=chat,
        files=files,
    )

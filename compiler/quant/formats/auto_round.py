"""auto-round's own checkpoints: a packing of GPTQ or AWQ, and its own way to name the modules that differ.

packing_format                              tensors
auto_round:auto_gptq                        GPTQ v1, zeros stored minus one in each field, no g_idx
auto_round, auto_round:gptqmodel            the same with zeros stored as they are (GPTQ v2)
auto_round:auto_awq                         AWQ, gemm layout
extra_config maps a module's name, or a regular expression found anywhere in it, to settings; more than 8 bits = dense.

Embeddings and head may be bfloat16 although config.json says float16: the tensors are what counts.
Method: arXiv:2309.05516. Packings as auto-round 0.16 reads and writes them.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compiler.errors import FormatError, UnsupportedError
from compiler.quant.formats.awq import AwqConfig, AwqSource
from compiler.quant.formats.gptq import GptqConfig, GptqSource
from compiler.quant.patterns import Rules
from compiler.quant.source import CheckpointView, ConfigView, Source

NAME = "auto-round"
METHODS = ("auto-round", "auto_round", "intel/auto-round")
PACKINGS = {
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2", "auto_round:auto_awq": "awq", "auto_round:awq": "awq",
}
BITS = (2, 3, 4, 8)
DENSE_ABOVE = 8  # bits: modules with more are not quantised
MAX_GROUP_SIZE = 1 << 20
# How it was quantised, or how a library likes to run it. Which modules are quantised, the tensors themselves say.
HARMLESS = frozenset({
    "autoround_version", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "batch_size", "dataset", "amp", "tokenizer",
    "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning", "gradient_accumulate_steps",
    "low_gpu_mem_usage", "low_cpu_mem_usage", "block_name_to_quantize", "to_quant_block_names", "quant_block_list",
    "scale_dtype", "backend", "provider", "quant_lm_head", "lm_head", "modules_in_block_to_quantize", "enable_alg_ext",
    "not_use_best_mse", "dynamic_max_gap", "lr_scheduler", "sampler", "model_free", "disable_opt_rtn",
    "desc_act", "true_sequential", "damp_percent", "enable_opt_rtn", "momentum", "enable_deterministic_algorithms",
    "enable_torch_compile", "fp_layers", "ignore_layers",
})


@dataclass(frozen=True)
class Settings:
    """What auto-round says of a module, whatever the packing."""

    bits: int
    group_size: int
    sym: bool


def claims(config: dict[str, Any]) -> bool:
    """quant_method says so, in one of its spellings."""
    return (config.get("quantization_config") or {}).get("quant_method") in METHODS


def open(checkpoint: CheckpointView) -> Source:  # noqa: A001 - what every format calls it
    """Read the quantisation configuration; no tensor is touched."""
    config = checkpoint.config.quantization
    assert config is not None, "claims() saw one"
    config.string("quant_method", METHODS)
    packing = PACKINGS[config.string("packing_format", tuple(PACKINGS))]
    common = _settings(config)
    if common is None:
        raise FormatError(f"{config.where('bits')} is more than {DENSE_ABOVE}, so nothing is quantised. "
                          f"Remove quantization_config if the weights are dense.")
    extra: list[tuple[str, Settings | None, str]] = []
    if config.has("extra_config"):
        section = config.section("extra_config")
        extra = [(key, _settings(section.section(key), common), section.where(key)) for key in section.names()]
    config.refuse_unhandled(HARMLESS)
    if packing == "awq":
        awq_rules = Rules[AwqConfig | None]()
        for key, own, where in extra:
            _rule(awq_rules, checkpoint, key, None if own is None else _awq(own, where), where)
        return AwqSource(checkpoint, _awq(common, config.where("bits")), awq_rules)
    version = 2 if packing == "gptq_v2" else 1
    rules = Rules[GptqConfig | None]()
    for key, own, where in extra:
        _rule(rules, checkpoint, key, None if own is None else _gptq(own, version), where)
    return GptqSource(checkpoint, _gptq(common, version), rules)


def _gptq(settings: Settings, version: int) -> GptqConfig:
    return GptqConfig(settings.bits, settings.group_size, settings.sym, version)


def _awq(settings: Settings, where: str) -> AwqConfig:
    if settings.bits != 4:
        raise UnsupportedError(f"{where}: {settings.bits} bits, but AWQ's gemm layout has 4. Take the model so.")
    return AwqConfig(settings.group_size, settings.sym)


def _rule(rules: Rules[Any], checkpoint: CheckpointView, key: str, value: Any, where: str) -> None:
    """A module's own name is only that; any other key is a regular expression, found anywhere in a name."""
    if any(f"{key}.{part}" in checkpoint.tensors for part in ("weight", "qweight")):
        rules.name(key, value)
    else:
        rules.expression(key, value, where, anywhere=True)


def _settings(config: ConfigView, common: Settings | None = None) -> Settings | None:
    """bits, group_size and sym, those of `common` where they are absent; None for a module that stays dense."""
    bits = config.integer("bits", 1, 32, *([] if common is None else [common.bits]))
    if config.integer("act_bits", 1, 32, 16) <= DENSE_ABOVE:
        raise UnsupportedError(f"{config.where('act_bits')} is at most {DENSE_ABOVE}: weights packed for quantised "
                               f"activations are not supported. Take the model with quantised weights only.")
    config.accept("act_group_size", "act_sym", "act_data_type", "act_dynamic")  # of activations that stay as they are
    if bits > DENSE_ABOVE:
        config.accept("data_type", "group_size", "sym")
        return None
    if bits not in BITS:
        raise UnsupportedError(f"{config.where('bits')} is {bits}, but quern decodes auto-round with "
                               f"{', '.join(map(str, BITS))} bits. Take the model with one of these.")
    config.string("data_type", ["int"], "int")
    size = config.integer("group_size", -1, MAX_GROUP_SIZE, *([] if common is None else [common.group_size]))
    if size == 0:
        raise FormatError(f"{config.where('group_size')} is 0, but it must be -1 (one group a row) or at least 1.")
    return Settings(bits, size, config.boolean("sym", True if common is None else common.sym))

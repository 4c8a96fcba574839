"""Architectures: one file each, named as config.json's `model_type` names it.

A file has `build(config, describe, options) -> Model`: it reads the configuration, checks every tensor's shape from
headers alone, and writes the graph. It knows checkpoint module names; it knows no quantisation format and no target.
GGUF, if it has one, says how such a model looks in a GGUF file.
What several share lies in the folder decoder/.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from compiler.checkpoint.config import Config
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.errors import ConfigError, UnsupportedError
from compiler.graph.build import Graph
from compiler.graph.kv_cache import KvCache
from compiler.graph.weights import Weight
from compiler.quant.ir import WeightType

# What the config.json of some published models says of parts that their architecture does not have.
NEUTRAL = {
    "is_encoder_decoder": False, "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "qkv_bias": False,
    "rope_interleaved": False, "use_mrope": False, "full_attn_mod": 1, "interpolate_factor": 1,
}  # fmt: skip
Describe = Callable[[str], WeightType]  # checkpoint module -> shape and kind; raises UserError when there is none


@dataclass(frozen=True)
class Options:
    """What a build decides about a model: positions to keep, prompt chunk sizes, the cache's element type.

    linear and head: from a weight's kind in the checkpoint to its kind in the bundle (dense weights may be quantised on
    the way in; quantised ones stay as they are).
    """

    context: int | None
    chunks: tuple[int, ...]
    cache_dtype: str
    linear: Callable[[WeightType], WeightType]
    head: Callable[[WeightType], WeightType]


@dataclass(frozen=True)
class Model:
    """A finished graph and everything it needs. `caches` holds one geometry a layer.

    left_out: beginnings of checkpoint modules that the graph does not use, and that belong there all the same.
    """

    type: str
    graph: Graph
    weights: tuple[Weight, ...]
    caches: tuple[KvCache, ...]
    context: int
    vocab_size: int
    bos: int | None
    eos: tuple[int, ...]
    parameters: int
    left_out: tuple[str, ...] = ()


def known() -> list[str]:
    """Every model_type that has a file here."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg)


def gguf_architectures() -> dict[str, Architecture]:
    """What the files here say of GGUF, by general.architecture."""
    files = (importlib.import_module(f"compiler.models.{name}") for name in known())
    return {file.GGUF.name: file.GGUF for file in files if hasattr(file, "GGUF")}


def build(config: Config, describe: Describe, options: Options) -> Model:
    """The graph of the model that config.json describes. Raises UserError."""
    model_type = config.string("model_type")
    if model_type not in known():
        raise UnsupportedError(
            f"{config.where('model_type')} is {model_type!r}, but quern knows {', '.join(known())}. "
            f"docs/adding.md shows how to add an architecture: it is one file."
        )
    config.neutral(**NEUTRAL)
    model: Model = importlib.import_module(f"compiler.models.{model_type}").build(config, describe, options)
    config.refuse_unhandled()
    return model


def expect(describe: Describe, module: str, n: int, k: int, config: Config, keys: str) -> WeightType:
    """The type of `module`, which must be [n, k] if config.json tells the truth. Raises ConfigError."""
    got = describe(module)
    if (got.n, got.k) != (n, k):
        raise ConfigError(
            f"{config.where(keys.split(',')[0])}: with {keys} as config.json states them, {module} must be [{n}, {k}], "
            f"but the checkpoint's is [{got.n}, {got.k}]. "
            f"The configuration belongs to another checkpoint, or was edited."
        )
    return got

"""Rotary embedding as config.json states it, in any of its spellings.

transformers 4 writes rope_theta and rope_scaling = null | {"rope_type" or "type": ..., ...}; transformers 5 writes both
into rope_parameters. A kind of scaling that is not written here is refused by its name, and so is every key of a
section that its kind does not know.

  linear, llama3, yarn   compiler/graph/rope.py
  dynamic    changes nothing up to max_position_embeddings, which --context cannot pass
  longrope   one set of divisors up to the context that the model was first trained with, another beyond. transformers
             chooses anew for every text. Here --context chooses, once: bundles that end within the first context use
             the short set, longer ones the long set (as vLLM and llama.cpp do), for short texts too.
"""

from __future__ import annotations

import math

from compiler.checkpoint.config import Config
from compiler.errors import ConfigError, UnsupportedError
from compiler.graph import rope
from compiler.graph.rope import Rotation
from compiler.models import Options
from compiler.models.decoder.settings import MOST_POSITIONS, Shape, kept_context

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
LONG = ("longrope", "su")  # one thing under two names
MOST_THETA, MOST_FACTOR = 1e12, 1e6
ORIGINAL = "original_max_position_embeddings"


def read_rotation(
    config: Config,
    shape: Shape,
    options: Options,
    *,
    kinds: tuple[str, ...] = KINDS,
    partial: bool = False,
    trained: int | None = None,
    theta: float = 10000.0,
) -> Rotation:
    """The rotation of every layer. partial: heads may rotate in part. trained: positions the model was first trained
    with, where config.json says so outside of the section. theta: what an absent rope_theta means.

    Raises UnsupportedError for a scaling that is not in `kinds`.
    """
    section = next((key for key in ("rope_parameters", "rope_scaling") if config.has(key)), None)
    theta = config.number("rope_theta", 1.0, MOST_THETA, default=theta)
    share = _share(config, 1.0, partial)
    if section is None:
        config.accept("rope_parameters", "rope_scaling")
        return Rotation(rope.inverse_frequencies(_width(shape, share), theta))
    values = config.section(section)
    width = _width(shape, _share(values, share, partial))
    context = kept_context(config, shape, options)
    return read_section(values, width, theta, kinds=kinds, context=context, shape=shape, trained=trained)


def read_section(
    values: Config,
    width: int,
    theta: float,
    *,
    kinds: tuple[str, ...],
    context: int,
    shape: Shape,
    trained: int | None = None,
) -> Rotation:
    """What one section says of heads whose first `width` elements rotate; theta is what an absent rope_theta means."""
    theta = values.number("rope_theta", 1.0, MOST_THETA, default=theta)
    frequencies = rope.inverse_frequencies(width, theta)
    key = "rope_type" if values.has("rope_type") else "type"
    kind = values.string(key, default="default")
    values.accept("type", "rope_type")
    if kind not in kinds:
        raise UnsupportedError(f"{values.where(key)} is {kind[:80]!r}, but quern knows {', '.join(map(repr, kinds))}.")
    if kind == "linear":
        return Rotation(rope.scaled_linearly(frequencies, values.number("factor", 1.0, MOST_FACTOR)))
    if kind == "dynamic":
        values.number("factor", 1.0, MOST_FACTOR)
    if kind == "llama3":
        return Rotation(_llama3(values).apply(frequencies))
    if kind == "yarn":
        yarn = _yarn(values, shape.positions)
        return Rotation(
            yarn.apply(frequencies, theta), values.number("attention_factor", 0.0, MOST_FACTOR, default=yarn.attention)
        )
    return _longrope(values, frequencies, context, shape, trained) if kind in LONG else Rotation(frequencies)


def _share(values: Config, default: float, partial: bool) -> float:
    """Which part of a head rotates."""
    share = values.number("partial_rotary_factor", 0.0, 1.0, default=default)
    if share != 1 and not partial:
        raise UnsupportedError(
            f"{values.where('partial_rotary_factor')} is {share:g}, but this architecture rotates whole heads (1.0)."
        )
    return share


def _width(shape: Shape, share: float) -> int:
    """Elements of a head that rotate, an even number as transformers rounds it."""
    return max(2, int(shape.head_dim * share) // 2 * 2)


def _llama3(values: Config) -> rope.Llama3:
    low, high = values.number("low_freq_factor", 1e-6, 1e6), values.number("high_freq_factor", 1e-6, 1e6)
    if low >= high:
        raise ConfigError(
            f"{values.where('low_freq_factor')} is {low:g}, but it must be below high_freq_factor, {high:g}."
        )
    context = values.integer(ORIGINAL, 1, MOST_POSITIONS)
    return rope.Llama3(values.number("factor", 1.0, MOST_FACTOR), low, high, context)


def _yarn(values: Config, positions: int) -> rope.Yarn:
    return rope.Yarn(
        values.number("factor", 1.0, MOST_FACTOR),
        fast=values.number("beta_fast", 1e-6, 1e6, default=32.0),
        slow=values.number("beta_slow", 1e-6, 1e6, default=1.0),
        context=values.integer(ORIGINAL, 1, MOST_POSITIONS, default=positions),
        whole=values.boolean("truncate", default=True),
    )


def _longrope(
    values: Config, frequencies: rope.Frequencies, context: int, shape: Shape, trained: int | None
) -> Rotation:
    """The set of divisors that the bundle's context asks for."""
    first = values.integer(ORIGINAL, 1, MOST_POSITIONS, default=trained or shape.positions)
    if trained not in (None, first):
        raise ConfigError(
            f"{values.where(ORIGINAL)} is {first}, but outside of this section it is {trained}. Make them agree."
        )
    short, long = (
        values.numbers(key, 1e-6, MOST_FACTOR, len(frequencies)) for key in ("short_factor", "long_factor")
    )
    stretch = values.number("factor", 1e-6, MOST_FACTOR, default=shape.positions / first)
    usual = math.sqrt(1 + math.log(stretch) / math.log(first)) if stretch > 1 and first > 1 else 1.0
    factor = values.number("attention_factor", 0.0, MOST_FACTOR, default=usual)
    return Rotation(rope.stretched(frequencies, long if context > first else short), factor)

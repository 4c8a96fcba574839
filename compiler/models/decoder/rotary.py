"""Rotary frequencies as config.json states them, in any of its spellings.

transformers 4 writes rope_theta and rope_scaling = null | {"rope_type" or "type": ..., ...}; transformers 5 writes both
into rope_parameters. A kind of scaling that is not written here is refused by its name, and so is every key of a
section that its kind does not know.
"""

from __future__ import annotations

from compiler.checkpoint.config import Config
from compiler.errors import ConfigError, UnsupportedError
from compiler.graph import rope

KINDS = ("default", "linear", "llama3")


def read_frequencies(config: Config, head_dim: int, kinds: tuple[str, ...] = KINDS) -> rope.Frequencies:
    """f32[head_dim / 2]: radians a position. Raises UnsupportedError for a scaling that is not in `kinds`."""
    section = next((key for key in ("rope_parameters", "rope_scaling") if config.has(key)), None)
    theta = config.number("rope_theta", 1.0, 1e12, default=10000.0)
    _refuse_partial(config)
    if section is None:
        config.accept("rope_parameters", "rope_scaling")
        return rope.inverse_frequencies(head_dim, theta)
    values = config.section(section)
    _refuse_partial(values)
    frequencies = rope.inverse_frequencies(head_dim, values.number("rope_theta", 1.0, 1e12, default=theta))
    key = "rope_type" if values.has("rope_type") else "type"
    kind = values.string(key, default="default")
    values.accept("type", "rope_type")
    if kind not in kinds:
        raise UnsupportedError(f"{values.where(key)} is {kind[:80]!r}, but quern knows {', '.join(map(repr, kinds))}.")
    if kind == "linear":
        return rope.scaled_linearly(frequencies, values.number("factor", 1.0, 1e6))
    return _llama3(values).apply(frequencies) if kind == "llama3" else frequencies


def _refuse_partial(values: Config) -> None:
    """A head that is rotated in part."""
    if values.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1:
        raise UnsupportedError(
            f"{values.where('partial_rotary_factor')} is {values.data['partial_rotary_factor']}, "
            f"but quern rotates whole heads only (1.0)."
        )


def _llama3(values: Config) -> rope.Llama3:
    low, high = values.number("low_freq_factor", 1e-6, 1e6), values.number("high_freq_factor", 1e-6, 1e6)
    if low >= high:
        raise ConfigError(
            f"{values.where('low_freq_factor')} is {low:g}, but it must be below high_freq_factor, {high:g}."
        )
    context = values.integer("original_max_position_embeddings", 1, 1 << 24)
    return rope.Llama3(values.number("factor", 1.0, 1e6), low, high, context)

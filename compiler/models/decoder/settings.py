"""Keys of config.json that all decoder-only transformers have, typed and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compiler.checkpoint.config import Config
from compiler.errors import ConfigError, UnsupportedError
from compiler.models import Options

MOST = 1 << 20  # upper bound of any width in config.json
MOST_POSITIONS = 1 << 24
DEFAULT_CONTEXT = 4096  # positions kept when the model allows more and --context does not ask
SLIDING, FULL = "sliding_attention", "full_attention"  # how transformers names kinds of layers


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json that every graph needs."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    tied: bool
    positions: int
    bos: int | None
    eos: tuple[int, ...]

    @property
    def q_width(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim


def read_shape(config: Config, *, head_dim: int | None = None, eps: float = 1e-6, tied: bool = False) -> Shape:
    """The shape. head_dim, eps and tied are what an absent key means; head_dim None: hidden_size / heads.

    Raises ConfigError for values that cannot be.
    """
    hidden = config.integer("hidden_size", 1, MOST)
    heads = config.integer("num_attention_heads", 1, 4096)
    kv_heads = config.integer("num_key_value_heads", 1, 4096, default=heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{config.where('num_key_value_heads')} is {kv_heads}, but it must divide num_attention_heads, {heads}."
        )
    if head_dim is None and not config.has("head_dim") and hidden % heads:
        raise ConfigError(
            f"{config.where('num_attention_heads')} is {heads}, but it must divide hidden_size, {hidden}."
        )
    width = config.integer("head_dim", 2, 4096, default=head_dim or max(hidden // heads, 2))
    if width % 2:
        raise ConfigError(f"{config.where('head_dim')} is {width}, but rotary embedding needs an even number.")
    vocab = config.integer("vocab_size", 1, 1 << 22)
    bos = config.integer("bos_token_id", 0, vocab - 1) if config.has("bos_token_id") else None
    config.accept("pad_token_id", "bos_token_id")
    return Shape(
        hidden=hidden,
        ffn=config.integer("intermediate_size", 1, MOST),
        layers=config.integer("num_hidden_layers", 1, 1024),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        vocab=vocab,
        eps=config.number("rms_norm_eps", 0.0, 1.0, default=eps),
        tied=config.boolean("tie_word_embeddings", default=tied),
        positions=config.integer("max_position_embeddings", 1, MOST_POSITIONS),
        bos=bos,
        eos=config.integers("eos_token_id", 0, vocab - 1, default=()),
    )


def kept_context(config: Config, shape: Shape, options: Options) -> int:
    """Positions to keep."""
    if not options.context:
        return min(shape.positions, DEFAULT_CONTEXT)
    if options.context > shape.positions:
        raise ConfigError(
            f"--context asks for {options.context} positions, but {config.where('max_position_embeddings')} "
            f"is {shape.positions}. Ask for at most that."
        )
    return options.context


def read_windows(
    config: Config, layers: int, sliding: Callable[[int], bool] = lambda _: True, used: bool = True, absent: int = 0
) -> tuple[int, ...]:
    """How many positions each layer sees, 0 for all: sliding_window, in the layers that layer_types names.

    sliding(layer) decides where there is no layer_types. used=False: a sliding_window that stands there says nothing.
    absent: what a missing key means, in all layers' positions; null is no window.
    """
    window = 0 if "sliding_window" in config.data or not used else absent
    if used and config.has("sliding_window"):
        window = config.integer("sliding_window", 1, MOST_POSITIONS)
    config.accept("sliding_window")
    if not config.has("layer_types"):
        config.accept("layer_types")
        return tuple(window if sliding(i) else 0 for i in range(layers))
    kinds, where = config.strings("layer_types"), config.where("layer_types")
    if len(kinds) != layers:
        raise ConfigError(f"{where} names {len(kinds)} layers, but num_hidden_layers is {layers}.")
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise UnsupportedError(f"{where} has {kind[:80]!r}, but quern knows {SLIDING!r} and {FULL!r}.")
    if SLIDING in kinds and not window:
        raise ConfigError(f"{where} has {SLIDING!r}, but no sliding_window is in use, and those layers need one.")
    return tuple(window if kind == SLIDING else 0 for kind in kinds)

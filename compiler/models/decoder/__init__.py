"""What decoder-only transformers share. A model file takes the parts it needs and writes down only what is its own.

settings: the keys of config.json that all have; rotary: position embedding; network: weights, blocks and functions.
"""

from compiler.models.decoder.network import Decoder, Part
from compiler.models.decoder.rotary import KINDS, LONG, read_rotation, read_section
from compiler.models.decoder.settings import FULL, SLIDING, Shape, kept_context, read_shape, read_windows

__all__ = [
    "FULL",
    "KINDS",
    "LONG",
    "SLIDING",
    "Decoder",
    "Part",
    "Shape",
    "kept_context",
    "read_rotation",
    "read_section",
    "read_shape",
    "read_windows",
]

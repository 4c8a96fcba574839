"""What decoder-only transformers share. A model file takes the parts it needs and writes down only what is its own.

settings: the keys of config.json that all have; rotary: position embedding; network: weights, blocks and functions.
"""

from compiler.models.decoder.network import Decoder, Part
from compiler.models.decoder.rotary import read_frequencies
from compiler.models.decoder.settings import Shape, read_shape, read_windows

__all__ = ["Decoder", "Part", "Shape", "read_frequencies", "read_shape", "read_windows"]

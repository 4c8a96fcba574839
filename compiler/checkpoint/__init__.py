"""Checkpoint folders: safetensors files as named read-only arrays, and config.json as typed values."""
from compiler.checkpoint.folder import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

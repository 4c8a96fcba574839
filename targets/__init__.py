"""The devices quern compiles for: one TOML file each, and `native`, which is read off the machine at hand.

`load(name)` gives a frozen `Target`; `names()` lists what can be loaded. Nothing here knows TVM.
"""
from __future__ import annotations

from targets.files import load, names
from targets.target import Gpu, Target, TargetError

__all__ = ["Gpu", "Target", "TargetError", "load", "names"]

"""What GPTQ and AWQ files share: quantised modules have a `qweight`, all others are dense, rules may override settings.

Only names and lookups are shared. How words are unpacked is each format's own: the two never share a decoder.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from compiler.errors import FormatError
from compiler.quant.formats.dense import DenseSource
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from compiler.quant.patterns import Rules
from compiler.quant.reference import F32
from compiler.quant.source import CheckpointView, read_bias

Settings = TypeVar("Settings")


class QweightSource(Generic[Settings]):
    """Modules with a qweight are decoded by the format, all others come as they are. A rule of None: not quantised."""

    def __init__(self, checkpoint: CheckpointView, config: Settings, rules: Rules[Settings | None]) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._rules = rules
        self._dense = DenseSource(checkpoint)

    def describe_packed(self, module: str) -> WeightType:
        """Shape and kind of a quantised module; the format checks every shape here."""
        raise NotImplementedError

    def load_packed(self, module: str) -> QuantWeight:
        """A quantised module whose shapes `describe_packed` has accepted."""
        raise NotImplementedError

    def modules(self) -> list[str]:
        """Quantised and dense modules, in the order of the file."""
        quantised = [name.removesuffix(".qweight") for name in self._checkpoint.tensors if name.endswith(".qweight")]
        return quantised + self._dense.modules()

    def has(self, module: str) -> bool:
        """Whether there is such a weight matrix, in either form."""
        return self._quantised(module) or self._dense.has(module)

    def describe(self, module: str) -> WeightType:
        """Shape and kind; every shape is checked against the configuration."""
        return self.describe_packed(module) if self._quantised(module) else self._dense.describe(module)

    def load(self, module: str) -> QuantWeight | DenseWeight:
        """Decode one module."""
        if not self._quantised(module):
            return self._dense.load(module)
        self.describe_packed(module)
        return self.load_packed(module)

    def bias(self, module: str) -> F32 | None:
        """What the linear layer adds, if anything: in the order of its outputs, whatever the act-order."""
        return read_bias(self._checkpoint, module, self.describe(module).n)

    def vector(self, name: str) -> F32:
        """A norm weight as float32."""
        return self._dense.vector(name)

    def _where(self, module: str) -> str:
        return f"{self._checkpoint.tensors[f'{module}.qweight'].file}: {module}"

    def _config_of(self, module: str) -> Settings:
        config = self._rules.first(module, self._config)
        if config is None:
            raise FormatError(f"{self._where(module)} is quantised, but config.json says that this module is not. The "
                              f"configuration belongs to another checkpoint, or was edited.")
        return config

    def _quantised(self, module: str) -> bool:
        found = f"{module}.qweight" in self._checkpoint.tensors
        if found and self._dense.has(module):
            raise FormatError(f"{self._checkpoint.path}: {module} has both .weight and .qweight. "
                              f"Remove the one that is not the model's.")
        return found

"""Rules by module name, as quantisation configurations state them: exact names, or regular expressions of a stranger.

Expressions are matched by RE2: in linear time and bounded memory, whatever they are. It lacks lookaround and back
references, which are refused.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import re2

from compiler.errors import UnsupportedError

T = TypeVar("T")
MAX_BYTES = 1 << 20  # that one compiled expression may take
LONGEST = 1000  # characters of an expression
MOST = 1000  # rules of a configuration


@dataclass
class Rules(Generic[T]):
    """Ordered rules. `first` gives the value of an exact name if there is one, else of the first expression."""

    exact: dict[str, T] = field(default_factory=dict)
    expressions: list[tuple[Any, bool, T]] = field(default_factory=list)

    def name(self, name: str, value: T) -> None:
        """A rule for the module of this name."""
        self.exact.setdefault(name, value)

    def expression(self, text: str, value: T, where: str, anywhere: bool = False) -> None:
        """A rule for modules whose name matches from its start on (re.match), or anywhere (re.search).

        `where` starts the message of the UnsupportedError that an expression RE2 does not take raises.
        """
        if len(self.expressions) == MOST:
            raise UnsupportedError(f"{where}: there are more than {MOST} patterns. Quantise more modules alike.")
        options = re2.Options()
        options.log_errors, options.max_mem = False, MAX_BYTES
        try:
            if len(text) > LONGEST:
                raise re2.error(f"longer than {LONGEST} characters")
            compiled = re2.compile(text.encode("utf-8", "replace"), options)
        except re2.error as error:
            reason = error.args[0] if error.args else ""
            said = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
            raise UnsupportedError(f"{where} is a pattern that quern does not match: {said[:80]}. Write it without "
                                   f"lookaround and back references, or name the modules.") from None
        self.expressions.append((compiled, anywhere, value))

    def first(self, module: str, default: T) -> T:
        """What the rules say of a module."""
        if module in self.exact:
            return self.exact[module]
        name = module.encode("utf-8", "replace")
        for compiled, anywhere, value in self.expressions:
            if (compiled.search if anywhere else compiled.match)(name) is not None:
                return value
        return default

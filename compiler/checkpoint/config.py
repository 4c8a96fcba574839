"""config.json as typed values. A getter's error names file, key, value and what is needed; unread keys can be refused.

The quantisation part may stand in config.json under quantization_config, in a file of its own, or in both: the two are
merged, and a key on which they disagree raises as soon as somebody asks for it.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from compiler.checkpoint import strict_json
from compiler.checkpoint.strict_json import shown
from compiler.errors import ConfigError

QUANTIZATION = "quantization_config"
QUANTIZATION_FILES = ("quantize_config.json", "quantization_config.json", "quant_config.json")
LONGEST_NAME = 80  # characters of a key that a message shows, and of a value that is a name
MOST_NAMED = 6  # unhandled keys one message names
# Where the file comes from, how it was trained, how a library runs it: never what the model computes.
PROVENANCE = frozenset({
    "architectures", "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "attention_dropout", "_attn_implementation_autoset", "_attn_implementation", "pretraining_tp",
    "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing", "_from_model_config",
    "auto_map", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_llama_config",
    "transformers.js_config", "unsloth_fixed", "unsloth_version",
})


class _Required:
    """Marks a getter without a default."""


REQUIRED = _Required()


@dataclass(frozen=True)
class Entry:
    """A value, where it stands ("FILE: section.key"), and the other place and value when two files disagree."""

    value: Any
    where: str
    conflict: tuple[str, Any] | None = None


class Config:
    """One JSON object. Every getter marks its key as read; null counts as absent."""

    def __init__(self, entries: Mapping[str, Entry], home: str, quantization: Config | None = None) -> None:
        self._entries = dict(entries)
        self._home = home
        self._read: set[str] = set()
        self._sections: dict[str, Config] = {}
        self.quantization = quantization

    @classmethod
    def of(cls, data: Mapping[str, Any], file: Path | str, prefix: str = "") -> Config:
        """A Config over a parsed JSON object; prefix is its dotted place in the file ("rope_parameters.")."""
        entries = {key: Entry(value, f"{file}: {prefix}{_name(key)}") for key, value in data.items()}
        return cls(entries, f"{file}: {prefix}")

    @property
    def data(self) -> dict[str, Any]:
        """The plain values, with the merged quantisation part under its usual key."""
        plain = {key: entry.value for key, entry in self._entries.items()}
        return plain if self.quantization is None else {**plain, QUANTIZATION: self.quantization.data}

    def names(self) -> list[str]:
        """Names that have a value other than null."""
        return [key for key, entry in self._entries.items() if entry.value is not None or entry.conflict]

    def has(self, key: str) -> bool:
        """True when the key is there and not null. Counts as reading it only when it is absent or null."""
        return self._entries.get(key, Entry(None, "")).value is not None

    def accept(self, *keys: str) -> None:
        """Mark keys as handled without reading them."""
        self._read.update(keys)

    def neutral(self, **values: Any) -> None:
        """Mark keys as handled where they have exactly this value, with which they say nothing."""
        self._read.update(key for key, value in values.items() if self.data.get(key) == value)

    def assume(self, **values: Any) -> None:
        """Give keys that are not there a value."""
        for key, value in values.items():
            self._entries.setdefault(key, Entry(value, f"{self._home}{key} (by default)"))

    def where(self, key: str) -> str:
        """"FILE: section.key", to start a message with."""
        entry = self._entries.get(key)
        return entry.where if entry else f"{self._home}{_name(key)}"

    def integer(self, key: str, low: int, high: int, default: int | _Required = REQUIRED) -> int:
        """An integer from low to high, both included."""
        value = self._get(key, default, f"an integer from {low} to {high}")
        if type(value) is not int or not low <= value <= high:
            self._refuse(key, f"an integer from {low} to {high}")
        return value

    def integers(self, key: str, low: int, high: int,
                 default: tuple[int, ...] | _Required = REQUIRED) -> tuple[int, ...]:
        """One integer or a list of them, each from low to high, as a tuple (eos_token_id comes either way)."""
        need = f"an integer from {low} to {high}, or a list of them"
        value = self._get(key, default, need)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(type(item) is int and low <= item <= high for item in values):
            self._refuse(key, need)
        return values

    def number(self, key: str, low: float, high: float, default: float | _Required = REQUIRED) -> float:
        """A finite number from low to high, both included; an integer is a number too."""
        need = f"a number from {low:g} to {high:g}"
        value = self._get(key, default, need)
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            self._refuse(key, need)
        return float(value)

    def numbers(self, key: str, low: float, high: float, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers, each from low to high."""
        need = f"{count} numbers from {low:g} to {high:g}"
        value = self._get(key, REQUIRED, need)
        good = isinstance(value, (list, tuple)) and len(value) == count
        if not good or not all(type(v) in (int, float) and low <= v <= high and math.isfinite(v) for v in value):
            self._refuse(key, need)
        return tuple(map(float, value))

    def boolean(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """true or false, and nothing that merely looks like it."""
        value = self._get(key, default, "true or false")
        if type(value) is not bool:
            self._refuse(key, "true or false")
        return value

    def string(self, key: str, choices: Collection[str] = (), default: str | _Required = REQUIRED) -> str:
        """A name; one of `choices` where they are given."""
        need = "one of " + ", ".join(map(repr, choices)) if choices else "a string"
        value = self._get(key, default, need)
        if not isinstance(value, str) or (choices and value not in choices):
            self._refuse(key, need)
        if len(value) > LONGEST_NAME:  # whoever gets it may put it into a message
            self._refuse(key, f"a string of at most {LONGEST_NAME} characters")
        return value

    def strings(self, key: str, default: tuple[str, ...] | _Required = REQUIRED) -> tuple[str, ...]:
        """A list of strings, as a tuple."""
        value = self._get(key, default, "a list of strings")
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            self._refuse(key, "a list of strings")
        return tuple(value)

    def section(self, key: str) -> Config:
        """A nested object; its own unread keys are refused together with the others."""
        value = self._get(key, REQUIRED, "an object")
        if not isinstance(value, dict):
            self._refuse(key, "an object")
        if key not in self._sections:
            where = self.where(key)
            entries = {child: Entry(item, f"{where}.{_name(child)}") for child, item in value.items()}
            self._sections[key] = Config(entries, f"{where}.")
        return self._sections[key]

    def refuse_unhandled(self, known_harmless: Iterable[str] = ()) -> None:
        """Raise ConfigError naming the keys that nobody read: they might change the mathematics."""
        unread = self._unhandled(PROVENANCE.union(known_harmless))
        if unread:
            places = "; ".join(f"{where} is {shown(value)}" for where, value in unread[:MOST_NAMED])
            more = f"; and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
            raise ConfigError(f"{places}{more}: quern does not know this key and will not guess what it changes. If it "
                              f"changes nothing in the computation, remove it; otherwise the model is not supported.")

    def _unhandled(self, harmless: frozenset[str]) -> list[tuple[str, Any]]:
        unread = [(self.where(key), self._entries[key].value) for key in self.names()
                  if key not in self._read and key not in harmless]
        for section in self._sections.values():
            unread += section._unhandled(harmless)
        return unread

    def _get(self, key: str, default: Any, need: str) -> Any:
        self._read.add(key)
        entry = self._entries.get(key)
        if entry is not None and entry.conflict is not None:
            place, other = entry.conflict
            raise ConfigError(f"{entry.where} is {shown(entry.value)}, but {place} is {shown(other)}. "
                              f"Make them agree: both describe the same tensors.")
        if entry is None or entry.value is None:
            if default is REQUIRED:
                found = "is missing" if entry is None else "is null"
                raise ConfigError(f"{self.where(key)} {found}, but it must be {need}.")
            return default
        return entry.value

    def _refuse(self, key: str, need: str) -> NoReturn:
        raise ConfigError(f"{self.where(key)} is {shown(self._entries[key].value)}, but it must be {need}.")


def read_config(folder: Path) -> Config:
    """config.json of a checkpoint folder, with the quantisation part from wherever it stands."""
    file = folder / "config.json"
    data = strict_json.load_file(file, ConfigError)
    inner = data.pop(QUANTIZATION, None)
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"{file}: {QUANTIZATION} is {shown(inner)}, but it must be an object.")
    parts = [] if inner is None else [Config.of(inner, file, f"{QUANTIZATION}.")]
    parts += [part for name in QUANTIZATION_FILES if (part := read_optional(folder / name)) is not None]
    merged = Config.of(data, file)
    merged.quantization = _merge(parts) if parts else None
    return merged


def read_optional(file: Path) -> Config | None:
    """A JSON file as Config, or None when it does not exist."""
    return Config.of(strict_json.load_file(file, ConfigError), file) if file.exists() else None


def _merge(parts: list[Config]) -> Config:
    """All keys of all parts. null gives way to a value; two different values become a conflict a getter reports.

    Letter case makes no difference: AutoAWQ writes "gemm" into one file and "GEMM" into the other.
    """
    entries: dict[str, Entry] = {}
    for part in parts:
        for key, entry in part._entries.items():
            known = entries.get(key)
            if known is None or known.value is None:
                entries[key] = entry
            elif entry.value is not None and not _same(entry.value, known.value) and known.conflict is None:
                entries[key] = Entry(known.value, known.where, (entry.where, entry.value))
    return Config(entries, parts[0]._home)


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, str) and isinstance(b, str) and a.lower() == b.lower())


def _name(key: str) -> str:
    """A key as a message shows it: not too long, and on one line."""
    return key[:LONGEST_NAME].replace("\n", "\\n")

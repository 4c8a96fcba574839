"""Target files: TOML, every key known, one level of `inherits`."""
from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

from targets import native
from targets.features import cpuinfo_names
from targets.target import Gpu, Target, TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
KEYS: dict[str, dict[str, type]] = {  # table -> key -> type; "" is the top of the file
    "": {"inherits": str, "description": str, "tier": int},
    "system": {"arch": str, "triple": str, "glibc": str},
    "cpu": {
        "mcpu": str,
        "features": list,
        "vector_bits": int,
        "cores": int,
        "clock_mhz": int,
        "l1d_kib_per_core": int,
        "l2_kib": int,
    },
    "gpu": {
        "gpu_arch": str,
        "ptx": str,
        "cubin": bool,
        "multiprocessors": int,
        "gpu_clock_mhz": int,
        "gpu_read_mb_per_s": int,
    },
    "memory": {"dram_read_mb_per_s": int, "storage_read_mb_per_s": int},
}
OPTIONAL = {*KEYS["gpu"], *KEYS["memory"], "inherits", "clock_mhz", "l1d_kib_per_core", "l2_kib"}


def names(folder: Path = FOLDER) -> list[str]:
    """Every name that `load` takes, `native` first."""
    return ["native", *sorted(path.stem for path in folder.glob("*.toml"))]


def load(name: str, cpuinfo: str | None = None, folder: Path = FOLDER) -> Target:
    """The target of this name. `native` is read from `cpuinfo`, by default this machine's /proc/cpuinfo.

    Raises TargetError: unknown name, wrong file, or a CPU below what quern needs.
    """
    if name == "native":
        arch = native.machine() if cpuinfo is None else native.arch_of(cpuinfo)
        general = load(native.BASES[arch], folder=folder)
        if cpuinfo is not None:
            return native.detect(cpuinfo, general)
        return native.detect(native.read_cpuinfo(), general, native.l1d_kib(), native.kernel_has_tiles())
    path = folder / f"{name}.toml"
    if name not in names(folder):
        near = difflib.get_close_matches(name, names(folder), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TargetError(f"There is no target {name!r}.{hint} Known targets: {', '.join(names(folder))}.")
    values = _read(path)
    if (parent := values.pop("inherits", None)) is not None:
        base = _read(_parent_path(path, str(parent)))
        if "inherits" in base:
            raise TargetError(
                f"{path}: inherits {parent!r}, which itself inherits {base['inherits']!r}. One level is the limit: "
                f"inherit {base['inherits']!r} and state the difference here."
            )
        values = base | values
    return _target(name, path, values)


def _parent_path(path: Path, parent: str) -> Path:
    base = path.with_name(f"{parent}.toml")
    if not base.is_file():
        raise TargetError(f"{path}: inherits {parent!r}, but there is no file {base.name} beside it.")
    return base


def _read(path: Path) -> dict[str, Any]:
    """All keys of one file, flat: no two tables share a key. Raises TargetError for unknown keys and wrong types."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: not a TOML file: {error}.") from error
    tables = {"": {k: v for k, v in document.items() if k not in KEYS or not k}}
    for table in KEYS:
        if table and table in document:
            if not isinstance(document[table], dict):
                got = _toml_name(document[table])
                raise TargetError(f"{path}: {table} is {document[table]!r}, {got}, but it must be a table: [{table}].")
            tables[table] = document[table]
    flat: dict[str, Any] = {}
    for table, values in tables.items():
        for key, value in values.items():
            _check(path, table, key, value)
            flat[key] = tuple(value) if isinstance(value, list) else value
    return flat


def _check(path: Path, table: str, key: str, value: object) -> None:
    where = f"{table}.{key}" if table else key
    known = KEYS[table]
    if key not in known:
        place = f"[{table}]" if table else "the top of the file"
        near = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TargetError(f"{path}: unknown key {where!r}.{hint} Keys in {place}: {', '.join(known)}.")
    want = known[key]
    strings = not isinstance(value, list) or all(isinstance(item, str) for item in value)
    if type(value) is not want or not strings:
        needed = {str: "a string", int: "an integer", bool: "true or false", list: "a list of strings"}[want]
        raise TargetError(f"{path}: {where} is {value!r}, {_toml_name(value)}, but it must be {needed}.")
    if want is int and isinstance(value, int) and value < 1:
        raise TargetError(f"{path}: {where} is {value}, but it must be at least 1.")


def _toml_name(value: object) -> str:
    names_of = {str: "a string", int: "an integer", float: "a float", bool: "a boolean", list: "a list"}
    return names_of.get(type(value), "a table" if isinstance(value, dict) else "a date or time")


def _target(name: str, path: Path, values: dict[str, Any]) -> Target:
    for table, keys in KEYS.items():
        for key in keys:
            if key not in values and key not in OPTIONAL:
                where = f"{table}.{key}" if table else key
                raise TargetError(f"{path}: {where} is missing, here and in what it inherits.")
    gpu = _gpu(path, {key: values.pop(key) for key in KEYS["gpu"] if key in values})
    return Target(name=name, cpuinfo=cpuinfo_names(values["arch"], values["features"], str(path)), gpu=gpu, **values)


def _gpu(path: Path, values: dict[str, Any]) -> Gpu | None:
    if not values:
        return None
    for key in KEYS["gpu"]:
        if key not in values:
            raise TargetError(f"{path}: gpu.{key} is missing: a [gpu] table is whole, or not there.")
    if not re.fullmatch(r"sm_[0-9]{2,3}", values["gpu_arch"]) or not re.fullmatch(r"[0-9]\.[0-9]", values["ptx"]):
        raise TargetError(
            f"{path}: gpu_arch is {values['gpu_arch']!r} and ptx {values['ptx']!r}, but they must look like \"sm_53\" "
            f"and \"6.5\"."
        )
    plain = {key.removeprefix("gpu_"): value for key, value in values.items()}
    return Gpu(**plain)

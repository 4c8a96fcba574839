"""manifest.json: what the compiler writes and the runtime reads. The runtime owns this schema; the compiler imports it.

The dataclasses below are the schema: every key is needed, an unknown key is an error; Python 3.8 has to evaluate their
annotations, hence Tuple and Dict. `load` and `dump` both run
`manifest_check.check`, so that neither side can hold a manifest that the other would refuse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union, get_args, get_origin, get_type_hints

from .errors import ManifestError

FORMAT, VERSION, ABI = "quern-bundle", 2, 1
FILE_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # a 70-billion-parameter model needs about 1 MiB
CHUNK_BYTES = 16 << 20

Scalar = Union[str, int, float, bool, None]


@dataclass(frozen=True)
class Model:
    """The network: `context` is the number of positions that the caches hold."""

    type: str
    name: str
    vocab_size: int
    context: int
    layers: int
    parameters: int


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that the functions run on: `arch` "sm_87" or any later one, which compiles the PTX.

    driver: the oldest CUDA version whose driver takes the code, like "11.4"; cubin: there is machine code for `arch`.
    """

    arch: str
    ptx: str
    cubin: bool
    driver: str


@dataclass(frozen=True)
class Target:
    """The machine: `features` are spelt as /proc/cpuinfo spells them, `glibc` is the oldest version that works.

    gpu: None where the functions run on the CPU.
    """

    name: str
    arch: str
    triple: str
    cpu: str
    features: Tuple[str, ...]
    glibc: str
    gpu: Optional[Gpu] = None


@dataclass(frozen=True)
class TvmVersions:
    """The wheels that built the bundle: apache-tvm and apache-tvm-ffi."""

    version: str
    ffi_version: str


@dataclass(frozen=True)
class TunedKernel:
    """A kernel with tuned knobs instead of its schedule's default.

    `record`: the first 16 hex digits of the SHA-256 of the line in tuning_logs/ that the knobs come from.
    `modelled`: true where the line has a model's cycles, and no times; else there is no such key.
    """

    record: str
    knobs: Dict[str, int]
    modelled: Optional[bool] = None


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of an array."""

    dtype: str
    shape: Tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """A Relax function in the library: names of its arguments in order, `tokens` rows a call, one fresh output.

    counted: true where the function computes the first span[1] rows and leaves the others undefined, so that it takes
    any number of tokens up to `tokens`; else there is no such key, and all rows are computed.
    tiled: name of the same function, with the same results, for a process that may use AMX tiles.
    """

    tokens: int
    inputs: Tuple[str, ...]
    output: TensorType
    tiled: Optional[str] = None
    counted: Optional[bool] = None


@dataclass(frozen=True)
class Cache:
    """An array that starts as zeros and that `decode` and `prefill_*` change in place."""

    name: str
    dtype: str
    shape: Tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """An array inside the weights file, at byte `offset`; bfloat16 is handed to the code as uint16."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Weights:
    """The weights file and where each array lies in it."""

    file: str
    alignment: int
    tensors: Tuple[Weight, ...]


@dataclass(frozen=True)
class Memory:
    """Planned memory in bytes: weights = size of the weights file, cache = sum of the caches."""

    weights_bytes: int
    cache_bytes: int
    activation_bytes: int
    planned_peak_bytes: int


@dataclass(frozen=True)
class Tokens:
    """Special ids: `bos` starts an otherwise empty prompt, any of `eos` ends generation."""

    bos: Optional[int]
    eos: Tuple[int, ...]


@dataclass(frozen=True)
class ChatFormat:
    """Text around each part of a conversation; each pair is (before, after). Read by `chat.py`.

    system None: the model knows no system message. default_system: what it is told when the user states none.
    """

    format: str
    system: Optional[Tuple[str, str]]
    user: Tuple[str, str]
    assistant: Tuple[str, str]
    start: str
    generation_prompt: str
    default_system: Optional[str]


@dataclass(frozen=True)
class FileDigest:
    """Size and SHA-256 (hex) of a bundle file.

    A file with `chunks` is hashed in pieces of `chunk_bytes` bytes (the last may be shorter), so that the pieces can be
    checked in parallel; its `sha256` is the digest of the concatenated 32-byte chunk digests.
    """

    bytes: int
    sha256: str
    chunk_bytes: Optional[int] = None
    chunks: Optional[Tuple[str, ...]] = None

    @property
    def piece_bytes(self) -> int:
        """Length of what one of `pieces` is the digest of: a chunk's, or the file's. At least 1."""
        return self.chunk_bytes or max(1, self.bytes)

    @property
    def pieces(self) -> Tuple[str, ...]:
        """SHA-256 of what is hashed at once: every chunk, or the whole file."""
        return self.chunks or (self.sha256,)


@dataclass(frozen=True)
class Manifest:
    """A whole manifest, without the keys that only the file has: `format`, `version`, `abi` and its own `sha256`."""

    model: Model
    quantization: Dict[str, Scalar]
    target: Target
    tvm: TvmVersions
    tuning: Dict[str, TunedKernel]
    library: str
    functions: Dict[str, Function]
    caches: Tuple[Cache, ...]
    weights: Weights
    memory: Memory
    tokens: Tokens
    chat: Optional[ChatFormat]
    files: Dict[str, FileDigest]


def load(path: Path) -> Manifest:
    """Read and check a manifest file; raises ManifestError with the path, the key and what is needed."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB, so it is no manifest. "
            "Point at a directory that quern built."
        )
    return loads(raw, str(path))


def loads(raw: Union[str, bytes], where: str = FILE_NAME) -> Manifest:
    """Parse and check the text of a manifest; `where` opens every error message."""
    from .manifest_check import check

    try:
        data = json.loads(raw, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not valid JSON ({error}). Copy the bundle again or rebuild it.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ManifestError(
            f'{where}: no "format": "{FORMAT}", so this is not a quern bundle. Point at a directory that quern built.'
        )
    for key, known in (("version", VERSION), ("abi", ABI)):
        got = data.get(key)
        if got != known or isinstance(got, bool):
            raise ManifestError(
                f"{where}: {key} is {got!r}, but this runtime reads {key} {known}. "
                "Rebuild the bundle with this release of quern, or use the runtime of the release that built it."
            )
    if data.get("sha256") != _digest_of_keys(data):
        raise ManifestError(
            f"{where}: is damaged or was changed by hand: its sha256 is not that of its other keys. "
            "Copy the bundle again or rebuild it."
        )
    body = {key: value for key, value in data.items() if key not in ("format", "version", "abi", "sha256")}
    manifest: Manifest = _decode(Manifest, body, where, "")
    check(manifest, where)
    return manifest


def dump(manifest: Manifest, path: Path) -> None:
    """Check a manifest and write it: sorted keys, so that equal manifests are equal files."""
    path.write_text(dumps(manifest), encoding="utf-8")


def dumps(manifest: Manifest) -> str:
    """The text that `dump` writes."""
    from .manifest_check import check

    check(manifest, FILE_NAME)
    data = {"format": FORMAT, "version": VERSION, "abi": ABI, **asdict(manifest)}
    for part in ("files", "functions", "tuning"):
        data[part] = {name: {k: v for k, v in entry.items() if v is not None} for name, entry in data[part].items()}
    if manifest.target.gpu is None:
        del data["target"]["gpu"]
    data["sha256"] = _digest_of_keys(data)
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def digest_file(path: Path, chunk_bytes: Optional[int] = None) -> FileDigest:
    """The `files` entry of a file: one digest, or chunked when `chunk_bytes` is given (see FileDigest)."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with path.open("rb") as stream:
        while True:
            piece = stream.read(chunk_bytes or CHUNK_BYTES)
            if not piece:
                break
            size += len(piece)
            if chunk_bytes is None:
                whole.update(piece)
            else:
                chunks.append(hashlib.sha256(piece).hexdigest())
    if chunk_bytes is None:
        return FileDigest(size, whole.hexdigest())
    return FileDigest(size, digest_of_chunks(chunks), chunk_bytes, tuple(chunks))


def digest_of_chunks(chunks: Sequence[str]) -> str:
    """SHA-256 over the concatenated raw bytes of hex digests."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, chunks))).hexdigest()


def _digest_of_keys(data: dict[str, Any]) -> str:
    """SHA-256 of all keys but `sha256`, in canonical JSON: no other file can vouch for the manifest."""
    rest = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what json would silently drop."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _decode(kind: Any, value: Any, where: str, key: str) -> Any:
    """JSON value -> the annotated type, strictly: no unknown or missing keys, no bool for int, no int for float."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _decode_record(kind, value, where, key)
    if origin is Union:
        if value is None and type(None) in args:
            return None
        if len(args) == 2:  # Optional[X]
            return _decode(args[0], value, where, key)
        if isinstance(value, (str, int, float)):  # Scalar
            return value
        raise _mismatch(where, key, value, "a string, number, true, false or null")
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise _mismatch(where, key, value, f"a list of {len(kinds)}")
        return tuple(_decode(kinds[i], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _decode(args[1], v, where, f"{key}.{name}") for name, v in value.items()}
    if kind in (str, int, bool) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    names = {str: "a string", int: "an integer", bool: "true or false", tuple: "a list", dict: "an object"}
    raise _mismatch(where, key, value, names[origin or kind])


def _decode_record(kind: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, key, value, "an object")
    known, needed, hints = _schema(kind)
    unknown, missing = sorted(set(value) - known), [n for n in needed if n not in value]
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"key {missing[0]!r} is missing"
        raise ManifestError(f"{where}: {key or 'top level'}: {what}. Rebuild the bundle with this release of quern.")
    return kind(**{n: _decode(hints[n], v, where, f"{key}.{n}" if key else n) for n, v in value.items()})


@lru_cache(maxsize=None)
def _schema(kind: Any) -> tuple[frozenset[str], tuple[str, ...], dict[str, Any]]:
    """A record's keys, those that it must have, and their types."""
    every = fields(kind)
    return (
        frozenset(f.name for f in every),
        tuple(f.name for f in every if f.default is not None),
        get_type_hints(kind),
    )


def _mismatch(where: str, key: str, value: Any, needed: str) -> ManifestError:
    got = json.dumps(value)
    got = got if len(got) <= 60 else got[:57] + "..."
    return ManifestError(
        f"{where}: {key} is {got}, but {needed} is needed. Rebuild the bundle with this release of quern."
    )

"""What must hold inside a manifest beyond the types of its keys: names, bounds, sizes, no overlaps, functions that fit.

Nothing here touches a file or allocates: a hostile manifest can at most be refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from .errors import ManifestError
from .manifest import FILE_NAME, FileDigest, Function, Gpu, Manifest, digest_of_chunks

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int16": 2, "int32": 4}
ARCHES = ("x86_64", "aarch64")
STEP_INPUTS, HEAD_INPUTS = ("ids", "span"), ("hidden",)  # what the runtime makes itself; the latter for head_1
MIN_ALIGNMENT, MAX_ALIGNMENT = 64, 4096  # TVM's code assumes 64 bytes; a mapped file begins on a page
MAX_BYTES, MAX_COUNT, MAX_TOKENS, MAX_RANK = 1 << 46, 1 << 26, 1 << 16, 8

_FUNCTION_NAME = re.compile(r"decode|head_1|(?:prefill|logits)_([1-9][0-9]{0,5})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,254}")
_RECORD, _NAME = re.compile(r"[0-9a-f]{16}"), re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


def check(manifest: Manifest, where: str) -> None:
    """Raise ManifestError, opened by `where`, at the first thing that cannot be."""
    Checker(manifest, where).run()


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense array."""
    size = ITEM_BYTES[dtype]
    for dim in shape:
        size *= dim
    return size


class Checker:
    """The checks, in the order of the manifest's keys; later ones rely on earlier ones."""

    def __init__(self, manifest: Manifest, where: str) -> None:
        self.m, self.where = manifest, where

    def run(self) -> None:
        """Everything."""
        self.model_and_target()
        self.tuning()
        self.files()
        self.arrays()
        self.memory()
        self.functions()
        self.tokens_and_chat()

    def fail(self, message: str) -> NoReturn:
        """Every error of this module: where, what, advice."""
        raise ManifestError(f"{self.where}: {message}. Rebuild the bundle with this release of quern.")

    def bounded(self, key: str, value: int, low: int, high: int) -> None:
        """An integer within low..high."""
        if not low <= value <= high:
            self.fail(f"{key} is {value}, but must lie in {low}..{high}")

    def unique(self, what: str, names: Iterable[str]) -> None:
        """No name twice."""
        seen: set[str] = set()
        for name in names:
            if name in seen:
                self.fail(f"{what} {name!r} appears twice")
            seen.add(name)

    def model_and_target(self) -> None:
        """Counts in bounds, an architecture and a glibc version that can be compared."""
        model, target = self.m.model, self.m.target
        for key in ("vocab_size", "context"):
            self.bounded(f"model.{key}", getattr(model, key), 1, MAX_COUNT)
        for key in ("layers", "parameters"):
            self.bounded(f"model.{key}", getattr(model, key), 0, MAX_BYTES)
        if target.arch not in ARCHES:
            self.fail(f"target.arch is {target.arch!r}, but must be one of {', '.join(ARCHES)}")
        for key, text in (
            ("target.glibc", target.glibc),
            ("tvm.version", self.m.tvm.version),
            ("tvm.ffi_version", self.m.tvm.ffi_version),
        ):
            if not re.match(r"[0-9]{1,4}\.[0-9]{1,4}(\.|$)", text):
                self.fail(f"{key} is {text!r}, but must begin like 2.28")
        if target.gpu is not None:
            self.gpu(target.gpu)
        for feature in target.features:
            if not re.fullmatch(r"[a-z0-9_.]+", feature):
                self.fail(f"target.features has {feature!r}, which /proc/cpuinfo cannot contain")

    def gpu(self, gpu: Gpu) -> None:
        """An architecture and versions that can be compared."""
        if not re.fullmatch(r"sm_[1-9][0-9]{1,2}", gpu.arch):
            self.fail(f"target.gpu.arch is {gpu.arch!r}, but must look like sm_87")
        for key, text in (("ptx", gpu.ptx), ("driver", gpu.driver)):
            if not re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,2}", text):
                self.fail(f"target.gpu.{key} is {text!r}, but must look like 11.4")

    def tuning(self) -> None:
        """Kernels and knobs with names of identifiers, and the record that each comes from."""
        for kernel, tuned in self.m.tuning.items():
            for name in (kernel, *tuned.knobs):
                if not _NAME.fullmatch(name):
                    self.fail(f"tuning has {name[:70]!r}, but names are letters, digits and _")
            if not _RECORD.fullmatch(tuned.record):
                self.fail(f"tuning.{kernel}.record is {tuned.record[:70]!r}, but must be 16 lower-case hex digits")
            for name, value in tuned.knobs.items():
                self.bounded(f"tuning.{kernel}.knobs.{name}", value, 0, MAX_COUNT)

    def files(self) -> None:
        """Plain names, whole digests, and an entry for each file that the runtime opens."""
        for name, digest in self.m.files.items():
            self.file_name("files", name)
            if name == FILE_NAME:
                self.fail(f"files lists {FILE_NAME}, which cannot hold its own digest")
            self.digest(f"files.{name}", digest)
        for key, name in (("library", self.m.library), ("weights.file", self.m.weights.file)):
            self.file_name(key, name)
            if name not in self.m.files:
                self.fail(f"{key} is {name!r}, which has no entry under files")

    def file_name(self, key: str, name: str) -> None:
        """A name inside the bundle directory: no separators, no leading dot, ASCII."""
        if not _FILE_NAME.fullmatch(name):
            self.fail(f"{key} has {name!r}, but a file name must be letters, digits and ._+- without a leading dot")

    def digest(self, key: str, digest: FileDigest) -> None:
        """Sizes in bounds, hex of the right length, chunks that cover the file and agree with the total."""
        self.bounded(f"{key}.bytes", digest.bytes, 0, MAX_BYTES)
        if (digest.chunks is None) != (digest.chunk_bytes is None):
            self.fail(f"{key} has only one of chunks and chunk_bytes")
        chunks = digest.chunks or ()
        for text in (digest.sha256, *chunks):
            if not _HEX_DIGEST.fullmatch(text):
                self.fail(f"{key} has the digest {text[:70]!r}, but SHA-256 is 64 lower-case hex digits")
        if digest.chunk_bytes is not None:
            self.bounded(f"{key}.chunk_bytes", digest.chunk_bytes, 1, MAX_BYTES)
            needed = -(-digest.bytes // digest.chunk_bytes)
            if len(chunks) != needed:
                self.fail(
                    f"{key} has {len(chunks)} chunks, but {digest.bytes} bytes in chunks of "
                    f"{digest.chunk_bytes} make {needed}"
                )
            if digest_of_chunks(chunks) != digest.sha256:
                self.fail(f"{key}.sha256 is not the digest of its chunk digests")

    def arrays(self) -> None:
        """Weights inside their file, aligned, without overlap; caches of known type; no name twice."""
        weights = self.m.weights
        alignment, size = weights.alignment, self.m.files[weights.file].bytes
        self.bounded("weights.alignment", alignment, MIN_ALIGNMENT, MAX_ALIGNMENT)
        if alignment & (alignment - 1):
            self.fail(f"weights.alignment is {alignment}, but must be a power of two")
        self.unique(
            "array", [*STEP_INPUTS, *HEAD_INPUTS, *(c.name for c in self.m.caches), *(t.name for t in weights.tensors)]
        )
        for cache in self.m.caches:
            self.array(f"cache {cache.name!r}", cache.dtype, cache.shape)
        end, before = 0, ""
        for tensor in sorted(weights.tensors, key=lambda t: t.offset):
            what = f"weight {tensor.name!r}"
            needed = self.array(what, tensor.dtype, tensor.shape)
            if tensor.nbytes != needed:
                self.fail(f"{what} has nbytes {tensor.nbytes}, but {tensor.dtype}{list(tensor.shape)} takes {needed}")
            if tensor.offset < 0 or tensor.offset % alignment:
                self.fail(f"{what} has offset {tensor.offset}, which is no multiple of the alignment {alignment}")
            if tensor.offset + needed > size:
                self.fail(f"{what} ends at byte {tensor.offset + needed}, but {weights.file} has only {size}")
            if tensor.offset < end:
                self.fail(f"{what} begins at byte {tensor.offset}, inside {before}, which ends at {end}")
            end, before = tensor.offset + needed, what

    def array(self, what: str, dtype: str, shape: Sequence[int]) -> int:
        """A known dtype and a sane shape; gives the size in bytes."""
        if dtype not in ITEM_BYTES:
            self.fail(f"{what} has dtype {dtype!r}, but must be one of {', '.join(ITEM_BYTES)}")
        if not 1 <= len(shape) <= MAX_RANK or min(shape) < 1:
            self.fail(f"{what} has shape {list(shape)}, but 1 to {MAX_RANK} positive dimensions are needed")
        size = nbytes(dtype, shape)
        if size > MAX_BYTES:
            self.fail(f"{what} takes {size} bytes, more than {MAX_BYTES}")
        return size

    def memory(self) -> None:
        """The plan agrees with the arrays it sums up."""
        memory = self.m.memory
        for key in ("activation_bytes", "planned_peak_bytes"):
            self.bounded(f"memory.{key}", getattr(memory, key), 0, MAX_BYTES)
        caches = sum(nbytes(c.dtype, c.shape) for c in self.m.caches)
        if memory.cache_bytes != caches:
            self.fail(f"memory.cache_bytes is {memory.cache_bytes}, but the caches take {caches}")
        weights = self.m.files[self.m.weights.file].bytes
        if memory.weights_bytes != weights:
            self.fail(f"memory.weights_bytes is {memory.weights_bytes}, but {self.m.weights.file} has {weights}")

    def functions(self) -> None:
        """`decode`; with each `prefill_M` a `logits_M`, and `head_1`; known arguments; outputs of the shapes needed."""
        functions = self.m.functions
        prefill = {name: f for name, f in functions.items() if name.startswith("prefill_")}
        beside = ["head_1", *(name.replace("prefill", "logits") for name in prefill)] if prefill else []
        for needed in ("decode", *beside):
            if needed not in functions:
                self.fail(f"functions has no {needed!r}")
        for name in functions:
            if name not in ("decode", *beside, *prefill):
                known = "decode is known, and prefill_M with its logits_M and head_1"
                self.fail(f"functions has {name!r}, but only {known}")
        if len({f.output.shape[1:] for f in prefill.values()}) > 1:
            self.fail("functions: the outputs of prefill differ in their hidden size")
        arrays = {c.name for c in self.m.caches} | {t.name for t in self.m.weights.tensors}
        for name, function in functions.items():
            self.function(name, function, arrays)

    def function(self, name: str, function: Function, arrays: set[str]) -> None:
        """One function: its name states its tokens, inputs exist, outputs are float32.

        Of prefill_M [1, hidden], of the others [tokens, vocab].
        """
        found, key = _FUNCTION_NAME.fullmatch(name), f"functions.{name}"
        if found is None:
            self.fail(f"functions has {name!r}: M is a number of tokens")
        tokens = int(found[1] or 1)
        self.bounded(f"{key}.tokens", function.tokens, tokens, tokens)
        self.bounded(f"{key}.tokens", tokens, 1, MAX_TOKENS)
        if function.tiled not in (None, f"{name}_amx"):
            self.fail(f"{key}.tiled is {function.tiled!r}, but only {name + '_amx'!r} is known")
        if function.counted not in (None, True) or (function.counted and tokens == 1):
            self.fail(f"{key}.counted is {function.counted!r}, but only functions of several tokens have it, as true")
        own = HEAD_INPUTS if name == "head_1" else STEP_INPUTS
        self.unique(f"{key}: input", function.inputs)
        for needed in own:
            if needed not in function.inputs:
                self.fail(f"{key} has no input {needed!r}")
        for given in function.inputs:
            if given not in own and given not in arrays:
                self.fail(f"{key} has the input {given!r}, which is neither a weight nor a cache")
        out = function.output
        self.array(f"{key}.output", out.dtype, out.shape)
        wanted = (1, out.shape[-1]) if name.startswith("prefill_") else (tokens, self.m.model.vocab_size)
        if out.dtype != "float32" or out.shape != wanted:
            self.fail(f"{key}.output is {out.dtype}{list(out.shape)}, but float32{list(wanted)} is needed")
        self.bounded(f"{key}.output.shape[1]", wanted[1], 1, MAX_COUNT)

    def tokens_and_chat(self) -> None:
        """Special ids inside the vocabulary; a chat format that chat.py knows."""
        tokens, last = self.m.tokens, self.m.model.vocab_size - 1
        for key, token in [("bos", tokens.bos), *(("eos", t) for t in tokens.eos)]:
            if token is not None:
                self.bounded(f"tokens.{key}", token, 0, last)
        chat = self.m.chat
        if chat is not None and chat.format != "turns":
            self.fail(f"chat.format is {chat.format!r}, but only 'turns' is known")
        if chat is not None and chat.system is None and chat.default_system is not None:
            self.fail("chat.default_system is given, but chat.system is null")

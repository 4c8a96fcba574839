"""A checkpoint: which files hold the tensors (one file, shards with an index, or GGUF), and the tensors by name."""
from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from compiler.checkpoint import gguf_file, gguf_model, gguf_tokenizer, safetensors, strict_json
from compiler.checkpoint.config import Config, read_config, read_optional
from compiler.checkpoint.gguf_architecture import Architecture
from compiler.checkpoint.safetensors import TensorInfo
from compiler.checkpoint.strict_json import shown
from compiler.errors import CheckpointError, UnsupportedError

GGUF = ".gguf"
INDEX_SUFFIX = ".safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MOST_MAPPED_BYTES = 256 << 20
MOST_TOKENIZER_BYTES = 256 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder or GGUF file. Opening reads headers only; `array` maps a file when first asked for a tensor.

    tokenizer_files: name -> content of tokenizer.json and what belongs to it, as far as the checkpoint has them.
    """

    path: Path
    config: Config
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]  # of the first file: what the writer says about itself
    tokenizer_files: Callable[[], dict[str, bytes]] = dict
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    _handed: deque[TensorInfo] = field(default_factory=deque, repr=False)  # tensors whose pages are in this process
    _lock: Lock = field(default_factory=Lock, repr=False)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of its file. CheckpointError if absent.

        bfloat16 comes as uint16 bits; GGUF's block formats come as u8[..., bytes of a row].
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} has no tensor {shown(name)}. "
                                  f"Is this the model that config.json describes?")
        with self._lock:
            if info.file not in self._maps:
                self._maps[info.file] = safetensors.map_file(info.file)
            self._drop_pages(MOST_MAPPED_BYTES - info.nbytes)
            self._handed.append(info)
        safetensors.read_ahead(self._maps[info.file], info)
        return safetensors.view(self._maps[info.file], info)

    def _drop_pages(self, most: int) -> None:
        """Keep the mapped files out of this process's memory: of what was handed out, the oldest goes first.

        Views stay valid: a page that is touched again comes back from the page cache, or from disk.
        """
        held = sum(info.nbytes for info in self._handed)
        while self._handed and held > most:
            oldest = self._handed.popleft()
            held -= oldest.nbytes
            safetensors.drop_pages(self._maps[oldest.file], oldest)

    @property
    def name(self) -> str:
        """What people call it: the folder's name, the file's, or that of the repository in a Hugging Face cache."""
        path = self.path.resolve() if self.path.is_dir() else self.path
        if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
            return path.parents[1].name.rpartition("--")[2]
        return path.name.removesuffix(GGUF)

    def optional_json(self, name: str) -> Config | None:
        """Another JSON file of the folder (generation_config.json ...), or None where there is none."""
        return read_optional(self.path / name)


def open_checkpoint(path: Path | str, gguf: Mapping[str, Architecture] = MappingProxyType({})) -> Checkpoint:
    """Open a folder with config.json and safetensors files, or with one GGUF file, or that file itself.

    gguf: the architectures that may stand in a GGUF file: compiler.models.gguf_architectures(). Raises a UserError that
    says what is wrong or missing.
    """
    folder = Path(path)
    if folder.suffix == GGUF and not folder.is_dir():
        return _open_gguf(folder, gguf)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder that holds config.json and the .safetensors "
                              f"files, or a .gguf file.")
    if not _visible(folder, "*.safetensors") and (found := _visible(folder, f"*{GGUF}")):
        if len(found) > 1:
            raise CheckpointError(f"{folder} has {len(found)} {GGUF} files ({_some(found)}). Give one of the files.")
        return _open_gguf(found[0], gguf)
    config = read_config(folder)
    index = _find_index(folder)
    if index is not None:
        tensors, metadata = _read_shards(index)
    else:
        tensors, metadata = safetensors.read_header(_find_single(folder))
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors. Fetch the checkpoint again.")
    return Checkpoint(folder, config, tensors, metadata, lambda: _tokenizer_files(folder))


def _open_gguf(path: Path, architectures: Mapping[str, Architecture]) -> Checkpoint:
    """One GGUF file: its metadata stands for config.json and for the tokenizer's files."""
    file = gguf_file.read(path)
    config, tensors = gguf_model.convert(file, architectures)
    return Checkpoint(path, config, tensors, {}, lambda: gguf_tokenizer.files(file.metadata, str(path)))


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in (folder / name for name in TOKENIZER_FILES):
        if path.is_file():
            if path.stat().st_size > MOST_TOKENIZER_BYTES:
                raise CheckpointError(f"{path}: is {path.stat().st_size >> 20} MiB, but a tokenizer has at most "
                                      f"{MOST_TOKENIZER_BYTES >> 20}.")
            try:
                found[path.name] = path.read_bytes()
            except OSError as problem:
                raise CheckpointError(f"{path}: {problem.strerror}. Check that it may be read.") from None
    return found


def _some(paths: list[Path]) -> str:
    return ", ".join(p.name for p in paths[:4]) + (", ..." if len(paths) > 4 else "")


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Matching files, without the hidden ones that some systems leave beside a copied file ("._model.safetensors")."""
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))


def _find_index(folder: Path) -> Path | None:
    found = _visible(folder, "*" + INDEX_SUFFIX)
    if len(found) > 1:
        raise CheckpointError(f"{folder} has several indexes: {', '.join(p.name for p in found)}. Keep one.")
    return found[0] if found else None


def _find_single(folder: Path) -> Path:
    """model.safetensors, or the only .safetensors file (auto-gptq names it after its settings)."""
    found = _visible(folder, "*.safetensors")
    if folder / "model.safetensors" in found:
        return folder / "model.safetensors"
    if len(found) > 1:
        raise CheckpointError(f"{folder} has {len(found)} .safetensors files ({_some(found)}) and no index. Add "
                              f"model{INDEX_SUFFIX}, or keep only the file that holds the model.")
    if not found:
        raise _no_tensors(folder)
    if found[0].name == "adapter_model.safetensors":
        raise UnsupportedError(f"{folder} holds a LoRA adapter, not a model. Merge it into its base model first "
                               f"(peft: merge_and_unload, then save_pretrained).")
    return found[0]


def _no_tensors(folder: Path) -> CheckpointError | UnsupportedError:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        return UnsupportedError(
            f"{folder} has its weights in {pickles[0]} only. That is a Python pickle, which can run any code when it "
            f"is read, so quern does not read it. Convert it where you trust it: load the model with transformers and "
            f"save_pretrained(folder, safe_serialization=True), or take the safetensors form of the same model.")
    return CheckpointError(f"{folder} has no .safetensors file. Check that the checkpoint was copied whole.")


def _read_shards(index: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All shards an index names, checked against the index in both directions."""
    weight_map = strict_json.load_file(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names. Fetch the file again.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not safetensors.is_inside(shard):
            raise CheckpointError(f"{index} names the shard {shown(shard)}, but a shard must be a .safetensors file in "
                                  f"the same folder, without any path. Fetch the index from a source you trust.")
    single = index.parent / "model.safetensors"
    if single.name not in shards and single.exists():
        raise CheckpointError(f"{index.parent} has model.safetensors beside the shards of {index.name}. "
                              f"Keep one of them.")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        file = index.parent / shard
        if not strict_json.exists(file):
            raise CheckpointError(f"{index} names the shard {shard}, but it is not there. Copy or download it again.")
        found, described = safetensors.read_header(file)
        metadata = metadata or described
        for name, info in found.items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {shown(name)} is also in {tensors[name].file.name}. "
                                      f"Fetch the checkpoint again.")
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{file} holds tensor {shown(name)}, but {index.name} does not list it there. "
                                      f"The files are from different checkpoints: fetch them again.")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index} says that {shard} holds tensor {shown(name)}, but it does not. "
                                  f"The files are from different checkpoints: fetch them again.")
    return tensors, metadata

"""Which files of a folder are the model: one file of any name, shards with an index, and everything that is refused."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compiler.checkpoint import open_checkpoint
from compiler.errors import CheckpointError, UnsupportedError, UserError
from tests.checkpoint.files import write_checkpoint, write_safetensors

A = {"a": np.arange(6, dtype=np.float16).reshape(2, 3)}
B = {"b": np.arange(4, dtype=np.int32)}


def refusal(folder: Path, kind: type[UserError] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        open_checkpoint(folder)
    assert type(error.value) is kind
    return str(error.value)


def sharded(folder: Path, weight_map: object) -> Path:
    write_checkpoint(folder, {}, {})
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "1.safetensors", A)
    write_safetensors(folder / "2.safetensors", B)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_single_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {"model_type": "llama"}, A))
    assert checkpoint.config.string("model_type") == "llama"
    assert checkpoint.metadata == {"format": "pt"}
    assert np.array_equal(checkpoint.array("a"), A["a"])
    with pytest.raises(CheckpointError) as error:
        checkpoint.array("b")
    assert str(error.value) == f"{tmp_path} has no tensor 'b'. Is this the model that config.json describes?"


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, A)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    (tmp_path / "._gptq_model-4bit-128g.safetensors").write_bytes(b"left by a file manager")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert np.array_equal(checkpoint.array("a"), A["a"])
    assert np.array_equal(checkpoint.array("b"), B["b"])
    assert checkpoint.tensors["b"].file == tmp_path / "2.safetensors"


def test_refuses_indexes_that_lie(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    both = {"a": "1.safetensors", "b": "2.safetensors"}
    again = "The files are from different checkpoints: fetch them again."
    cases: list[tuple[object, str]] = [
        ([], f"{index}: weight_map must map tensor names to file names. Fetch the file again."),
        ({"a": 1}, f"{index}: weight_map must map tensor names to file names. Fetch the file again."),
        ({**both, "c": "3.safetensors"},
         f"{index} names the shard 3.safetensors, but it is not there. Copy or download it again."),
        ({**both, "c": "1.safetensors"},
         f"{index} says that 1.safetensors holds tensor 'c', but it does not. {again}"),
        ({"a": "1.safetensors", "b": "1.safetensors"},
         f"{index} says that 1.safetensors holds tensor 'b', but it does not. {again}"),
        ({"a": "2.safetensors", "b": "2.safetensors"},
         f"{index} says that 2.safetensors holds tensor 'a', but it does not. {again}"),
        ({"b": "2.safetensors", "c": "1.safetensors"},
         f"{tmp_path / '1.safetensors'} holds tensor 'a', but {index.name} does not list it there. {again}"),
    ]
    for weight_map, message in cases:
        assert refusal(sharded(tmp_path, weight_map)) == message


@pytest.mark.parametrize("shard", [
    "../1.safetensors", "/etc/passwd", "sub/1.safetensors", "..", "", "1.bin", "a\\b.safetensors", ".safetensors",
    "x\0.safetensors", "\ud800.safetensors",
])
def test_refuses_shards_outside_the_folder(tmp_path: Path, shard: str) -> None:
    message = refusal(sharded(tmp_path, {"a": shard}))
    index = tmp_path / "model.safetensors.index.json"
    assert message == (f"{index} names the shard {shard!r}, but a shard must be a .safetensors file in the same "
                       f"folder, without any path. Fetch the index from a source you trust.")


def test_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    write_safetensors(tmp_path / "2.safetensors", {**A, **B})
    assert refusal(tmp_path) == (f"{tmp_path / '2.safetensors'}: tensor 'a' is also in 1.safetensors. "
                                 f"Fetch the checkpoint again.")


def test_refuses_two_truths(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    write_safetensors(tmp_path / "model.safetensors", A)
    assert refusal(tmp_path) == (f"{tmp_path} has model.safetensors beside the shards of model.safetensors.index.json. "
                                 f"Keep one of them.")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    assert refusal(tmp_path) == (f"{tmp_path} has several indexes: model.safetensors.index.json, "
                                 f"other.safetensors.index.json. Keep one.")
    for index in tmp_path.glob("*.index.json"):
        index.unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path} has 2 .safetensors files (1.safetensors, 2.safetensors) and no index. Add "
        f"model.safetensors.index.json, or keep only the file that holds the model.")


def test_refuses_folders_without_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {})
    assert refusal(tmp_path) == f"{tmp_path} holds no tensors. Fetch the checkpoint again."
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path) == (f"{tmp_path} has no .safetensors file. Check that the checkpoint was copied whole.")
    (tmp_path / "pytorch_model.bin").touch()
    assert refusal(tmp_path, UnsupportedError) == (
        f"{tmp_path} has its weights in pytorch_model.bin only. That is a Python pickle, which can run any code when "
        f"it is read, so quern does not read it. Convert it where you trust it: load the model with transformers and "
        f"save_pretrained(folder, safe_serialization=True), or take the safetensors form of the same model.")
    write_safetensors(tmp_path / "adapter_model.safetensors", A)
    assert refusal(tmp_path, UnsupportedError) == (
        f"{tmp_path} holds a LoRA adapter, not a model. Merge it into its base model first (peft: merge_and_unload, "
        f"then save_pretrained).")


def test_refuses_what_is_not_a_checkpoint_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == (f"{tmp_path / 'no'} is not a folder. Give the folder that holds config.json "
                                        f"and the .safetensors files, or a .gguf file.")
    assert refusal(tmp_path) == (f"{tmp_path / 'config.json'}: No such file or directory. "
                                 f"Check that the checkpoint was copied whole.")

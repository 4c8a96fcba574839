"""Hub ids: what is one, what is asked for, what each failure says. Nothing here touches a network."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from compiler.checkpoint import hub, open_checkpoint
from compiler.checkpoint.hub import ModelId
from compiler.errors import CheckpointError
from tests.checkpoint.files import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as error:
        hub.resolve(model)
    return str(error.value)


@pytest.mark.parametrize(("text", "parts"), [
    ("org/name", ("org/name", None, None)),
    ("TheBloke/Llama-2-7B-GPTQ@gptq-4bit-32g-actorder_True",
     ("TheBloke/Llama-2-7B-GPTQ", None, "gptq-4bit-32g-actorder_True")),
    ("org/name@refs/pr/1", ("org/name", None, "refs/pr/1")),
    ("org/name-GGUF/name.Q4_K_M.gguf@v1.0", ("org/name-GGUF", "name.Q4_K_M.gguf", "v1.0")),
])
def test_what_is_an_id(text: str, parts: tuple[str, str | None, str | None]) -> None:
    assert hub.parse(text) == ModelId(*parts)


@pytest.mark.parametrize("text", [
    "name", "./org/name", "../name", "/org/name", "org/name/sub", "org/../name", "a/b@", "org/name.gguf@../x",
    "~/models/x", "-org/name", "",
])
def test_what_is_none(text: str) -> None:
    assert hub.parse(text) is None
    assert hub.resolve(text) == Path(text)


def test_a_path_that_exists_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("asked the hub"))
    Path("org/name").mkdir(parents=True)
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve(tmp_path / "missing") == tmp_path / "missing"


def test_only_needed_files_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return "/cache/x"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve("org/name@v1") == Path("/cache/x")
    ((repository,), options), = asked
    assert (repository, options["revision"]) == ("org/name", "v1")
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
             "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "README.md", "model.gguf"]
    kept = filter_repo_objects(files, allow_patterns=options["allow_patterns"],
                                                     ignore_patterns=options["ignore_patterns"])
    assert list(kept) == files[:4]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: f"/cache/{a}{k}")
    assert hub.resolve("org/name/m.gguf") == Path("/cache/('org/name', 'm.gguf'){'revision': None}")


def test_the_real_library_serves_its_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = write_checkpoint(repository / "blobs", {"model_type": "llama"}, {"a": np.ones(2, np.float32)})
    for file in blobs.iterdir():  # the cache holds links
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    checkpoint = open_checkpoint(hub.resolve("org/tiny"))
    assert checkpoint.name == "tiny"
    assert checkpoint.array("a").tolist() == [1, 1]
    assert open_checkpoint(hub.resolve(f"org/tiny@{COMMIT}")).path == snapshot
    assert refusal("org/other") == (
        "org/other: no such file or folder here, and the Hugging Face hub cannot be reached while the cache does not "
        "hold all of the model. Check the path, or try again with a network: a download goes on where it stopped.")


def raising(error: Exception) -> Any:
    def raise_it(*_arguments: Any, **_options: Any) -> None:
        raise error

    return raise_it


def http(kind: Any) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "the library's own words")
    return error


@pytest.mark.parametrize(("error", "message"), [
    (http(errors.GatedRepoError),
     "the hub asks you to accept the model's licence on its page, and then to log in: hf auth login."),
    (http(errors.RepositoryNotFoundError),
     "neither a file or folder here nor a model on the Hugging Face hub (or it is private: log in with hf auth login). "
     "Check the spelling."),
    (http(errors.RevisionNotFoundError),
     "the model has no revision 'v1'. Give a branch, a tag or a commit that it has."),
    (OSError(28, "No space left on device"),
     "the download broke off (OSError: [Errno 28] No space left on device). Try again: it goes on where it stopped."),
    (RuntimeError("a\nb"), "the download broke off (RuntimeError: a b). Try again: it goes on where it stopped."),
])
def test_what_each_failure_says(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    assert refusal("org/name@v1") == f"org/name@v1: {message}"


def test_a_missing_file_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(http(
        errors.RemoteEntryNotFoundError)))
    assert refusal("org/name/m.gguf") == (
        "org/name/m.gguf: the model has no file 'm.gguf'. Look at its list of files on the hub.")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert refusal("org/name") == (
        "org/name: there is no such file or folder here, and to fetch a model from the Hugging Face hub the package "
        "huggingface_hub is needed. Install it: pip install 'quern[hub]'.")

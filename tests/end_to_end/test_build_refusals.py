"""What `build` cannot build: exit code 2, one message, nothing left behind. Most run `main` here, some as a process."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import targets
from compiler import models, pipeline
from compiler.__main__ import main
from compiler.checkpoint import open_checkpoint
from compiler.codegen import nvrtc
from compiler.errors import UnsupportedError, UserError
from tests.checkpoint.gguf_files import write_llama
from tests.end_to_end import commands
from tests.end_to_end.places import DEMO, STORIES260K
from tests.tune.test_records import files_end_at

EDITED = "The configuration belongs to another checkpoint, or was edited."
HEADS = "num_attention_heads,num_key_value_heads,head_dim,hidden_size"


@pytest.fixture(autouse=True)
def _where_leftovers_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files and the current folder lie in tmp_path, too."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to damage."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refusal("--model", folder, ...): the message of a build that must be refused and must change no file."""

    def build(*arguments: object) -> str:
        before = commands.listing(tmp_path)
        code = main(["build", "--quiet", *map(str, arguments)])
        said = commands.message(code, *capsys.readouterr())
        assert commands.listing(tmp_path) == before
        return said

    return build


def test_a_target_of_kernels_alone(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert refusal("--target", "riscv64-v", "--out", tmp_path / "out") == (
        "--target riscv64-v: quern has kernels for it, but TVM has no runtime for riscv64 yet, so no bundle would run "
        "there; bundles are for x86_64 and aarch64. `bench --shape NAME --target riscv64-v --cost model` counts what "
        "its kernels execute."
    )


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def matrix(name: str, stated: list[int], real: list[int], keys: str) -> str:
    return (
        f"MODEL/config.json: {keys.split(',')[0]}: with {keys} as config.json states them, {name} must be {stated}, "
        f"but the checkpoint's is {real}. {EDITED}"
    )


EMBEDDING, GATE = "model.embed_tokens", "model.layers.0.mlp.gate_proj"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
LIES = [
    ({"hidden_size": 128}, matrix(Q, [256, 128], [256, 256], HEADS)),
    ({"vocab_size": 4096}, matrix(EMBEDDING, [4096, 256], [2048, 256], "vocab_size,hidden_size")),
    ({"vocab_size": 1024}, matrix(EMBEDDING, [1024, 256], [2048, 256], "vocab_size,hidden_size")),
    ({"intermediate_size": 512}, matrix(GATE, [512, 256], [768, 256], "intermediate_size,hidden_size")),
    ({"num_attention_heads": 4}, matrix(Q, [128, 256], [256, 256], HEADS)),
    ({"num_key_value_heads": 8}, matrix(K, [256, 256], [128, 256], HEADS)),
    ({"head_dim": 16}, matrix(Q, [128, 256], [256, 256], HEADS)),
    (
        {"num_hidden_layers": 7},
        "MODEL has no tensor 'model.layers.6.self_attn.q_proj.weight'. Is this the model that config.json describes?",
    ),
    (
        {"num_hidden_layers": 5},
        "MODEL: has the matrix 'model.layers.5.self_attn.q_proj' (7 such in all), which the model that config.json "
        f"describes does not use. {EDITED}",
    ),
    (
        {"model_type": "mamba"},
        f"MODEL/config.json: model_type is 'mamba', but quern knows {', '.join(models.known())}. "
        "docs/adding.md shows how to add an architecture: it is one file.",
    ),
    (
        {"sliding_window": 128},
        "MODEL/config.json: sliding_window is 128: quern does not know this key and will not guess what it changes. "
        "If it changes nothing in the computation, remove it; otherwise the model is not supported.",
    ),
    (
        {"eos_token_id": 2048},
        "MODEL/config.json: eos_token_id is 2048, but it must be an integer from 0 to 2047, or a list of them.",
    ),
]


def changed(value: object) -> str:
    """What a case is called: its keys."""
    return "-".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("keys", "message"), LIES, ids=changed)
def test_a_config_that_lies(model: Path, refusal: Callable[..., str], keys: dict[str, Any], message: str) -> None:
    edit(model / "config.json", lambda config: config.update(keys))
    assert refusal("--model", model, "--out", "bundle") == message.replace("MODEL", str(model))


QUANTISATION = [
    (
        {"rotate": True},
        "MODEL/config.json: quantization_config.rotate is true: quern does not know this key and will not guess what "
        "it changes. If it changes nothing in the computation, remove it; otherwise the model is not supported.",
    ),
    (
        {"quant_method": "exl3"},
        "MODEL: no format claims this checkpoint (quant_method is 'exl3'). quern knows: KNOWN. Take the model in one "
        "of these forms, or as plain float16 to be quantised here.",
    ),
    (
        {"bits": 8},
        "MODEL/config.json: quantization_config.bits is 8, but MODEL/quantize_config.json: bits is 4. Make them agree: "
        "both describe the same tensors.",
    ),
]


@pytest.mark.parametrize(("keys", "message"), QUANTISATION, ids=changed)
def test_a_quantisation_it_does_not_know(
    model: Path, refusal: Callable[..., str], keys: dict[str, Any], message: str
) -> None:
    from compiler.quant.formats import formats

    edit(model / "config.json", lambda config: config["quantization_config"].update(keys))
    known = ", ".join(format_.name for format_ in formats())
    want = message.replace("MODEL", str(model)).replace("KNOWN", known)
    assert refusal("--model", model, "--out", "bundle") == want


def test_a_truncated_checkpoint(model: Path, refusal: Callable[..., str], tmp_path: Path) -> None:
    file = model / "model.safetensors"
    last = max(open_checkpoint(model).tensors.items(), key=lambda item: item[1].offset)
    end, size = last[1].offset + last[1].nbytes, file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1000])
    want = (
        f"{file}: tensor {last[0]!r} ends at byte {end}, but the file has only {size - 1000}. "
        "The file is damaged: fetch it again."
    )
    said = refusal("--model", model, "--out", "bundle")
    assert said.split("tensor")[0] == want.split("tensor")[0]  # several tensors are cut off: any may be named
    assert said.endswith(f"but the file has only {size - 1000}. The file is damaged: fetch it again.")
    before = commands.listing(tmp_path)
    done = commands.run("compiler", "build", "--quiet", "--model", model, "--out", "bundle", cwd=tmp_path)
    assert commands.message(done.returncode, done.stdout, done.stderr) == said
    assert commands.listing(tmp_path) == before


def test_no_tokenizer(model: Path, refusal: Callable[..., str]) -> None:
    (model / "tokenizer.json").unlink()
    assert refusal("--model", model, "--out", "bundle") == (
        f"{model}: has no tokenizer.json, which the device needs to turn text into tokens. Fetch it with the "
        f"checkpoint; for a sentencepiece tokenizer.model, save the tokenizer once with transformers' save_pretrained."
    )


def test_a_tokenizer_of_another_model(model: Path, refusal: Callable[..., str]) -> None:
    extra = {"id": 2048, "content": "<extra>", "special": True, "normalized": False}
    extra |= {"lstrip": False, "rstrip": False, "single_word": False}
    edit(model / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(extra))
    assert refusal("--model", model, "--out", "bundle") == (
        f"{model / 'tokenizer.json'}: has token id 2048, but config.json's vocab_size is 2048. "
        "They belong to two models."
    )


def test_a_context_that_the_model_does_not_have(model: Path, refusal: Callable[..., str]) -> None:
    assert refusal("--model", model, "--out", "bundle", "--context", 513) == (
        f"--context asks for 513 positions, but {model / 'config.json'}: max_position_embeddings is 512. "
        "Ask for at most that."
    )


def test_options_without_effect(refusal: Callable[..., str]) -> None:
    assert refusal("--out", "bundle", "--bits", 4) == (
        f"{DEMO}: is quantised already, and --bits applies to dense linear layers. Leave --bits out."
    )
    assert refusal("--model", STORIES260K, "--out", "bundle", "--group-size", 32) == (
        "--group-size belongs to --bits, which is missing. Give both, or neither."
    )


def test_a_head_that_has_its_bits_already(tmp_path: Path) -> None:
    model, native = write_llama(tmp_path / "tiny.gguf", head="Q6_K"), targets.load("native")
    asked = pipeline.Request(tmp_path / "bundle", native)
    for bits in (None, 6):
        pipeline.import_checkpoint(model, replace(asked, head_bits=bits))
    with pytest.raises(UnsupportedError) as caught:
        pipeline.import_checkpoint(model, replace(asked, head_bits=4))
    assert str(caught.value) == (
        f"{model}: its output head has 6 bits already, and --head-bits applies to a dense one. Leave --head-bits out."
    )


def test_a_name_that_is_not_utf8(refusal: Callable[..., str]) -> None:
    assert refusal("--out", "b\udcff") == (
        "b\\udcff: this name is not UTF-8, and TVM writes to no other. Give --out another."
    )


def test_a_stage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "ir").mkdir()
    with files_end_at(100), pytest.raises(UserError) as caught:
        pipeline._dump(tmp_path / "ir", "1_graph.py", lambda: "x" * 1000)
    assert str(caught.value) == f"--dump-ir: {tmp_path}/ir/1_graph.py: cannot be written: File too large."
    assert list((tmp_path / "ir").iterdir()) == []


def test_folders_that_are_none(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    for name in ("notes", "tunning"):
        assert refusal("--out", "bundle", "--tuning-logs", name) == (
            f"--tuning-logs {name}: there is no such folder. Give the one that `tune --tuning-logs` wrote, or leave it "
            f"out."
        )
    assert refusal("--out", "bundle", "--dump-ir", "notes") == (
        "--dump-ir notes: is a file, but a folder is needed. Give another name."
    )


def test_what_a_gpu_needs_is_asked_first(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model, which is not there."""
    monkeypatch.setattr(nvrtc, "PTXAS", ("nvidia-no-such-wheel", "1.0", "ptxas"))
    assert refusal("--target", "jetson-orin", "--model", "nothing", "--out", "bundle") == (
        f"CUDA targets need nvidia-no-such-wheel 1.0 (a Python package). Install what building for CUDA needs: "
        f"{sys.executable} -m pip install 'quern[cuda]'."
    )


def test_what_chat_needs_is_read_before_the_compile(
    model: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "tokenizer_config.json").write_text("[")
    monkeypatch.setattr(pipeline, "fuse", lambda *_: pytest.fail("the compile began"))
    assert refusal("--model", model, "--out", "bundle") == (
        f"{model}/tokenizer_config.json: is not JSON: Expecting value: line 1 column 2 (char 1). Fetch the checkpoint "
        f"again."
    )


def test_a_model_that_is_not_there(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert refusal("--model", "nothing", "--out", "bundle") == (
        "nothing is not a folder. Give the folder that holds config.json and the .safetensors files, or a .gguf file."
    )


OUT = [  # --out, what is said of it; "other" is a folder with a file in it
    ("other/file", "other/file: is a file; a bundle is a folder. Give --out another name."),
    (
        "other",
        "other: is a folder with 'file' in it, which is no part of a bundle and would be lost: a build replaces the "
        "whole folder. Give --out a new name.",
    ),
    ("no/such/folder", "no/such/folder: there is no folder HERE/no/such. Create it first."),
    ("other/file/bundle", "other/file/bundle: there is no folder HERE/other/file. Create it first."),
]


@pytest.mark.parametrize(("out", "message"), OUT, ids=lambda value: value if " " not in value else "")
def test_a_place_for_no_bundle(tmp_path: Path, refusal: Callable[..., str], out: str, message: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("precious")
    want = message.replace("HERE", str(tmp_path))
    assert refusal("--out", out) == want
    before = commands.listing(tmp_path)
    done = commands.run("compiler", "build", "--out", out, cwd=tmp_path)  # as a process, and without --quiet
    assert commands.message(done.returncode, done.stdout, done.stderr) == want
    assert commands.listing(tmp_path) == before


def test_a_target_that_nobody_described(tmp_path: Path, refusal: Callable[..., str]) -> None:
    import targets

    want = f"There is no target 'rpi6'. Did you mean 'rpi5'? Known targets: {', '.join(targets.names())}."
    assert refusal("--out", "bundle", "--target", "rpi6") == want
    done = commands.run("compiler", "build", "--out", "bundle", "--target", "rpi6", cwd=tmp_path)
    assert commands.message(done.returncode, done.stdout, done.stderr) == want


def test_an_older_bundle_survives_a_refused_build(
    demo: Path, model: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    shutil.copytree(demo, tmp_path / "bundle")
    (model / "tokenizer.json").unlink()
    assert refusal("--model", model, "--out", "bundle").startswith(f"{model}: has no tokenizer.json")

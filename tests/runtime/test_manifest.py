"""The schema: what it writes it reads, and what it refuses, with whole messages."""
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from runtime import manifest as mf
from runtime.errors import ManifestError
from tests.runtime.tiny import signed

HEX = "0" * 64
CHUNKS = ["1" * 64, "2" * 64]


def example() -> dict[str, Any]:
    """A small manifest with everything in it, as JSON data."""
    return {
        "format": "quern-bundle", "version": 2, "abi": 1,
        "model": {"type": "llama", "name": "m", "vocab_size": 8, "context": 16, "layers": 1, "parameters": 9},
        "quantization": {"format": "gptq", "bits": 4, "sym": True, "damp": 0.5, "note": None},
        "target": {"name": "native", "arch": "x86_64", "triple": "x86_64-linux-gnu", "cpu": "x86-64-v3",
                   "features": ["avx2", "sse4_1"], "glibc": "2.28"},
        "tvm": {"version": "0.27.0.post1", "ffi_version": "0.1.14.post1"},
        "tuning": {"linear_m1": {"record": "0123456789abcdef", "knobs": {"unroll": 4}}},
        "library": "model.so",
        "functions": {
            "decode": {"tokens": 1, "inputs": ["ids", "span", "k", "table"],
                       "output": {"dtype": "float32", "shape": [1, 8]}},
            "prefill_4": {"tokens": 4, "inputs": ["ids", "span", "k", "table"],
                          "output": {"dtype": "float32", "shape": [1, 2]}, "tiled": "prefill_4_amx"},
            "logits_4": {"tokens": 4, "inputs": ["ids", "span", "k", "table"],
                         "output": {"dtype": "float32", "shape": [4, 8]}},
            "head_1": {"tokens": 1, "inputs": ["hidden", "norm"], "output": {"dtype": "float32", "shape": [1, 8]}},
        },
        "caches": [{"name": "k", "dtype": "float16", "shape": [16, 2]}],
        "weights": {"file": "weights.bin", "alignment": 64, "tensors": [
            {"name": "table", "dtype": "bfloat16", "shape": [8, 2], "offset": 0, "nbytes": 32},
            {"name": "norm", "dtype": "float32", "shape": [2], "offset": 64, "nbytes": 8}]},
        "memory": {"weights_bytes": 72, "cache_bytes": 64, "activation_bytes": 10, "planned_peak_bytes": 146},
        "tokens": {"bos": None, "eos": [1, 2]},
        "chat": {"format": "turns", "system": ["a", "b"], "user": ["c", "d"], "assistant": ["e", "f"], "start": "g",
                 "generation_prompt": "e", "default_system": "h"},
        "files": {"model.so": {"bytes": 5, "sha256": HEX},
                  "weights.bin": {"bytes": 72, "sha256": mf.digest_of_chunks(CHUNKS), "chunk_bytes": 64,
                                  "chunks": CHUNKS}},
    }  # fmt: skip


def refusal(data: Any) -> str:
    """The message that refuses this data, without the file name that opens it."""
    with pytest.raises(ManifestError) as caught:
        mf.loads(signed(data) if isinstance(data, dict) else json.dumps(data), "here")
    text = str(caught.value)
    assert text.startswith("here: ")
    return text[len("here: ") :]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The example with the value at a dotted path replaced; list indices are numbers; `...` deletes."""
    data = copy.deepcopy(example())
    place: Any = data
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def test_reads_what_it_writes() -> None:
    manifest = mf.loads(signed(example()))
    text = mf.dumps(manifest)
    assert mf.loads(text) == manifest
    assert mf.dumps(mf.loads(text)) == text
    assert {k: v for k, v in json.loads(text).items() if k != "sha256"} == example()


def test_a_gpu_is_kept() -> None:
    gpu: dict[str, Any] = {"arch": "sm_53", "ptx": "6.5", "cubin": False, "driver": "10.2"}
    manifest = mf.loads(signed(changed("target/gpu", gpu)))
    assert manifest.target.gpu == mf.Gpu(**gpu)
    assert json.loads(mf.dumps(manifest))["target"]["gpu"] == gpu


def test_null_chat_and_no_prefill_are_fine() -> None:
    data = changed("chat", None)
    data["functions"] = {"decode": data["functions"]["decode"]}
    manifest = mf.loads(signed(data))
    assert manifest.chat is None
    assert list(manifest.functions) == ["decode"]


@pytest.mark.parametrize(("path", "value", "message"), [
    ("format", "zip", 'no "format": "quern-bundle", so this is not a quern bundle. '
                      "Point at a directory that quern built."),
    ("version", 1, "version is 1, but this runtime reads version 2. Rebuild the bundle with this release of quern, "
                   "or use the runtime of the release that built it."),
    ("abi", True, "abi is True, but this runtime reads abi 1. Rebuild the bundle with this release of quern, "
                  "or use the runtime of the release that built it."),
])  # fmt: skip
def test_refuses_what_another_release_wrote(path: str, value: Any, message: str) -> None:
    assert refusal(changed(path, value)) == message


@pytest.mark.parametrize(("path", "value", "message"), [
    ("extra", 1, "top level: unknown key 'extra'"),
    ("model/context", ..., "model: key 'context' is missing"),
    ("model/layers", True, "model.layers is true, but an integer is needed"),
    ("model/context", 16.0, "model.context is 16.0, but an integer is needed"),
    ("model/name", None, "model.name is null, but a string is needed"),
    ("model/vocab_size", 0, "model.vocab_size is 0, but must lie in 1..67108864"),
    ("quantization/bits", [4], "quantization.bits is [4], but a string, number, true, false or null is needed"),
    ("target/arch", "riscv64", "target.arch is 'riscv64', but must be one of x86_64, aarch64"),
    ("target/glibc", "new", "target.glibc is 'new', but must begin like 2.28"),
    ("target/gpu", {"arch": "87", "ptx": "7.4", "cubin": True, "driver": "11.4"},
     "target.gpu.arch is '87', but must look like sm_87"),
    ("target/gpu", {"arch": "sm_87", "ptx": "7.4", "cubin": True, "driver": "new"},
     "target.gpu.driver is 'new', but must look like 11.4"),
    ("target/gpu", {"arch": "sm_87", "ptx": "7.4", "cubin": 1, "driver": "11.4"},
     "target.gpu.cubin is 1, but true or false is needed"),
    ("target/features", ["a b"], "target.features has 'a b', which /proc/cpuinfo cannot contain"),
    ("tuning/linear_m1/record", "XY", "tuning.linear_m1.record is 'XY', but must be 16 lower-case hex digits"),
    ("tuning/linear_m1/knobs", {"un roll": 1}, "tuning has 'un roll', but names are letters, digits and _"),
    ("tuning/linear_m1/knobs/unroll", -1, "tuning.linear_m1.knobs.unroll is -1, but must lie in 0..67108864"),
    ("tuning/linear_m1/knobs/unroll", "4", 'tuning.linear_m1.knobs.unroll is "4", but an integer is needed'),
    ("library", "../model.so", "library has '../model.so', but a file name must be letters, digits and ._+- "
                               "without a leading dot"),
    ("library", "other.so", "library is 'other.so', which has no entry under files"),
    ("files/a\\b", {"bytes": 1, "sha256": HEX}, "files has 'a\\\\b', but a file name must be letters, digits and ._+- "
                                                "without a leading dot"),
    ("files/manifest.json", {"bytes": 1, "sha256": HEX}, "files lists manifest.json, which cannot hold its own digest"),
    ("files/model.so/sha256", "AB", "files.model.so has the digest 'AB', but SHA-256 is 64 lower-case hex digits"),
    ("files/weights.bin/chunks", ..., "files.weights.bin has only one of chunks and chunk_bytes"),
    ("files/weights.bin/chunk_bytes", 72, "files.weights.bin has 2 chunks, but 72 bytes in chunks of 72 make 1"),
    ("files/weights.bin/sha256", HEX, "files.weights.bin.sha256 is not the digest of its chunk digests"),
    ("weights/alignment", 32, "weights.alignment is 32, but must lie in 64..4096"),
    ("weights/alignment", 96, "weights.alignment is 96, but must be a power of two"),
    ("weights/tensors/0/dtype", "float64", "weight 'table' has dtype 'float64', but must be one of float32, float16, "
                                           "bfloat16, int8, uint8, int16, int32"),
    ("weights/tensors/0/shape", [8, -2], "weight 'table' has shape [8, -2], but 1 to 8 positive dimensions are needed"),
    ("weights/tensors/0/nbytes", 33, "weight 'table' has nbytes 33, but bfloat16[8, 2] takes 32"),
    ("weights/tensors/1/offset", 8, "weight 'norm' has offset 8, which is no multiple of the alignment 64"),
    ("weights/tensors/1/offset", -64, "weight 'norm' has offset -64, which is no multiple of the alignment 64"),
    ("weights/tensors/1/offset", 128, "weight 'norm' ends at byte 136, but weights.bin has only 72"),
    ("weights/tensors/1/offset", 0, "weight 'norm' begins at byte 0, inside weight 'table', which ends at 32"),
    ("weights/tensors/1/name", "table", "array 'table' appears twice"),
    ("weights/tensors/1/name", "span", "array 'span' appears twice"),
    ("caches/0/shape", [1 << 40, 1 << 40], "cache 'k' takes 2417851639229258349412352 bytes, more than 70368744177664"),
    ("memory/cache_bytes", 63, "memory.cache_bytes is 63, but the caches take 64"),
    ("memory/weights_bytes", 71, "memory.weights_bytes is 71, but weights.bin has 72"),
    ("functions/decode", ..., "functions has no 'decode'"),
    ("functions/head_1", ..., "functions has no 'head_1'"),
    ("functions/logits_4", ..., "functions has no 'logits_4'"),
    ("functions/prefill_4", ...,
     "functions has 'logits_4', but only decode is known, and prefill_M with its logits_M and head_1"),
    ("functions/prefill_4/tokens", 5, "functions.prefill_4.tokens is 5, but must lie in 4..4"),
    ("functions/prefill_4/tiled", "decode",
     "functions.prefill_4.tiled is 'decode', but only 'prefill_4_amx' is known"),
    ("functions/decode/counted", True,
     "functions.decode.counted is True, but only functions of several tokens have it, as true"),
    ("functions/prefill_4/counted", False,
     "functions.prefill_4.counted is False, but only functions of several tokens have it, as true"),
    ("functions/logits_4/inputs/1", "norm", "functions.logits_4 has no input 'span'"),
    ("functions/prefill_4/output/shape", [4, 2],
     "functions.prefill_4.output is float32[4, 2], but float32[1, 2] is needed"),
    ("functions/prefill_x", {"tokens": 1, "inputs": [], "output": {"dtype": "float32", "shape": [1, 8]}},
     "functions has no 'logits_x'"),
    ("functions/main", {"tokens": 1, "inputs": [], "output": {"dtype": "float32", "shape": [1, 8]}},
     "functions has 'main', but only decode is known, and prefill_M with its logits_M and head_1"),
    ("functions/decode/inputs/3", "tabel",
     "functions.decode has the input 'tabel', which is neither a weight nor a cache"),
    ("functions/decode/inputs/0", "k", "functions.decode: input 'k' appears twice"),
    ("functions/head_1/inputs/0", "table", "functions.head_1 has no input 'hidden'"),
    ("functions/decode/output/shape", [1, 9], "functions.decode.output is float32[1, 9], but float32[1, 8] is needed"),
    ("tokens/eos", [8], "tokens.eos is 8, but must lie in 0..7"),
    ("chat/format", "jinja", "chat.format is 'jinja', but only 'turns' is known"),
    ("chat/user", ["x"], 'chat.user is ["x"], but a list of 2 is needed'),
    ("chat/system", None, "chat.default_system is given, but chat.system is null"),
])  # fmt: skip
def test_refuses(path: str, value: Any, message: str) -> None:
    assert refusal(changed(path, value)) == f"{message}. Rebuild the bundle with this release of quern."


def test_refuses_what_is_no_object() -> None:
    assert refusal([]) == ('no "format": "quern-bundle", so this is not a quern bundle. '
                           "Point at a directory that quern built.")  # fmt: skip


def test_refuses_a_change_by_hand() -> None:
    text = signed(example()).replace('"context": 16', '"context": 99')
    with pytest.raises(ManifestError) as caught:
        mf.loads(text, "here")
    assert str(caught.value) == ("here: is damaged or was changed by hand: its sha256 is not that of its other keys. "
                                 "Copy the bundle again or rebuild it.")  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), [
    ("", "Expecting value: line 1 column 1 (char 0)"),
    ('{"a": 1, "a": 2}', "key 'a' appears twice"),
    ('{"a": NaN}', "NaN is not JSON"),
])  # fmt: skip
def test_refuses_what_is_no_json(text: str, reason: str) -> None:
    with pytest.raises(ManifestError) as caught:
        mf.loads(text, "here")
    assert str(caught.value) == f"here: not valid JSON ({reason}). Copy the bundle again or rebuild it."


def test_refuses_bottomless_json_and_wrong_bytes() -> None:
    for raw in (b"[" * 100_000, b'{"a": "\xff"}'):
        with pytest.raises(ManifestError, match=r"^here: not valid JSON"):
            mf.loads(raw, "here")


def test_the_writer_refuses_too(tmp_path: Path) -> None:
    manifest = mf.loads(signed(example()))
    object.__setattr__(manifest, "library", "/etc/passwd")
    with pytest.raises(ManifestError):
        mf.dump(manifest, tmp_path / "manifest.json")
    assert not list(tmp_path.iterdir())


def test_chunked_digest_by_hand(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "f"
    path.write_bytes(b"abcde")
    parts = [hashlib.sha256(p).digest() for p in (b"ab", b"cd", b"e")]
    digest = mf.digest_file(path, 2)
    assert digest == mf.FileDigest(5, hashlib.sha256(b"".join(parts)).hexdigest(), 2, tuple(p.hex() for p in parts))
    assert mf.digest_file(path) == mf.FileDigest(5, hashlib.sha256(b"abcde").hexdigest())

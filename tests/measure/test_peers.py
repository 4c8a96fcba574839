"""Peers are found by walking, refuse by name, and, where one is installed, run beside quern."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compiler import pipeline
from compiler.__main__ import main
from compiler.errors import UnsupportedError, UserError
from compiler.measure import peers, shapes
from compiler.measure.compare import Workload
from compiler.measure.engines import Engines
from compiler.measure.growth import Setup
from compiler.measure.peers import PeerModel, llama_cpp, onnxruntime_genai, openvino
from compiler.progress import Reporter
from runtime import manifest as mf
from targets import load
from tests.runtime import tiny

REPO = Path(__file__).parents[2]
STORY = REPO / "tests" / "models" / "storyteller-5m-gptq-4bit-g128"
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256}  # fmt: skip


def test_every_file_is_a_peer() -> None:
    assert sorted(peers.names()) == ["llama.cpp", "onnxruntime-genai", "openvino"]
    for text, name, variant in (
        ("llama.cpp", "llama.cpp", "native"),
        ("llama.cpp:avx2", "llama.cpp", "avx2"),
        ("onnxruntime-genai", "onnxruntime-genai", "block-32"),
    ):
        peer, found = peers.find(text)
        assert (peer.NAME, found) == (name, variant)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ollama", "--against ollama: there is no peer 'ollama'. Known peers: llama.cpp, onnxruntime-genai, openvino."),
        ("llama.cpp:sse", "--against llama.cpp:sse: llama.cpp has no variant 'sse'. Known: native, no-amx, avx2."),
    ],
)
def test_unknown(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        peers.find(text)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("llama.cpp:avx2", "llama.cpp (AVX2 and FMA only) is not installed: llama.cpp-0.3.36/avx2/bin/llama-bench"),
        ("openvino", "openvino (the CPU plugin with its defaults) is not installed: openvino-2026.4.1/venv"),
        ("onnxruntime-genai", "onnxruntime-genai (a scale for 32 weights, as its model builder makes) is not "
                              "installed: onnxruntime-genai-0.18.0/venv"),
    ],
)  # fmt: skip
def test_what_is_not_installed_says_how(
    text: str, lacks: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--shape", "a72-count", "--against", text, "--peers-dir", str(tmp_path)]) == 2
    said = (
        f"error: {lacks} is not in {tmp_path}. Run the same command with --install-peers: it goes into an environment "
        f"of its own there and touches nothing else.\n"
    )
    assert capsys.readouterr() == ("", said)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert peers.place(None) == tmp_path / "quern" / "peers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert peers.place(None) == Path.home() / ".cache" / "quern" / "peers"


def test_the_mend_of_amx_is_made_once_and_only_where_it_fits(tmp_path: Path) -> None:
    file = tmp_path / "mmq.cpp"
    file.write_text("    tc.rows[7] = 16;\n\n    _tile_loadconfig(&tc);\n")
    _, place, more = llama_cpp.MENDS[0]
    llama_cpp.mend(file, place, more)
    barrier = '    __asm__ volatile("" ::: "memory");\n'
    assert file.read_text() == f"    tc.rows[7] = 16;\n\n{barrier}    _tile_loadconfig(&tc);\n"
    file.write_text("    _tile_loadconfig(&other);\n")
    with pytest.raises(UserError) as caught:
        llama_cpp.mend(file, place, more)
    assert str(caught.value) == f"{file}: has changed where quern mends llama.cpp. Report this to quern."


def test_the_estimate_is_read() -> None:
    assert llama_cpp.final_estimate("[1]15.2,[2]14.9,\nFinal estimate: PPL = 14.8812 +/- 0.42\n") == 14.8812
    with pytest.raises(UserError) as caught:
        llama_cpp.final_estimate("no tokens")
    assert str(caught.value) == "llama-perplexity gave no estimate. It said:\nno tokens"


@pytest.mark.parametrize(
    ("peer", "model", "said"),
    [
        (openvino, PeerModel(shapes.settings("a72-count"), 3, 128, 3),
         "openvino: has 4-bit and 8-bit weights here, not 3 and 3."),
        (openvino, PeerModel({**SMALL, "model_type": "gemma2"}, 4, 128, 4),
         "openvino: the comparison makes llama and mistral graphs, not gemma2."),
        (onnxruntime_genai, PeerModel(shapes.settings("a72-count"), 2, 128, 2),
         "onnxruntime-genai: has 4-bit and 8-bit weights here, not 2 and 2."),
        (onnxruntime_genai, PeerModel(shapes.settings("a72-count"), 4, 43, 4),
         "onnxruntime-genai: has groups of 16, 32, 64, 128, 256, not 43."),
        (llama_cpp, PeerModel(shapes.settings("a72-count"), 16, 0, 16),
         "llama.cpp: is compared with 2, 3, 4, 5, 6 and 8 bits, not 16 with a head of 16."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_peer_cannot_run(peer: peers.Peer, model: PeerModel, said: str, tmp_path: Path) -> None:
    variant = "same-group" if peer.NAME == "onnxruntime-genai" else next(iter(peer.VARIANTS))
    with pytest.raises(UnsupportedError) as caught, peer.opened(tmp_path, variant, model, 1):
        pass
    assert str(caught.value) == said


def test_other_engines_are_compared_with_quantised_weights(tmp_path: Path) -> None:
    found = tiny.build(tmp_path / "toy")
    quantization: dict[str, mf.Scalar] = {"format": "none", "bits": 16, "group_size": None, "head_bits": 16}
    mf.dump(replace(found, quantization=quantization), tmp_path / "toy" / mf.FILE_NAME)
    setup = Setup("tinyllama-1.1b", 4, 128, 4, Workload(1, 1, 1, 1))
    with pytest.raises(UserError) as caught:
        Engines({}, tmp_path, STORY)._model(tmp_path / "toy", setup)
    assert str(caught.value) == (
        f"{tmp_path}/toy: its linear layers are not quantised, and other engines are compared with quantised ones. "
        "Build it with --bits 4 or --bits 8."
    )


def test_a_wrong_checkpoint_is_told_before_anything_is_installed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Engines.installed(["openvino"], tmp_path, tmp_path / "gone", True, print)
    assert str(caught.value) == (
        f"{tmp_path}/gone is not a folder. Give the folder that holds config.json and the .safetensors files, or a "
        ".gguf file."
    )


def _installed(text: str) -> None:
    peer, variant = peers.find(text)
    if peer.missing(peers.place(None), variant) is not None:
        pytest.skip(f"the peer {text} is not installed: bench --against {text} --install-peers")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["llama.cpp", "llama.cpp:avx2", "openvino", "onnxruntime-genai"])
def test_side_by_side(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _installed(text)
    monkeypatch.setitem(shapes.SHAPES, "small", {**shapes.LLAMA, **SMALL})
    options = ["--shape", "small", "--prompt-tokens", "16", "--context", "8", "--decode-tokens", "4", "--rounds", "2"]
    assert main(["bench", *options, "--threads", "1", "--against", text, "--json"]) == 0
    quern, peer = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert quern["name"] == "quern" and peer["name"].startswith(text.partition(":")[0])
    assert peer["prefill_ratio"]["median"] > 0 and peer["decode_ratio"]["median"] > 0


@pytest.mark.slow
def test_the_same_weights_have_the_same_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Q4_0 holds the demo model's codes; llama.cpp rounds activations to blocks of 32, quern to groups of 128."""
    _installed("llama.cpp")
    pipeline.build(STORY, pipeline.Request(tmp_path / "story", load("native")), Reporter(quiet=True))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small dog who liked to play with a red ball. " * 60)
    options = ["--prompt-tokens", "16", "--context", "8", "--decode-tokens", "4", "--rounds", "1", "--threads", "1"]
    beside = ["--against", "llama.cpp", "--model", str(STORY), "--perplexity", str(text), "--json"]
    assert main(["bench", str(tmp_path / "story"), *options, *beside]) == 0
    quern, peer = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert peer["perplexity"] == pytest.approx(quern["perplexity"], rel=0.02)

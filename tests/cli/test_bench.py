"""What bench refuses before it compiles anything; tests/measure/ has the measuring."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.__main__ import main
from compiler.cli import bench
from runtime import device


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "bench measures either a BUNDLE or a --shape: give one of the two."),
        (["story", "--shape", "a72-count"], "bench measures either a BUNDLE or a --shape: give one of the two."),
        (["story", "--rounds", "0"], "--rounds is 0, but it must be at least 1."),
        (["story", "--prompt-tokens", "-3"], "--prompt-tokens is -3, but it must be at least 1."),
        (["story", "--decode-tokens", "0"], "--decode-tokens is 0, but it must be at least 1."),
        (["story", "--threads", "0"], "--threads is 0, but it must be at least 1."),
        (["--shape", "a72-count", "--group-size", "0"], "--group-size is 0, but it must be at least 1."),
        (["--shape", "a72-count", "--context", "-1"], "--context is -1, but it must be at least 0."),
        (["--shape", "gpt-9"],
         "There is no shape 'gpt-9'. Known shapes: tinyllama-1.1b, llama-0.1b, llama-0.5b, qwen2.5-0.5b, llama-3.2-1b, "
         "llama-3.2-3b, llama-2-7b, llama-3-8b, qwen2.5-1.5b, a72-count."),
        (["--growth", "size", "--growth-values", "llama-0.1b,gpt-9"],
         "There is no shape 'gpt-9'. Known shapes: tinyllama-1.1b, llama-0.1b, llama-0.5b, qwen2.5-0.5b, llama-3.2-1b, "
         "llama-3.2-3b, llama-2-7b, llama-3-8b, qwen2.5-1.5b, a72-count."),
        (["story", "--growth", "bits"],
         "--growth builds models of its own: give a --shape, or nothing, instead of a BUNDLE."),
        (["--shape", "a72-count", "--plot", "x.svg"],
         "--plot and --growth-values belong to --growth, which is missing."),
        (["--shape", "a72-count", "--perplexity", "x.txt"],
         "--perplexity needs a BUNDLE: random weights have none worth knowing."),
        (["story", "--against", "llama.cpp"],
         "--against runs the peer on the same weights. Add --model with the checkpoint of the bundle."),
        (["story", "--model", "x"],
         "--model belongs to a BUNDLE and --against: it is where the peer's weights come from."),
        (["story", "--perplexity", "x.txt", "--windows", "1"], "--windows is 1, but it must be at least 2."),
        (["story", "--against", "llama.cpp", "--model", __file__],
         f"{__file__}: --against writes the peer's file from a checkpoint folder. For a GGUF file, run "
         f"llama.cpp's llama-bench on the file itself."),
        *[(["story", option, value],
           f"{option} goes with a --shape: a BUNDLE was built with its own. Leave one of the two out.")
          for option, value in (("--kv-cache", "int8"), ("--bits", "8"), ("--group-size", "64"), ("--head-bits", "8"),
                                ("--target", "native"), ("--multiprocessors", "16"))],
        *[(["story", *options], f"{options[0]} belongs to {other}, which is missing. Give both, or neither.")
          for options, other in ((["--port", "22"], "--host"), (["--identity", "key"], "--host"),
                                 (["--windows", "4"], "--perplexity"), (["--install-peers"], "--against"),
                                 (["--peers-dir", "there"], "--against"))],
        *[(["story", "--board", "qemu", option, "2"],
           f"--board counts one decoded token and one prompt, and times nothing: leave {option} out.")
          for option in ("--threads", "--rounds", "--decode-tokens")],
        (["story", "--host", "pi", "--threads", "1,2"], "--host takes one number of --threads at a time."),
        (["--host", "", "--growth", "bits"], "--growth runs on this machine: leave it or --host out."),
        (["story", "--growth-values", ""], "--plot and --growth-values belong to --growth, which is missing."),
        *[(["--growth", kind, option, value],
           f"--growth {kind} takes its points from --growth-values, not from {option}: leave that out.")
          for kind, option, value in (("context", "--context", "128"), ("prompt", "--prompt-tokens", "512"),
                                      ("size", "--shape", "llama-2-7b"), ("group", "--group-size", "128"),
                                      ("bits", "--bits", "4"), ("bits", "--head-bits", "4"))],
        (["--growth", "context", "--prompt-tokens", "512"],
         "--growth context measures decoding alone: leave --prompt-tokens out."),
        *[(["--growth", "prompt", option, "16"], f"--growth prompt measures prompts alone: leave {option} out.")
          for option in ("--decode-tokens", "--context")],
        (["--shape", "a72-count", "--target", "rpi4", "--cost", "model", "--kv-cache", "int8"],
         "--kv-cache goes with a --shape that is measured: --cost model knows the default alone."),
        (["story", "--profile", "--perplexity", "x.txt"],
         "--profile times kernels on this machine and nothing else: leave it or --perplexity out."),
        (["--shape", "a72-count", "--target", "rpi4"],
         "rpi4: bench builds a shape and measures it on this machine, which cannot run it: it is built for aarch64 "
         f"(rpi4), but this machine is {device.arch()}. --cost model forecasts, and a BUNDLE with --host is measured "
         "on its device."),
        (["--growth", "bits", "--target", "rpi4"],
         "rpi4: bench builds a shape and measures it on this machine, which cannot run it: it is built for aarch64 "
         f"(rpi4), but this machine is {device.arch()}. --cost model forecasts, and a BUNDLE with --host is measured "
         "on its device."),
        (["story", "--record", f"{__file__}/x"], f"{__file__}: File exists."),
        (["story", "--record", "/"], "/: Is a directory."),
        (["--shape", "a72-count", "--target", "rpi4", "--cost", "model", "--against", "openvino"],
         "--cost model measures nothing and runs no engine: leave it or --against out."),
        *[(["--shape", "a72-count", "--target", "rpi4", "--cost", "model", option, "2"],
           f"--cost model measures nothing and runs no engine: leave it or {option} out.")
          for option in ("--threads", "--rounds", "--prompt-tokens", "--decode-tokens")],
        (["story", "--cost", "model"], "--cost model compiles a shape for its target: give a --shape, not a BUNDLE."),
        (["--shape", "a72-count", "--target", "rpi"],
         "There is no target 'rpi'. Did you mean 'rpi5'? Known targets: native, aarch64, cuda-sm53, cuda-sm72, "
         "cuda-sm87, cuda-sm90, jetson-nano, jetson-orin, jetson-xavier, riscv64-v, rpi3, rpi4, rpi5, "
         "sapphire-rapids, snapdragon-8gen2, x86-64."),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_threads_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_on_gpu", lambda path: True)
    assert main(["bench", "story", "--threads", "1,2"]) == 2
    assert capsys.readouterr() == ("", "error: story: runs on a GPU, and threads are the CPU's. Leave --threads out.\n")


def test_each_number_of_threads_is_recorded_when_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(options: object, path: object, target: object, work: object, threads: int) -> list[dict[str, object]]:
        if threads == 2:
            raise KeyboardInterrupt
        return [{"threads": threads}]

    monkeypatch.setattr(bench, "_alone", alone)
    monkeypatch.setattr(bench, "_on_gpu", lambda path: False)
    monkeypatch.setattr(bench, "_fitting", lambda path, work: work)
    assert main(["bench", "story", "--threads", "1,2", "--record", str(tmp_path / "r.jsonl")]) == 130
    assert (tmp_path / "r.jsonl").read_text() == '{"threads": 1}\n'


def test_a_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "story")]) == 2
    said = f"error: {tmp_path / 'story'}: there is no such directory. Point at a directory that quern built.\n"
    assert capsys.readouterr() == ("", said)


def test_threads_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"1,2,x": "'1,2,x' is not a number, nor several with commas", "2,2": "'2,2' has a number twice"}
    for given, said in refused.items():
        with pytest.raises(SystemExit) as left:
            main(["bench", "story", "--threads", given])
        assert left.value.code == 2
        help_ = "For what there is: python -m compiler bench --help"
        assert capsys.readouterr().err == f"error: argument --threads: {said}. {help_}\n"

"""The command line: what it prints, how it fails, and that it runs alone."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import manifest
from runtime.__main__ import main
from runtime.session import Session
from tests.runtime import tiny

ROOT = Path(__file__).parents[2]


def run(*arguments: object, cwd: Path = ROOT, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """The runtime in a process of its own."""
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a run that must fail with exit code 2 and print nothing else."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err[len("error: ") : -1]


def greedy(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(tiny.reference(ids)[-1].argmax()))
    return ids[len(prompt) :]


PROMPT, PROMPT_IDS = "bcd", [3, 4, 5]


def test_generate_json_is_greedy_and_exact(toy: Path) -> None:
    done = run("generate", toy, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", "--ignore-eos", "--threads", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert sorted(result) == ["decode_s", "first_token_s", "load_s", "peak_rss_mib", "prefill_s", "prompt_tokens",
                              "stop_reason", "text", "threads", "tokens"]  # fmt: skip
    assert result["tokens"] == greedy(PROMPT_IDS, 12)
    assert result["text"] == "".join(tiny.ALPHABET[t] for t in result["tokens"] if t > 1).replace("Ġ", " ")
    assert (result["prompt_tokens"], result["stop_reason"], result["threads"]) == (3, "length", 2)
    assert 0 < result["load_s"] < result["first_token_s"] < 60
    assert 10 < result["peak_rss_mib"] < 400


def test_generate_streams_text_and_reports_on_stderr(toy: Path) -> None:
    as_json = json.loads(run("generate", toy, "--prompt", PROMPT, "--json").stdout)
    done = run("generate", toy, "--prompt", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == as_json["text"] + "\n"
    assert done.stderr.startswith(f"{len(as_json['tokens'])} tokens ({as_json['stop_reason']}), decode ")


def test_a_seed_repeats(toy: Path) -> None:
    options = ("generate", toy, "--prompt", PROMPT, "--json", "--temperature", 1.5, "--top-k", 9, "--seed", 4)
    first, second = (json.loads(run(*options).stdout)["tokens"] for _ in range(2))
    assert first == second


def test_runs_alone_when_copied_out(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, runtime.__main__ as m; code = m.main(sys.argv[1:]); "
        "print(sorted(n for n in ('tvm', 'tvm_ffi', 'compiler', 'torch') if n in sys.modules), file=sys.stderr); "
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "generate", str(toy), "--prompt", PROMPT, "--max-new-tokens", "3", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


OPENS = """
import sys
sys.path.insert(0, {root!r})
opened, early = [], []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) or event == "ctypes.dlopen" and args[0]:
        name = str(args[0])
        if name.startswith({bundle!r}):
            opened.append(name.rpartition("/")[2])
        if name.endswith("weights.bin"):
            early.append("numpy" in sys.modules)
sys.addaudithook(hook)
from runtime.__main__ import main
code = main(["generate", {bundle!r}, "--prompt", "bcd", "--max-new-tokens", "2", "--json"])
print(sorted(opened), early, file=sys.stderr)
sys.exit(code)
"""


def test_a_start_reads_each_file_once_and_begins_with_the_weights(toy: Path, tmp_path: Path) -> None:
    """Their digest takes longest: it runs in threads while numpy and the other libraries are loaded."""
    code = OPENS.format(root=str(ROOT), bundle=str(toy))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    # tokenizer.json is read once more by its library, outside Python, and model.so is mapped by TVM
    assert done.stderr == "['manifest.json', 'model.so', 'tokenizer.json', 'weights.bin'] [False]\n"


def test_chat_over_a_pipe(toy: Path) -> None:
    done = run("chat", toy, "--max-new-tokens", 2, stdin="ab\n/reset\nab\n")
    assert (done.returncode, done.stderr) == (0, "")
    first, note, second = done.stdout.splitlines()
    assert note == "(new conversation)"
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "story"], "the following arguments are required: --prompt. For what there is: python -m runtime "
         "generate --help"),
        (["info", "story", "--fast"], "unrecognized arguments: --fast. For what there is: python -m runtime info "
         "--help"),
        (["bench", "story", "--threads", "x"], "argument --threads: invalid int value: 'x'. For what there is: python "
         "-m runtime bench --help"),
    ],
    ids=str,
)  # fmt: skip
def test_a_command_that_is_none(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert (caught.value.code, capsys.readouterr()) == (2, ("", f"error: {said}\n"))


def test_info(toy: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(toy), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["refusals"] == []
    assert data["model"]["context"] == tiny.CONTEXT
    target = {**data["target"], "features": ["made_up"]}
    tiny.edit_manifest(bundle, target=target)
    assert main(["info", str(bundle)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "runs here:    no: it is built for native (generic), but this CPU lacks made_up"
    )


def test_info_about_half_a_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (bundle / "weights.bin").stat().st_size
    (bundle / "model.so").unlink()
    os.truncate(bundle / "weights.bin", size - 1)
    refusals = [
        f"{bundle}/model.so: cannot be read: No such file or directory. Copy the bundle again",
        f"{bundle}/weights.bin: has {size - 1} bytes, but the manifest says {size}. Copy the bundle again",
    ]
    assert main(["info", str(bundle)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"runs here:    no: {'; '.join(refusals)}"
    assert main(["info", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["refusals"] == refusals


def test_info_reads_every_byte_if_asked(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(bundle), "--verify"]) == 0
    assert "digests:      right, of every file" in capsys.readouterr().out.splitlines()
    assert main(["info", str(bundle), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is True
    blob = bytearray((bundle / "weights.bin").read_bytes())
    blob[-1] ^= 1
    (bundle / "weights.bin").write_bytes(blob)
    assert main(["info", str(bundle)]) == 0
    assert capsys.readouterr().out.endswith("runs here:    yes\n")
    assert main(["info", str(bundle), "--verify"]) == 2
    assert capsys.readouterr() == (
        "", f"error: {bundle}/weights.bin: is damaged: its SHA-256 is not the manifest's. Copy the bundle again or "
        "rebuild it.\n")  # fmt: skip


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "uint16"])
def test_logits(toy: Path, tmp_path: Path, dtype: str) -> None:
    ids = np.arange(2, 29, dtype=dtype)
    np.save(tmp_path / "ids.npy", ids)
    assert main(["logits", str(toy), "--ids", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "out.npy")]) == 0
    logits = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, tiny.reference(ids.tolist()))
    last = ["--out", str(tmp_path / "out.npy"), "--last"]
    assert main(["logits", str(toy), "--ids", str(tmp_path / "ids.npy"), *last]) == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), logits[-1:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "out.npy"]


@pytest.mark.parametrize(("ids", "message"), [
    (np.zeros(49, int), "49 tokens do not fit into the context of 48, which holds 0 already. Use a shorter prompt, or "
                        "rebuild the bundle with a longer context (python -m compiler build --context)."),
    (np.array([3, 32]), "token id 32 is outside the vocabulary 0..31."),
    (np.array([3, -1]), "token id -1 is outside the vocabulary 0..31."),
    (np.zeros((2, 2), int), "{ids}: is int64[2, 2], but a list of at least one integer is needed."),
    (np.zeros(3, np.float32), "{ids}: is float32[3], but a list of at least one integer is needed."),
    (np.zeros(0, int), "{ids}: is int64[0], but a list of at least one integer is needed."),
    (np.array([{}], object), "{ids}: is no .npy file that can be read: Array can't be memory-mapped: "
                             "Python objects in dtype."),
    (b"PK\x03\x04", "{ids}: is no .npy file. Save the ids with numpy.save."),
    (b"", "{ids}: is no .npy file. Save the ids with numpy.save."),
    (None, "{ids}: cannot be read: No such file or directory."),
])  # fmt: skip
def test_logits_refuses(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: Any, message: str
) -> None:
    path = tmp_path / "ids.npy"
    if isinstance(ids, bytes):
        path.write_bytes(ids)
    elif ids is not None:
        np.save(path, ids)
    before = sorted(tmp_path.iterdir())
    assert fails(capsys, "logits", toy, "--ids", path, "--out", tmp_path / "out.npy") == message.format(ids=path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_header_that_promises_too_much(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ids.npy"
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + b"12345678")
    assert fails(capsys, "logits", toy, "--ids", path, "--out", tmp_path / "o.npy").startswith(
        f"{path}: is no .npy file that can be read: "
    )


def test_ids_that_can_be_read_once(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert fails(capsys, "logits", toy, "--ids", tmp_path / "pipe", "--out", tmp_path / "out.npy") == (
        f"{tmp_path / 'pipe'}: is no regular file, and .npy files are mapped. Save the ids with numpy.save."
    )


def test_names_that_the_system_refuses(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / ("a" * 300)
    assert fails(capsys, "generate", long, "--prompt", "b") == f"{long}: File name too long."
    np.save(tmp_path / "ids.npy", np.array([2]))
    assert fails(capsys, "logits", toy, "--ids", tmp_path / "ids.npy", "--out", long) == f"{long}: File name too long."


def test_no_name_moves_a_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "info", tmp_path / "\x1b[2Jb") == (
        f"{tmp_path}/\\x1b[2Jb: there is no such directory. Point at a directory that quern built."
    )
    made = tiny.build(tmp_path / "toy")
    hostile = dataclasses.replace(made, model=dataclasses.replace(made.model, name="\x1b[2Jtoy"))
    manifest.dump(hostile, tmp_path / "toy" / "manifest.json")
    assert main(["info", str(tmp_path / "toy")]) == 0
    assert capsys.readouterr().out.startswith("model:        \\x1b[2Jtoy (")


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_statistics_that_nobody_can_read(toy: Path, closed: str) -> None:
    """They never get into the text; where they cannot be written at all, the exit code says so."""
    command = f"{sys.executable} -m runtime generate {toy} --prompt bcd --max-new-tokens 3 --ignore-eos {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    text = "".join(tiny.ALPHABET[t] for t in greedy(PROMPT_IDS, 3) if t > 1).replace("Ġ", " ")
    assert (done.stdout, done.returncode) == (f"{text}\n", 2 if "full" in closed else 0)


@pytest.mark.parametrize(
    ("options", "key", "said"),
    [
        (["--host", ""], "", "host is empty. Give an address of this machine with --host; 0.0.0.0 is all of them."),
        ([], "a b", "QUERN_API_KEY has a space or a character that is not ASCII. Set another key."),
        ([], "\u00e9", "QUERN_API_KEY has a space or a character that is not ASCII. Set another key."),
    ],
)
def test_serve_refuses(
    toy: Path, options: list[str], key: str, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("QUERN_API_KEY", key)
    assert fails(capsys, "serve", toy, *options) == said


def test_logits_to_an_impossible_place(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", np.array([2]))
    os.mkfifo(tmp_path / "device")
    for out in (tmp_path, tmp_path / "no" / "out.npy", tmp_path / "device"):
        assert fails(capsys, "logits", toy, "--ids", tmp_path / "ids.npy", "--out", out) == (
            f"{out}: cannot be written: it is a directory or a device, or is in a directory that does not exist. "
            f"Name a .npy file."
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["device", "ids.npy"]
    assert (tmp_path / "device").is_fifo()


def test_a_kill_leaves_no_half_written_logits(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Session, ids: Any) -> Any:
        yield np.zeros((1, 32), np.float32)
        assert any(path.suffix == ".part" for path in tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Session, "_logits", killed)
    np.save(tmp_path / "ids.npy", np.arange(2, 29))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as left:
            main(["logits", str(toy), "--ids", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "out.npy")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (left.value.code, [p.name for p in tmp_path.iterdir()]) == (143, ["ids.npy"])


def test_a_full_disk_leaves_nothing_behind(toy: Path, tmp_path: Path) -> None:
    import resource

    np.save(tmp_path / "ids.npy", np.arange(2, 29))
    (tmp_path / "out.npy").write_text("before")
    command = [sys.executable, "-m", "runtime", "logits", toy, "--ids", "ids.npy", "--out", "out.npy"]
    done = subprocess.run(
        [str(c) for c in command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: out.npy: cannot be written: File too large.\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "out.npy"]
    assert (tmp_path / "out.npy").read_text() == "before"


# --- failing well ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    (["--prompt", "a", "--max-new-tokens", "0"], "max-new-tokens is 0, but must be at least 1."),
    (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, but must be 0 (greedy) or more."),
    (["--prompt", "a", "--stop", ""], "a stop string is empty, but it must have at least one character."),
    (["--prompt", "a", "--threads", "0"], "threads is 0, but must lie in 1..1024."),
    (["--prompt", "a" * 49], "49 tokens do not fit into the context of 48, which holds 0 already. Use a shorter "
                             "prompt, or rebuild the bundle with a longer context "
                             "(python -m compiler build --context)."),
    (["--prompt", "a\udcff"], "the prompt is not valid UTF-8. Check the encoding of the terminal or file."),
])  # fmt: skip
def test_generate_refuses(toy: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert fails(capsys, "generate", toy, *options) == message


def test_an_empty_prompt_begins_with_the_start_token(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(bundle), "--prompt", "", "--max-new-tokens", "1"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1
    tiny.edit_manifest(bundle, tokens={"bos": None, "eos": []})
    assert fails(capsys, *command) == (
        "the prompt is empty and the model has no start token. Give some text with --prompt."
    )


def test_damage_is_reported_by_every_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "ids.npy", np.array([2]))
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[0] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    logits = ("logits", bundle, "--ids", tmp_path / "ids.npy", "--out", tmp_path / "out.npy")
    for command in (("generate", bundle, "--prompt", "a"), ("chat", bundle), logits):
        assert fails(capsys, *command) == (
            f"{bundle / 'weights.bin'}: is damaged: the SHA-256 of bytes 0 to 511 is not the manifest's. "
            "Copy the bundle again or rebuild it."
        )
    assert main([str(a) for a in (*logits, "--no-verify-weights")]) == 0


def test_a_wrong_library(toy: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "generate", str(toy), "--prompt", "a"], cwd=ROOT, capture_output=True,
        text=True, timeout=60, check=False, env={**os.environ, "QUERN_TVM_LIBS": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: QUERN_TVM_LIBS is {tmp_path}, but there is no libtvm_ffi.so in it. "
        "Point it at a folder with libtvm_ffi.so and libtvm_runtime.so, or unset it.\n"
    )


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["fly"], ["generate"], ["generate", "b", "--prompt", "a", "--threads", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_interrupt(toy: Path) -> None:
    """Ctrl-C while it waits for a line."""
    command = [sys.executable, "-m", "runtime", "chat", str(toy)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("/reset\n")
        process.stdin.flush()
        assert process.stdout.readline() == "(new conversation)\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "\n"


def test_a_closed_pipe(toy: Path) -> None:
    """As in `... | head`: the reader leaves after the first character."""
    command = [sys.executable, "-m", "runtime", "generate", str(toy), "--prompt", PROMPT]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == ""


@pytest.mark.parametrize("verb", ["info", "generate", "generate --json"])
def test_an_output_that_is_full(toy: Path, verb: str) -> None:
    first, *options = verb.split()
    prompt = ["--prompt", PROMPT] if first == "generate" else []
    command = [sys.executable, "-m", "runtime", first, str(toy), *prompt, *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: the output cannot be written: No space left on device. Make room where it goes.\n",
    )  # fmt: skip


def test_streams_that_are_closed(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by `>&-` and `<&-`: what would be printed is lost, and a conversation without input is over."""
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(toy)]) == 0
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info", str(toy)]) == 0
    assert capsys.readouterr() == ("", "")

"""`deploy` against a real OpenSSH server on loopback; what no such device can show, on a described one."""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiler.deploy import connection, machine, versions
from runtime import device
from runtime import manifest as mf
from tests.deploy import sshd
from tests.runtime import tiny

REPO = Path(__file__).parents[2]
PADDING = 6 << 20  # bytes of weights: enough to be cut in the middle


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that runs, with weights that nobody reads at their end."""
    folder = tmp_path_factory.mktemp("toy") / "bundle"
    made = tiny.build(folder)
    with (folder / "weights.bin").open("ab") as stream:
        stream.write(os.urandom(PADDING))
    digest = mf.digest_file(folder / "weights.bin", 1 << 20)
    size = digest.bytes
    memory = dataclasses.replace(made.memory, weights_bytes=size, planned_peak_bytes=size + (1 << 20))
    files = {**made.files, "weights.bin": digest}
    mf.dump(dataclasses.replace(made, memory=memory, files=files), folder / mf.FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Server]:
    if sshd.SSHD is None:
        pytest.skip("needs an SSH server: apt-get install openssh-server (on Debian or Ubuntu)")
    with sshd.serve(tmp_path_factory.mktemp("ssh")) as made:
        yield made


def variant(toy: Path, folder: Path, **changes: Any) -> Path:
    """The same files with another manifest."""
    folder.mkdir()
    for path in toy.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / mf.FILE_NAME).unlink()
    mf.dump(dataclasses.replace(mf.load(toy / mf.FILE_NAME), **changes), folder / mf.FILE_NAME)
    return folder


def deploy(server: sshd.Server, *arguments: object, port: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compiler", "deploy", *map(str, arguments)]
    environment = {**os.environ, "HOME": str(server.home), "PYTHONPATH": str(REPO), "TVM_NUM_THREADS": "1"}
    command += ["--port", str(port or server.port), "--identity", str(server.key)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def done(server: sshd.Server, *arguments: object) -> dict[str, Any]:
    """A run that must end well: its summary."""
    result = deploy(server, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[0]))


def test_versions_damage_rollback(toy: Path, server: sshd.Server, tmp_path: Path) -> None:
    place, there = f"127.0.0.1:{tmp_path}/there", tmp_path / "there"
    first = done(server, toy, place)
    total = sum(path.stat().st_size for path in toy.iterdir())
    assert (first["copied_bytes"], first["kept_bytes"], first["previous"]) == (total, 0, None)
    assert (there / "current").resolve() == there / "versions" / first["version"]
    assert {p.name: p.read_bytes() for p in (there / "current").iterdir()} == {
        p.name: p.read_bytes() for p in toy.iterdir()
    }
    assert "nothing to go back to" in deploy(server, "--rollback", place).stderr

    with (there / "current" / "weights.bin").open("r+b") as stream:  # one byte flips on the device
        stream.seek(12345)
        flipped = bytes([stream.read(1)[0] ^ 1])
        stream.seek(12345)
        stream.write(flipped)
    again = done(server, toy, place)
    assert again["repaired"] == ["weights.bin"]
    assert (there / "current" / "weights.bin").read_bytes() == (toy / "weights.bin").read_bytes()

    other = variant(toy, tmp_path / "other", quantization={"format": "other"})
    second = done(server, other, place)
    assert second["previous"] == first["version"]
    back = done(server, "--rollback", place)
    assert (back["version"], back["previous"]) == (first["version"], second["version"])
    assert (there / "current").resolve().name == first["version"]

    (there / "previous" / "model.so").write_bytes(b"\0" * (toy / "model.so").stat().st_size)
    refused = deploy(server, "--rollback", place)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "error: 127.0.0.1: model.so of the previous version is damaged, so the current one stays. Deploy the bundle "
        "that you want again."
    )
    assert (there / "current").resolve().name == first["version"]


def test_an_interrupted_copy_goes_on(toy: Path, server: sshd.Server, tmp_path: Path) -> None:
    place = f"127.0.0.1:{tmp_path}/there"
    with sshd.cut_after(server.port, 4 << 20) as port:
        server.trust(port)
        cut = deploy(server, toy, place, port=port)
    server.trust(server.port)
    assert cut.returncode == 2, cut.stderr
    assert "the connection was lost" in cut.stderr
    assert "goes on where this one stopped" in cut.stderr
    assert not (tmp_path / "there" / "current").exists()
    (partial,) = (tmp_path / "there" / "incoming").glob("*/weights.bin")
    kept = partial.stat().st_size
    assert 0 < kept < (toy / "weights.bin").stat().st_size
    after = done(server, toy, place)
    assert after["kept_bytes"] >= kept
    assert after["kept_bytes"] + after["copied_bytes"] == sum(path.stat().st_size for path in toy.iterdir())
    assert (tmp_path / "there" / "current" / "weights.bin").read_bytes() == (toy / "weights.bin").read_bytes()


def held(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """The device's own lock script, as another deployment would run it."""
    command = ["/bin/sh", "-c", versions._LOCK, "sh", str(folder)]
    settings = {"PATH": os.defpath, **environment}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_deployments_at_once(toy: Path, server: sshd.Server, tmp_path: Path) -> None:
    there = tmp_path / "there"
    first = done(server, toy, f"127.0.0.1:{there}")
    other = variant(toy, tmp_path / "other", quantization={"format": "other"})
    with held(there) as process:
        assert said(process) == "held"
        refused = deploy(server, other, f"127.0.0.1:{there}")
        process.kill()  # as a lost connection does
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        f"error: 127.0.0.1: somebody else is deploying to {there} at this moment. Run the same command again when that "
        f"has ended; if its connection broke, the device notices within minutes."
    )
    assert not list((there / "incoming").iterdir())
    second = done(server, other, f"127.0.0.1:{there}")
    assert second["previous"] == first["version"]
    with held(there) as process:
        assert said(process) == "held"
        refused = deploy(server, "--rollback", f"127.0.0.1:{there}")
    assert refused.returncode == 2 and "somebody else is deploying" in refused.stderr
    assert (there / "current").resolve().name == second["version"]


def test_a_lock_without_flock(tmp_path: Path) -> None:
    """By process id; one that a dead process left is taken over."""
    (tmp_path / "bin").mkdir()
    for name in ("cat", "rm"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    settings = {"PATH": str(tmp_path / "bin")}
    with held(tmp_path, **settings) as first:
        assert said(first) == "held"
        with held(tmp_path, **settings) as second:
            assert said(second) == "busy"
        first.communicate("")
    assert not (tmp_path / "lock.pid").exists()
    (tmp_path / "lock.pid").write_text(f"{first.pid}\n")
    with held(tmp_path, **settings) as third:
        assert said(third) == "held"
        third.communicate("")


def test_run(toy: Path, server: sshd.Server, tmp_path: Path) -> None:
    place = f"127.0.0.1:{tmp_path}/there"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "runtime").symlink_to(REPO / "runtime")
    ran = deploy(server, toy, place, "--quiet", "--run", "abc")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_host_keys(toy: Path, server: sshd.Server, tmp_path: Path) -> None:
    place = f"127.0.0.1:{tmp_path}/there"
    command = ["ssh-keygen", "-lf", str(server.home / "host_key.pub")]
    fingerprint = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]
    sshd.keygen(tmp_path / "wrong")
    try:
        server.trust(server.port, tmp_path / "wrong")
        wrong = deploy(server, toy, place)
        (server.home / ".ssh" / "known_hosts").write_text("")
        unknown = deploy(server, toy, place)
        known = (server.home / ".ssh" / "known_hosts").read_text()
    finally:
        server.trust(server.port)
    assert wrong.returncode == unknown.returncode == 2
    assert f"its host key is not the one in known_hosts: it shows ssh-ed25519 {fingerprint}." in wrong.stderr
    assert f"`ssh-keygen -R '[127.0.0.1]:{server.port}'`" in wrong.stderr
    assert f"its host key is unknown: ssh-ed25519 {fingerprint}." in unknown.stderr
    assert known == ""
    assert not (tmp_path / "there").exists()


def test_a_device_too_small_is_refused(toy: Path, server: sshd.Server, tmp_path: Path) -> None:
    memory = dataclasses.replace(mf.load(toy / mf.FILE_NAME).memory, planned_peak_bytes=1 << 46)
    refused = deploy(server, variant(toy, tmp_path / "big", memory=memory), f"127.0.0.1:{tmp_path}/there")
    assert refused.returncode == 2
    assert "it needs 67108864 MiB of memory, but " in refused.stderr
    assert refused.stderr.rstrip().endswith("Nothing was copied.")
    assert not (tmp_path / "there").exists()


ROOMY = machine.Machine(device.arch(), 64, "2.36", frozenset({"avx2"}), 1 << 40, 1 << 40, True, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "armv7l"}, f"it is built for {device.arch()} (native), but the device is armv7l"),
        ({"bits": 32}, "it needs a 64-bit system, but the device runs a 32-bit one: install its 64-bit edition"),
        ({"features": frozenset()}, "it is built for native (generic), but the device's CPU lacks avx2"),
        ({"glibc": "2.9"}, "it needs glibc 2.17 or later, but the device has glibc 2.9"),
        ({"glibc": None}, "it needs glibc 2.17 or later, but the device has no glibc"),
        ({"free_disk_bytes": 9 << 20}, "it needs 10 MiB on the disk of there, but 9 MiB are free there"),
        ({"writable": False}, "there cannot be written by this user: choose another folder (user@host:folder)"),
    ],
)
def test_refusals(toy: Path, changes: dict[str, Any], said: str) -> None:
    found = mf.load(toy / mf.FILE_NAME)
    found = dataclasses.replace(found, target=dataclasses.replace(found.target, features=("avx2",)))
    assert machine.refusals(ROOMY, found, 2 << 20, "there") == []
    assert machine.refusals(dataclasses.replace(ROOMY, **changes), found, 2 << 20, "there") == [said]


def test_places() -> None:
    assert connection.parse_place("pi@board:~/a b/") == connection.Place("pi", "board", "./a b")
    assert connection.parse_place("pi@[fe80::1]:/srv/x") == connection.Place("pi", "fe80::1", "/srv/x")
    assert connection.parse_place("board") == connection.Place(None, "board", "./quern")
    for text in ("-oProxyCommand=x", "a b", "pi@board:/", "pi@board:~"):
        with pytest.raises(connection.DeployError):
            connection.parse_place(text)

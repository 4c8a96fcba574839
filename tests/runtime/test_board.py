"""What a board says of itself: by hand, from files that kernels write."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from runtime import board, device


def elf(path: Path, machine: int) -> Path:
    """The first 20 bytes of a program: magic, class and so on, type, machine."""
    path.write_bytes(b"\x7fELF" + bytes(12) + struct.pack("<HH", 2, machine))
    return path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        ("model name\t: ARMv8 Processor rev 3 (v8l)\nCPU part\t: 0xd08\n", "0xd08"),
        ("", "unknown"),
    ],
)
def test_the_cpus_name(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert board.cpu_model(tmp_path / "cpuinfo") == name


def test_the_largest_cache(tmp_path: Path) -> None:
    assert board.last_level_cache_bytes(tmp_path) == 0
    for i, size in enumerate(("32K", "1024K", "")):
        (tmp_path / f"cache/index{i}").mkdir(parents=True)
        (tmp_path / f"cache/index{i}/size").write_text(f"{size}\n")
    assert board.last_level_cache_bytes(tmp_path) == 1 << 20


@pytest.mark.parametrize(("bits", "hot"), [("0", False), ("50000", False), ("50005", True), ("8", True), ("so", False)])
def test_the_firmwares_word_counts_for_now_only(tmp_path: Path, bits: str, hot: bool) -> None:
    (tmp_path / "get_throttled").write_text(f"{bits}\n")  # 0x50000: has been, since the start
    assert board.throttled(tmp_path / "get_throttled") is hot
    assert not board.throttled(tmp_path / "nothing", tmp_path)


@pytest.mark.parametrize(
    ("kind", "state", "hot"),
    [("gpu-throttle-alert", "1", True), ("gpu-throttle-alert", "0", False), ("pwm-fan", "3", False)],
)
def test_a_jetson_says_which_part_is_held_down(tmp_path: Path, kind: str, state: str, hot: bool) -> None:
    for i, (type_, now) in enumerate([("cpu-throttle-alert", "0"), (kind, state), ("devfreq", "so")]):
        folder = tmp_path / f"cooling_device{i}"
        folder.mkdir()
        (folder / "type").write_text(f"{type_}\n")
        (folder / "cur_state").write_text(f"{now}\n")
    assert board.throttled(tmp_path / "nothing", tmp_path) is hot


def test_who_emulates(tmp_path: Path) -> None:
    own, other = (62, 183) if device.arch() == "x86_64" else (183, 62)
    nothing = tmp_path / "nothing"
    kernel, tree = tmp_path / "arch", tmp_path / "compatible"
    here = elf(tmp_path / "python", own)
    assert board.emulator() is board.emulator(here, nothing, nothing) is None
    assert board.emulator(elf(tmp_path / "qemu-any", other), nothing, nothing) == "qemu-any"
    kernel.write_text(f"{device.arch()}\n")
    assert board.emulator(here, kernel, nothing) is None
    kernel.write_text("riscv64\n")
    assert board.emulator(here, kernel, nothing) == "an emulator"
    tree.write_bytes(b"linux,dummy-virt\0")
    assert board.emulator(nothing, nothing, tree) == "a virtual machine"
    tree.write_bytes(b"raspberrypi,4-model-b\0brcm,bcm2711\0")
    assert board.emulator(nothing, nothing, tree) is None

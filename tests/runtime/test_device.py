"""What the kernel's text files say about a machine."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import device


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_x86_features_are_those_of_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "arch", lambda: "x86_64")
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu avx2\nvmx flags\t: x\n"
    assert device.cpu_features(text) == {"fpu", "avx2"}
    assert device.cpu_features("nothing") == frozenset()


def test_tiles_are_asked_for_only_where_the_cpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel answers where it has them, and where it refuses: tests/end_to_end/test_amx.py."""
    asked: list[object] = []
    monkeypatch.setattr("ctypes.CDLL", asked.append)
    for arch, features in (("aarch64", device.TILE_FEATURES), ("x86_64", frozenset({"avx512f", "amx_tile"}))):
        monkeypatch.setattr(device, "arch", lambda arch=arch: arch)
        monkeypatch.setattr(device, "cpu_features", lambda features=features: features)
        assert device.allow_tiles() is False
    assert asked == []


def test_arm_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "arch", lambda: "aarch64")
    text = "processor\t: 0\nFeatures\t: fp asimd crc32 asimddp\nflags\t: avx2\n"
    assert device.cpu_features(text) == {"fp", "asimd", "crc32", "asimddp"}
    monkeypatch.setattr(device, "_arm64_capabilities", lambda: frozenset({"asimd"}))
    assert device.cpu_features("flags\t: the host's, under an emulator\n") == {"asimd"}


def test_capability_names_sit_at_the_kernel_bits() -> None:  # Linux v6.1 arch/arm64/include/uapi/asm/hwcap.h
    assert [device._HWCAP.index(n) for n in ("asimd", "crc32", "asimdhp", "asimddp", "sve")] == [1, 7, 10, 20, 22]
    assert [device._HWCAP2.index(n) for n in ("sve2", "i8mm", "bf16")] == [1, 13, 14]
    assert len(device._HWCAP) == 32


# Of cgroup v2, and of v1 in the mounts "cpu,cpuset" and "memory".
MINE = "0::/box\n3:memory:/pod/inner\n2:cpu,cpuset:/job\n1:name=systemd:/box"


@pytest.mark.parametrize(("files", "quota"), [
    ({"cpu.max": "max 100000"}, None),
    ({"cpu.max": "150000 100000"}, 1.5),
    ({"box/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3.0),
    ({"box/cpu.max": "200000 100000", "cpu.max": "300000 100000"}, 2.0),
    ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ({"cpu,cpuset/job/cpu.cfs_quota_us": "50000", "cpu,cpuset/job/cpu.cfs_period_us": "100000"}, 0.5),
    ({"cpu,cpuset/cpu.cfs_quota_us": "250000", "cpu,cpuset/cpu.cfs_period_us": "100000"}, 2.5),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ({}, None),
])  # fmt: skip
def test_cpu_quota(
    files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    real = device.read_text
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    monkeypatch.setattr(device, "read_text", lambda p: MINE if p == Path("/proc/self/cgroup") else real(p))
    assert device.cpu_quota() == quota


@pytest.mark.parametrize(("files", "limit"), [
    ({"memory.max": "max"}, None),
    ({"box/memory.max": "1000", "memory.max": "max"}, 1000),
    ({"memory/pod/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": "2000"}, 2000),
    ({"memory/pod/inner/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": "9223372036854771712"}, 3000),
])  # fmt: skip
def test_memory_of_nested_groups(
    files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    real, installed = device.read_text, device.memory_bytes()
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    monkeypatch.setattr(device, "read_text", lambda p: MINE if p == Path("/proc/self/cgroup") else real(p))
    found = device.memory_bytes()
    assert found == limit if limit else (found or 0) >= (installed or 0)


def test_hyper_threads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CPU_FOLDER", tmp_path)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path / f"cpu{cpu}/topology/thread_siblings_list", siblings)
    assert device.physical_cores([0, 1, 2, 3]) == 2
    assert device.physical_cores([0, 2]) == 1
    assert device.physical_cores([7, 8]) == 2  # nothing known: each counts


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "physical_cores", lambda cpus: 8)
    for quota, threads in ((None, 8), (2.0, 2), (1.4, 1), (0.2, 1), (100.0, 8)):
        monkeypatch.setattr(device, "cpu_quota", lambda q=quota: q)
        assert device.default_threads() == threads


def test_cpus_that_are_all_one_core_count_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CPU_FOLDER", tmp_path)
    monkeypatch.setattr(device, "cpu_quota", lambda: None)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path / f"cpu{cpu}/topology/thread_siblings_list", siblings)
    for cpus, threads in (({0, 1, 2, 3}, 2), ({0, 2}, 2), ({1}, 1)):
        monkeypatch.setattr(device, "affinity", lambda c=cpus: frozenset(c))
        assert device.default_threads() == threads


def test_one_process_at_a_time_binds_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CLAIM", f"\0quern-test-{os.getpid()}")
    first = device.claim_cpus()
    assert first is not None
    assert device.claim_cpus() is None
    first.close()
    second = device.claim_cpus()
    assert second is not None
    second.close()


def test_the_fastest_cpu_is_the_one_that_tvm_leaves_to_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CPU_FOLDER", tmp_path)
    assert device.fastest([1, 0]) == 0
    for cpu, khz in enumerate((1400000, 1400000, 1800000, 1800000)):
        write(tmp_path / f"cpu{cpu}/cpufreq/cpuinfo_max_freq", str(khz))
    assert device.fastest(range(4)) == 2


def test_this_machine() -> None:
    assert device.arch() in ("x86_64", "aarch64")
    assert device.cpu_features()
    assert device.glibc()
    assert (device.memory_bytes() or 0) > 1 << 27
    assert device.peak_rss_mib() > 5
    assert device.default_threads() >= 1

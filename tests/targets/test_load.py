"""Target files: what they give, what is inherited, and every refusal."""
from __future__ import annotations

from pathlib import Path

import pytest

import targets
from targets import files

FULL = """
description = "a board"
tier = 3
[system]
arch = "aarch64"
triple = "aarch64-linux-gnu"
glibc = "2.31"
[cpu]
mcpu = "cortex-a53"
features = ["+neon", "-crc"]
vector_bits = 128
cores = 4
"""


def board(folder: Path, text: str = FULL, name: str = "board") -> targets.Target:
    """`text` as a target file, loaded."""
    (folder / f"{name}.toml").write_text(text)
    return files.load(name, folder=folder)


def test_one_file_by_hand(tmp_path: Path) -> None:
    assert board(tmp_path) == targets.Target(
        name="board", description="a board", arch="aarch64", triple="aarch64-linux-gnu", mcpu="cortex-a53",
        features=("+neon", "-crc"), cpuinfo=("asimd",), glibc="2.31", vector_bits=128, cores=4, tier=3,
    )


def test_what_follows_from_it(tmp_path: Path) -> None:
    target = board(tmp_path)
    assert target.zig_triple == "aarch64-linux-gnu.2.31"
    assert target.has("neon")
    assert not target.has("crc")
    assert target.tvm_target() == {
        "kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon", "-crc"],
        "num-cores": 4,
    }


def test_a_child_states_only_its_difference(tmp_path: Path) -> None:
    board(tmp_path)
    child = board(tmp_path, 'inherits = "board"\n[cpu]\ncores = 2\nl2_kib = 512\n', name="child")
    assert (child.name, child.cores, child.l2_kib, child.mcpu) == ("child", 2, 512, "cortex-a53")


@pytest.mark.parametrize("name", targets.names())
def test_every_shipped_target_loads(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.cpuinfo


def test_the_raspberry_pi_4() -> None:
    target = targets.load("rpi4")
    assert (target.mcpu, target.arch, target.cores, target.clock_mhz, target.glibc) == (
        "cortex-a72", "aarch64", 4, 1500, "2.28"
    )
    assert not target.has("dotprod")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 4", "cores = 4\nl2_kb = 1", "unknown key 'cpu.l2_kb'. Did you mean 'l2_kib'? Keys in [cpu]: mcpu, "
         "features, vector_bits, cores, clock_mhz, l1d_kib_per_core, l2_kib."),
        ("tier = 3", "tier = 3\nteir = 3", "unknown key 'teir'. Did you mean 'tier'? Keys in the top of the file: "
         "inherits, description, tier."),
        ("[system]", "[board]\nx = 1\n[system]", "unknown key 'board'. Keys in the top of the file: inherits, "
         "description, tier."),
        ("[system]", '[gpu]\ngpu_arch = "sm_87"\n[system]',
         "gpu.ptx is missing: a [gpu] table is whole, or not there."),
        ("[system]", '[gpu]\ngpu_arch = "87"\nptx = "7.4"\ncubin = true\nmultiprocessors = 8\ngpu_clock_mhz = 625\n'
         "gpu_read_mb_per_s = 68000\n[system]",
         "gpu_arch is '87' and ptx '7.4', but they must look like \"sm_53\" and \"6.5\"."),
        ("cores = 4", 'cores = "4"', "cpu.cores is '4', a string, but it must be an integer."),
        ("cores = 4", "cores = true", "cpu.cores is True, a boolean, but it must be an integer."),
        ("cores = 4", "cores = 0", "cpu.cores is 0, but it must be at least 1."),
        ('["+neon", "-crc"]', '["+neon", 1]',
         "cpu.features is ['+neon', 1], a list, but it must be a list of strings."),
        ('["+neon", "-crc"]', '["neon"]', "feature 'neon' must start with '+' (has it) or '-' (must not be used)."),
        ('["+neon", "-crc"]', '["+avx2"]', "feature '+avx2' is not one that quern knows for aarch64. Known: aes, bf16, "
         "crc, dotprod, fp-armv8, fp16fml, fullfp16, i8mm, lse, neon, rdm, sha2. "
         "A new one is added in targets/features.py."),
        ('arch = "aarch64"', 'arch = "mips"',
         "arch is 'mips', but quern compiles for aarch64, riscv64 and x86_64 only."),
        ('glibc = "2.31"', "", "system.glibc is missing, here and in what it inherits."),
        ('[system]\narch = "aarch64"', 'system = 1\n[other]\narch = "aarch64"',
         "system is 1, an integer, but it must be a table: [system]."),
        ("tier = 3", 'tier = 3\ninherits = "none"', "inherits 'none', but there is no file none.toml beside it."),
    ],
)
def test_refusals_name_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FULL
    with pytest.raises(targets.TargetError) as caught:
        board(tmp_path, FULL.replace(old, new))
    assert str(caught.value) == f"{tmp_path / 'board.toml'}: {message}"


def test_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(targets.TargetError, match=r"board\.toml: not a TOML file: "):
        board(tmp_path, "tier = ")


def test_inheriting_twice_is_refused(tmp_path: Path) -> None:
    board(tmp_path)
    board(tmp_path, 'inherits = "board"', name="child")
    with pytest.raises(targets.TargetError) as caught:
        board(tmp_path, 'inherits = "child"', name="grandchild")
    assert str(caught.value) == (
        f"{tmp_path / 'grandchild.toml'}: inherits 'child', which itself inherits 'board'. One level is the limit: "
        f"inherit 'board' and state the difference here."
    )


def test_an_unknown_name() -> None:
    with pytest.raises(targets.TargetError) as caught:
        targets.load("rpi-4")
    assert str(caught.value) == (
        "There is no target 'rpi-4'. Did you mean 'rpi4'? Known targets: native, aarch64, cuda-sm53, cuda-sm72, "
        "cuda-sm87, cuda-sm90, jetson-nano, jetson-orin, jetson-xavier, riscv64-v, rpi3, rpi4, rpi5, "
        "sapphire-rapids, snapdragon-8gen2, x86-64."
    )


def test_a_name_is_no_path() -> None:
    with pytest.raises(targets.TargetError, match=r"There is no target '\.\./targets/rpi4'"):
        targets.load("../targets/rpi4")


def test_a_gpu_of_another_size() -> None:
    orin, pi = targets.load("jetson-orin"), targets.load("rpi4")
    agx = orin.sized(16)
    assert agx.gpu is not None and agx.gpu.multiprocessors == 16 and agx.sized(8) == orin == orin.sized(None)
    assert pi.sized(None) == pi
    with pytest.raises(targets.TargetError) as caught:
        pi.sized(16)
    assert str(caught.value) == "rpi4 has no GPU, so it has no multiprocessors. Leave --multiprocessors out."

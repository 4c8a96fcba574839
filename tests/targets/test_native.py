"""`native` from /proc/cpuinfo, on text of machines that we do not have."""
from __future__ import annotations

import pytest

from targets import TargetError, load, native
from targets.features import X86_64_V2, X86_64_V3, X86_64_V4

V2, V3, V4 = (" ".join(level.values()) for level in (X86_64_V2, X86_64_V3, X86_64_V4))


def x86(*flags: str) -> str:
    """One processor for each flag line."""
    return "".join(f"processor\t: {i}\nmodel name\t: Some CPU\nflags\t\t: {line}\n\n" for i, line in enumerate(flags))


def arm(features: str, *parts: str) -> str:
    """One processor for each CPU part."""
    return "".join(
        f"processor\t: {i}\nFeatures\t: {features}\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n"
        for i, part in enumerate(parts)
    )


@pytest.mark.parametrize(
    ("flags", "mcpu", "vector_bits"),
    [
        (V2, "x86-64-v2", 128),
        (V3, "x86-64-v3", 256),
        (V4, "x86-64-v4", 512),
        (V4.replace("avx512bw", ""), "x86-64-v3", 256),
    ],
)
def test_levels_are_complete_sets(flags: str, mcpu: str, vector_bits: int) -> None:
    target = load("native", x86(flags, flags))
    assert (target.mcpu, target.vector_bits, target.cores, target.name) == (mcpu, vector_bits, 2, "native")
    assert ("-prefer-256-bit" in target.features) == (vector_bits == 512)
    assert target.triple == "x86_64-linux-gnu"


def test_extras_need_their_level() -> None:
    flags = "avx_vnni avx512_vnni amx_int8 amx_tile gfni"
    alder_lake = load("native", x86(f"{V3} {flags}"))
    assert [alder_lake.has(f) for f in ("avxvnni", "gfni", "avx512vnni", "amx-int8")] == [True, True, False, False]
    sapphire_rapids = load("native", x86(f"{V4} {flags}"))
    assert all(sapphire_rapids.has(f) for f in ("avxvnni", "gfni", "avx512vnni", "amx-tile", "amx-int8"))
    old = load("native", x86(f"{V2} {flags}"))
    assert not any(old.has(f) for f in ("avxvnni", "gfni", "avx512vnni"))


def test_tiles_need_the_kernel_as_well() -> None:
    cpuinfo, base = x86(f"{V4} avx512_vnni amx_tile amx_int8 amx_bf16"), load("x86-64")
    granted, refused = (native.detect(cpuinfo, base, tiles=tiles) for tiles in (True, False))
    assert set(granted.features) - set(refused.features) == {"+amx-tile", "+amx-int8", "+amx-bf16"}
    assert set(granted.cpuinfo) - set(refused.cpuinfo) == {"amx_tile", "amx_int8", "amx_bf16"}
    assert granted.plain == refused == refused.plain
    assert native.kernel_has_tiles() >= load("native").has("amx-tile")


def test_the_manifest_can_list_every_required_flag() -> None:
    target = load("native", x86(f"{V4} avx512_vnni avx_vnni"))
    assert set(target.cpuinfo) == set(f"{V4} avx512_vnni avx_vnni".split())


def test_only_what_all_cores_have() -> None:
    assert not load("native", x86(f"{V3} gfni", V3)).has("gfni")


def test_a_cpu_below_the_floor() -> None:
    with pytest.raises(TargetError) as caught:
        load("native", x86("cx16 lahf_lm pni ssse3 sse4_1"))
    assert str(caught.value) == (
        "/proc/cpuinfo: this CPU lacks popcnt, sse4_2; quern needs at least x86-64-v2 (SSE4.2, about 2009)."
    )


PI4 = "fp asimd evtstrm crc32 cpuid"
PI5 = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp"


@pytest.mark.parametrize(
    ("features", "parts", "mcpu", "flags"),
    [
        (PI4, ["0xd08"] * 4, "cortex-a72", "+fp-armv8 +neon +crc -aes -sha2"),
        (PI5, ["0xd0b"] * 4, "cortex-a76", "+fp-armv8 +neon +crc +aes +sha2 +lse +rdm +fullfp16 +dotprod"),
        (PI5, ["0xd05", "0xd0b"], "generic", "+fp-armv8 +neon +crc +aes +sha2 +lse +rdm +fullfp16 +dotprod"),
        ("fp asimd crc32", ["0xd0b"], "generic", "+fp-armv8 +neon +crc"),  # a kernel that hides what LLVM counts on
        ("fp asimd asimddp i8mm", ["0xd4f"], "generic", "+fp-armv8 +neon +dotprod +i8mm"),
    ],
)
def test_arm_boards(features: str, parts: list[str], mcpu: str, flags: str) -> None:
    target = load("native", arm(features, *parts))
    assert (target.arch, target.mcpu, target.cores) == ("aarch64", mcpu, len(parts))
    assert target.features == tuple(flags.split())


def test_arm_without_neon() -> None:
    with pytest.raises(TargetError, match=r"^/proc/cpuinfo: this CPU lacks asimd; quern needs NEON\.$"):
        load("native", arm("fp crc32", "0xd03"))

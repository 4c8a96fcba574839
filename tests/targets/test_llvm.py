"""What LLVM makes of our targets: the same features as ours, and vectors as wide as we say."""
from __future__ import annotations

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import tirx as T

import targets
from targets.features import AARCH64_BASE, ARM_PARTS, CPUINFO_NAMES, X86_64_LEVELS, X86_64_V3_EXTRAS, X86_64_V4_EXTRAS

X86 = {mcpu: " ".join((level | extras).values()) for mcpu, (_, level, extras) in X86_64_LEVELS.items()}


@I.ir_module
class Square:
    @T.prim_func
    def main(a: T.Buffer((1024,), "float32"), b: T.Buffer((1024,), "float32")):
        for i in range(64):
            for j in T.vectorized(16):
                b[i * 16 + j] = a[i * 16 + j] * a[i * 16 + j]


def x86(mcpu: str) -> targets.Target:
    """The native target of a CPU that has all of this level and every extra."""
    return targets.load("native", f"flags : {X86[mcpu]}")


def arm(part: str) -> targets.Target:
    """The native target of a board with this core, complete."""
    features = " ".join(CPUINFO_NAMES["aarch64"].values())
    return targets.load("native", f"Features : {features}\nCPU implementer : 0x41\nCPU part : {part}\n")


ALL = [
    *(targets.load(name) for name in targets.names()),
    *(x86(mcpu) for mcpu in X86_64_LEVELS),
    *(arm(part) for part in ARM_PARTS),
]


def llvm_features(target: dict[str, str | int | list[str]]) -> set[str]:
    """What LLVM takes as given."""
    return set(tvm.target.codegen.llvm_get_cpu_features(tvm.target.Target(target)))


@pytest.mark.parametrize("target", ALL, ids=lambda t: f"{t.name}-{t.mcpu}")
def test_features_are_complete_and_true(target: targets.Target) -> None:
    ours = {f[1:] for f in target.features if f[0] == "+"}
    assert llvm_features(target.tvm_target()) & set(CPUINFO_NAMES[target.arch]) == ours


@pytest.mark.parametrize("part", ARM_PARTS)
def test_what_an_arm_model_implies(part: str) -> None:
    model, implied = ARM_PARTS[part]
    bare = llvm_features({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": model})
    assert bare & set(CPUINFO_NAMES["aarch64"]) == set(implied) | set(AARCH64_BASE)


@pytest.mark.parametrize(
    ("target", "wide", "too_wide"),
    [
        (x86("x86-64-v4"), "%zmm", "%none"),
        (x86("x86-64-v3"), "%ymm", "%zmm"),
        (x86("x86-64-v2"), "%xmm", "%ymm"),
        (targets.load("x86-64"), "%ymm", "%zmm"),
        (targets.load("rpi4"), ".4s", "%ymm"),
        (targets.load("aarch64"), ".4s", "%ymm"),
    ],
    ids=lambda value: value.mcpu if isinstance(value, targets.Target) else None,
)
def test_vectors_are_as_wide_as_promised(target: targets.Target, wide: str, too_wide: str) -> None:
    assembly = tvm.compile(Square, tvm.target.Target(target.tvm_target())).mod.inspect_source("asm")
    assert wide in assembly
    assert too_wide not in assembly


def test_extras_do_not_overlap_the_levels() -> None:
    for _, level, extras in X86_64_LEVELS.values():
        assert not set(level) & set(extras)
    assert not set(X86_64_V3_EXTRAS) & set(X86_64_V4_EXTRAS)

"""CPU features: LLVM's name beside the name in /proc/cpuinfo, and which of them a processor model implies.

The only such table in quern. LLVM's names: llvm/lib/Target/{X86,AArch64}; the kernel's: cpufeatures.h in arch/x86 and
Documentation/arch/arm64/elf_hwcaps.rst; x86-64 levels: the x86-64 psABI, section 3.1.1 "Processor Architecture".
"""
from __future__ import annotations

from collections.abc import Iterable

from targets.target import OS_GRANTED, TargetError

X86_64_V2 = {
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "popcnt": "popcnt",
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
}
X86_64_V3 = X86_64_V2 | {
    "avx": "avx",
    "avx2": "avx2",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "f16c": "f16c",
    "fma": "fma",
    "lzcnt": "abm",
    "movbe": "movbe",
    "xsave": "xsave",
}
X86_64_V4 = X86_64_V3 | {
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
}
# Extras need the level they stand under: LLVM would switch the rest of it on without asking the CPU.
X86_64_V3_EXTRAS = {
    "gfni": "gfni",
    "avxvnni": "avx_vnni",
    "avxifma": "avx_ifma",
    "avxvnniint8": "avx_vnni_int8",
}
X86_64_V4_EXTRAS = {
    "avx512vnni": "avx512_vnni",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
} | OS_GRANTED
AARCH64_BASE = {"fp-armv8": "fp", "neon": "asimd"}
AARCH64_EXTRAS = {
    "crc": "crc32",
    "aes": "aes",
    "sha2": "sha2",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "dotprod": "asimddp",
    "bf16": "bf16",
    "i8mm": "i8mm",
}
# The kernel's "isa" line has letters, which cpuinfo readers split, then names (riscv/uabi.rst): rv64imafdcv_zfhmin is
# i, m, a, f, d, c, v, zfhmin.
RISCV64 = {name: name for name in (*"mafdcv", "zfhmin")}
CPUINFO_NAMES = {
    "riscv64": RISCV64,
    "x86_64": X86_64_V4 | X86_64_V3_EXTRAS | X86_64_V4_EXTRAS,
    "aarch64": AARCH64_BASE | AARCH64_EXTRAS,
}

X86_64_LEVELS = {  # highest first: vector width in bits, what the level needs, what may come on top
    "x86-64-v4": (512, X86_64_V4, X86_64_V3_EXTRAS | X86_64_V4_EXTRAS),
    "x86-64-v3": (256, X86_64_V3, X86_64_V3_EXTRAS),
    "x86-64-v2": (128, X86_64_V2, {}),
}
# "CPU part" of implementer 0x41 -> LLVM model, and what of the table above LLVM takes for granted there
ARM_PARTS = {
    "0xd08": ("cortex-a72", ("crc", "aes", "sha2")),
    "0xd0b": ("cortex-a76", ("crc", "aes", "sha2", "lse", "rdm", "fullfp16", "dotprod")),
}
# Licensed apart from the core (a Raspberry Pi 4 has none): a model without it keeps its name, and LLVM is told.
ARM_OPTIONAL = ("aes", "sha2")


def cpuinfo_names(arch: str, features: Iterable[str], where: str) -> tuple[str, ...]:
    """/proc/cpuinfo's names of all "+feature" entries, in order. Raises TargetError, beginning with `where`."""
    if arch not in CPUINFO_NAMES:
        raise TargetError(f"{where}: arch is {arch!r}, but quern compiles for aarch64, riscv64 and x86_64 only.")
    table = CPUINFO_NAMES[arch]
    required = []
    for entry in features:
        if entry[:1] not in ("+", "-"):
            raise TargetError(f"{where}: feature {entry!r} must start with '+' (has it) or '-' (must not be used).")
        if entry[0] == "+":
            if entry[1:] not in table:
                raise TargetError(
                    f"{where}: feature {entry!r} is not one that quern knows for {arch}. "
                    f"Known: {', '.join(sorted(table))}. A new one is added in targets/features.py."
                )
            required.append(table[entry[1:]])
    return tuple(required)

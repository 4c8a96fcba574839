"""What the compiler and the kernels know of a device. Plain data: made by `targets.load()`, read by everyone."""
from __future__ import annotations

from dataclasses import dataclass, replace

# LLVM's name beside /proc/cpuinfo's. Linux gives tiles to processes that ask: Documentation/arch/x86/xstate.rst.
OS_GRANTED = {"amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16"}

# LLVM's names of what multiplies integers: with these, another kernel is the right one.
DOT_FEATURES = ("amx-int8", "avx512vnni", "avxvnniint8", "avxvnni", "i8mm", "dotprod")


class TargetError(Exception):
    """A target that does not exist, a target file that is wrong, or a CPU that quern cannot serve."""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that shares a target with the CPU that feeds it.

    arch: "sm_53"; ptx: the newest PTX version that the oldest supported driver reads ("6.5"); cubin: True where machine
    code of CUDA 11.8 loads on every supported driver, else the driver compiles the PTX; read_mb_per_s: of the GPU's
    memory.
    """

    arch: str
    ptx: str
    cubin: bool
    multiprocessors: int
    clock_mhz: int
    read_mb_per_s: int

    @property
    def sm(self) -> int:
        """53 for "sm_53"."""
        return int(self.arch.removeprefix("sm_"))


@dataclass(frozen=True)
class Target:
    """One device. Names of features are LLVM's; `cpuinfo` holds the same features as /proc/cpuinfo spells them.

    `features` is complete: what `mcpu` implies is written out too, as far as a kernel may ask for it. An entry starts
    with "+" (the CPU has it) or "-" (LLVM must not use it, though `mcpu` would have it).
    """

    name: str
    description: str
    arch: str
    triple: str
    mcpu: str
    features: tuple[str, ...]
    cpuinfo: tuple[str, ...]
    glibc: str
    vector_bits: int
    cores: int
    tier: int
    clock_mhz: int | None = None
    l1d_kib_per_core: int | None = None
    l2_kib: int | None = None
    dram_read_mb_per_s: int | None = None
    storage_read_mb_per_s: int | None = None
    gpu: Gpu | None = None

    @property
    def zig_triple(self) -> str:
        """What `zig cc -target` takes: the ABI and the oldest glibc that the result must still load on."""
        return f"{self.arch}-linux-gnu.{self.glibc}"

    @property
    def plain(self) -> Target:
        """The same device without what an operating system may refuse a process (OS_GRANTED)."""
        granted = {f"+{llvm}": cpuinfo for llvm, cpuinfo in OS_GRANTED.items()}
        return replace(
            self,
            features=tuple(f for f in self.features if f not in granted),
            cpuinfo=tuple(name for name in self.cpuinfo if name not in granted.values()),
        )

    def sized(self, multiprocessors: int | None) -> Target:
        """The same device with a GPU of another size, where a target covers several: kernels and records are chosen by
        it. None leaves it. Raises TargetError without a GPU.
        """
        if multiprocessors is None:
            return self
        if self.gpu is None:
            raise TargetError(f"{self.name} has no GPU, so it has no multiprocessors. Leave --multiprocessors out.")
        return replace(self, gpu=replace(self.gpu, multiprocessors=multiprocessors))

    def has(self, feature: str) -> bool:
        """True when the CPU has this LLVM feature, named without a sign: has("avx512vnni")."""
        return f"+{feature}" in self.features

    @property
    def tuning_key(self) -> str:
        """Folder of this target's tuning records: its name, or what `native` machines must share to share records."""
        if self.name != "native":
            return self.name
        dots = [name for name in DOT_FEATURES if self.has(name)]
        l1d = f"l1d{self.l1d_kib_per_core}k" if self.l1d_kib_per_core else "l1d-unknown"
        return "-".join([self.mcpu, *dots, l1d])

    def tvm_target(self) -> dict[str, str | int | list[str]]:
        """The argument of `tvm.target.Target`, as plain data."""
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "mattr": list(self.features),
            "num-cores": self.cores,
        }

"""Vector expressions that the hand-scheduled kernels share: loads to fp32, stores, reductions, 2^x.

A logical vector has LANES = 16 lanes on every ISA; LLVM splits it into two AVX2 or four NEON registers. Only portable
LLVM intrinsics are used, so one kernel text serves all targets. All of it emits code into the open IRBuilder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from schedules import counted

LANES = 16
NEON_LANES = 4  # of fp32
Expr = Any  # tvm has no types for mypy

# 2^f = 1 + f * p(f) on [-0.5, 0.5]. p: Lawson's reweighted least squares in float64 (4001 Chebyshev nodes, relative
# error), constant term held at 1 so that 2^0 is exact. Max relative error 9.2e-8, and 1.7e-7 once rounded to fp32.
EXP2 = (0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653)
EXP2_ERROR = 1.7e-7
# FRECPE is off by less than 2^-8 (Arm ARM, FPRecipEstimate); a step squares that and rounds twice: 2^-32 + 2 * 2^-24
# after the second. The product with the dividend rounds once more.
QUOTIENT_ERROR = 3.01 * 2.0**-24
TANH2_ERROR = 1.2e-6  # 2^f - 1 = f * p(f) is off by 9.2e-8 / f for small f; measured 9.4e-7, at arguments near 0.05
LOG2_E = 1.4426950408889634


def kind(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type; one lane is a scalar."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def at(start: Expr, lanes: int) -> Expr:
    """Index of `lanes` neighbours from `start` on."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane. Python floats become fp32."""
    scalar = T.float32(value) if isinstance(value, float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def load(buffer: Any, *index: Expr, lanes: int) -> Expr:
    """fp32 vector of `lanes` neighbours in the last dimension. uint16 holds bfloat16: the high half of an fp32."""
    raw = buffer[(*index[:-1], at(index[-1], lanes))]
    if buffer.ty.dtype == "float32":
        return raw
    if buffer.ty.dtype == "uint16":
        wide = T.Cast(kind("uint32", lanes), raw)
        return T.reinterpret(kind("float32", lanes), T.shift_left(wide, splat(T.uint32(16), lanes)))
    return T.Cast(kind("float32", lanes), raw)


def store(buffer: Any, value: Expr, *index: Expr, lanes: int) -> None:
    """Write a vector to neighbours in the last dimension, cast to the buffer's element type."""
    if buffer.ty.dtype != "float32":
        value = T.Cast(kind(str(buffer.ty.dtype), lanes), value)
    T.buffer_store(buffer, value, [*index[:-1], at(index[-1], lanes)])


def registers(count: int, lanes: int = LANES, dtype: str = "float32") -> Any:
    """`count` vectors that LLVM keeps in registers, as long as every index is a constant and they take less than 1 KiB.

    Not scope "local": TVM puts only small buffers of scope "global" on the stack, all others cost a call of the
    workspace allocator.
    """
    return T.alloc_buffer((count, lanes), dtype, layout=None)


def hold(value: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """A value computed here, once, and usable any number of times.

    Not `T.bind`: TVM's simplifier puts a bound expression back into each of its uses, so chains of them grow without
    bound (2 KB of TIR became 600 KB). A one-vector buffer stops that; LLVM turns it into a register.
    """
    place = registers(1, lanes, dtype)
    T.buffer_store(place, value, [0, at(0, lanes)])
    return place[0, at(0, lanes)]


def prefetch(buffer: Any, element: Expr, level: int = 1, write: bool = False) -> None:
    """Ask for the cache line of an element, counted from the buffer's first, into a cache; harmless beyond its end."""
    line = T.tvm_access_ptr(T.type_annotation(str(buffer.ty.dtype)), buffer.data, element, 1, 1)
    locality = T.int32(4 - level)  # LLVM: 3 = keep in all levels, 2 = from the second on
    T.evaluate(T.call_llvm_intrin("", "llvm.prefetch.p0", line, T.int32(write), locality, T.int32(1)))  # 1: data


def intrinsic(name: str, *args: Expr, dtype: str = "float32", lanes: int) -> Expr:
    """Call of an LLVM intrinsic without side effects; its overload follows from the arguments."""
    return T.call_llvm_pure_intrin(kind(dtype, lanes), name, *args)


def absolute(x: Expr, lanes: int) -> Expr:
    """|x|."""
    return intrinsic("llvm.fabs", x, lanes=lanes)


def to_int32(x: Expr, lanes: int) -> Expr:
    """Nearest integer, half to even whatever the CPU's rounding mode."""
    return T.Cast(kind("int32", lanes), intrinsic("llvm.roundeven", x, lanes=lanes))


def fold(x: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr], dtype: str = "float32") -> Expr:
    """All lanes of x combined as a tree, halves first: the same order, thus the same bits, on every ISA."""
    x = hold(x, lanes, dtype)
    while lanes > 2:
        lanes //= 2
        half = kind(dtype, lanes)
        x = hold(combine(T.vectorlow(half, x), T.vectorhigh(half, x)), lanes, dtype)
    return x if lanes == 1 else hold(combine(tirx.Shuffle([x], [0]), tirx.Shuffle([x], [1])), 1, dtype)


def total(x: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """Sum of all lanes."""
    return fold(x, lanes, lambda a, b: a + b, dtype)


def largest(x: Expr, lanes: int) -> Expr:
    """Maximum of all lanes."""
    return fold(x, lanes, T.max)


def quotient(a: Expr, b: Expr, lanes: int, arch: str) -> Expr:
    """a / b: correctly rounded, but on arm64 a times the reciprocal of b, relative error QUOTIENT_ERROR.

    FDIV takes a Cortex-A72 8.5 cycles a number; FRECPE and two steps of Newton's method, which double the right bits
    each, take 1.5. b in 2^-126..2^127, so that 1 / b is a number, maybe a denormal one.
    """
    if arch != "aarch64":
        return a / b
    b = hold(b, lanes)
    inverse = hold(neon("llvm.aarch64.neon.frecpe", b, lanes=lanes), lanes)
    for _ in range(2):
        inverse = hold(inverse * neon("llvm.aarch64.neon.frecps", inverse, b, lanes=lanes), lanes)
    return a * inverse


def neon(name: str, *args: Expr, lanes: int) -> Expr:
    """An fp32 intrinsic of NEON, register by register: LLVM does not split what it does not know."""
    if lanes <= NEON_LANES:
        return intrinsic(name, *args, lanes=lanes)
    half = kind("float32", lanes // 2)
    low, high = (
        hold(neon(name, *(part(half, arg) for arg in args), lanes=lanes // 2), lanes // 2)
        for part in (T.vectorlow, T.vectorhigh)
    )
    return tirx.Shuffle([low, high], list(range(lanes)))


def exp2(x: Expr, lanes: int) -> Expr:
    """2^x for x <= 127, relative error EXP2_ERROR; exactly 1 at 0, exactly 0 below -127, wrong denormals in between.

    x = n + f with n the nearest integer: 2^f from the polynomial, n added to its exponent bits.
    """
    whole, f = _split(T.max(x, splat(-127.0, lanes)), lanes)
    power = splat(EXP2[0], lanes)
    for coefficient in (*EXP2[1:], 1.0):
        power = power * f + splat(coefficient, lanes)
    return _times_power(power, whole, lanes)


def tanh2(x: Expr, lanes: int) -> Expr:
    """(2^x - 1) / (2^x + 1), which is tanh(x ln 2 / 2); relative error TANH2_ERROR, near 0 as well.

    2^x - 1 = (2^n - 1) + 2^n * f * p(f): no difference of near numbers. From |x| = 60 on the result is 1 or -1.
    """
    whole, f = _split(T.min(T.max(x, splat(-60.0, lanes)), splat(60.0, lanes)), lanes)
    slope = splat(EXP2[0], lanes)
    for coefficient in EXP2[1:]:
        slope = slope * f + splat(coefficient, lanes)
    power = hold(_times_power(splat(1.0, lanes), whole, lanes), lanes)
    less_one = hold((power - splat(1.0, lanes)) + power * (slope * f), lanes)
    return less_one / (less_one + splat(2.0, lanes))


def _split(x: Expr, lanes: int) -> tuple[Expr, Expr]:
    """Nearest integer of x, still as fp32, and what is left: within [-0.5, 0.5]."""
    x = hold(x, lanes)
    whole = hold(intrinsic("llvm.roundeven", x, lanes=lanes), lanes)
    return whole, hold(x - whole, lanes)


def _times_power(x: Expr, whole: Expr, lanes: int) -> Expr:
    """x * 2^whole, by adding to the exponent bits."""
    exponent = T.shift_left(T.Cast(kind("int32", lanes), whole), splat(T.int32(23), lanes))
    return T.reinterpret(kind("float32", lanes), T.reinterpret(kind("int32", lanes), x) + exponent)


def look_up(table: Sequence[float], code: Expr, lanes: int) -> Expr:
    """fp32 values of int32 codes 0..15: a tree of choices, one level of it a bit of the code. Works on every target."""
    values = [splat(float(number), lanes) for number in table]
    for bit in range(4):
        chosen = T.bitwise_and(code, splat(T.int32(1 << bit), lanes)) != splat(T.int32(0), lanes)
        values = [T.Select(chosen, one, zero) for zero, one in zip(values[0::2], values[1::2], strict=True)]
    return values[0]


X86_PAIRS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}


def dot_pairs(a: Expr, b: Expr, lanes: int, arch: str) -> Expr:
    """i32[lanes] of a[2i] b[2i] + a[2i+1] b[2i+1], for i16[2 * lanes]; exact unless all four numbers are -32768.

    PMADDWD on x86 (with the sum around it VPDPWSSD, where there is one), widening multiplies and ADDP on arm64.
    """
    if arch == "x86_64" and lanes in X86_PAIRS:
        return intrinsic(X86_PAIRS[lanes], a, b, dtype="int32", lanes=lanes)
    wide = kind("int32", 2 * lanes)
    products = hold(T.Cast(wide, a) * T.Cast(wide, b), 2 * lanes, "int32")
    even, odd = (tirx.Shuffle([products], list(range(first, 2 * lanes, 2))) for first in (0, 1))
    return even + odd


def broadcast_pair(buffer: Any, *index: Expr, lanes: int) -> Expr:
    """i16[2 * lanes]: two neighbours of an i16 buffer, the first at `index`, repeated."""
    pair = T.reinterpret("int32", buffer[(*index[:-1], T.ramp(index[-1], 1, 2))])
    return T.reinterpret(kind("int16", 2 * lanes), T.broadcast(pair, lanes))


def pieces(n: int, widest: int = LANES) -> Iterator[tuple[int, int]]:
    """(offset, lanes) that cover 0..n-1 with the fewest power-of-two vectors."""
    offset, lanes = 0, widest
    while offset < n:
        while lanes > n - offset:
            lanes //= 2
        yield offset, lanes
        offset += lanes


def sweep(n: int, body: Callable[[Expr, int], None]) -> None:
    """body(offset, lanes) over 0..n-1: a loop of full vectors, then the rest in shorter ones."""
    whole = n - n % LANES
    if whole:
        with T.serial(n // LANES) as i:
            body(i * LANES, LANES)
    for offset, lanes in pieces(n - whole):
        body(whole + offset, lanes)


def tokens(m: int) -> Any:
    """Loop over the tokens of a call that are real: in parallel, unless there is but one (fork and join cost 2 us)."""
    return T.parallel(m, annotations=counted.marks()) if m > 1 else T.serial(m)

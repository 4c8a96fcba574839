"""lower_to_schedules: every operator becomes a kernel, and one weight has one layout in all functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

import targets
from compiler.errors import UnsupportedError
from compiler.graph import ops
from compiler.passes import lower_to_schedules as lowering
from compiler.passes.lower_to_schedules import Lowered, lower_to_schedules
from compiler.passes.verify import verify
from schedules.cuda import kernel as cuda
from schedules.kernel import Kernel, Packing, Request, TensorSpec, Unsupported, lowerings

NATIVE, RPI4 = targets.load("native"), targets.load("rpi4")
One, Many, Out1, Out16 = (R.Tensor(shape, "float32") for shape in ((1, 64), (16, 64), (1, 40), (16, 40)))
Q1, Scale1, Sum1 = R.Tensor((1, 2, 32), "int8"), R.Tensor((1, 2), "float32"), R.Tensor((1, 2), "int32")
Q16, Scale16, Sum16 = R.Tensor((16, 2, 32), "int8"), R.Tensor((16, 2), "float32"), R.Tensor((16, 2), "int32")
Codes, Scales, Zeros = R.Tensor((40, 64), "uint8"), R.Tensor((40, 2), "float16"), R.Tensor((40, 2), "int16")
Qkv, Rope, Span = R.Tensor((1, 12), "float32"), R.Tensor((32, 4), "float32"), R.Tensor((2,), "int32")
Keys, Values = R.Tensor((2, 2, 2, 16), "float16"), R.Tensor((1, 32, 4), "float16")
Appended = R.Tuple(R.Tensor((1, 4), "float32"), Keys, Values)


@I.ir_module
class TwoFunctions:
    @R.function
    def decode(x: One, codes: Codes, scale: Scales, zero: Zeros) -> Out1:
        R.func_attr({"num_input": 1})
        with R.dataflow():
            triple = R.call_pure_packed("quern.quantize", x, 32, ty_args=R.Tuple(Q1, Scale1, Sum1))
            q = triple[0]
            ascale = triple[1]
            asum = triple[2]
            y = R.call_pure_packed("quern.linear_int8", q, ascale, asum, codes, scale, zero, 4, 32, ty_args=Out1)
            out = y
            R.output(out)
        return out

    @R.function
    def prefill(x: Many, span: Span, codes: Codes, scale: Scales, zero: Zeros) -> Out16:
        with R.dataflow():
            triple = R.call_pure_packed("quern.quantize", x, 32, ty_args=R.Tuple(Q16, Scale16, Sum16))
            q = triple[0]
            ascale = triple[1]
            asum = triple[2]
            y = R.call_pure_packed("quern.linear_int8", q, ascale, asum, codes, scale, zero, 4, 32, ty_args=Out16)
            z = R.call_pure_packed("quern.add", y, y, ty_args=Out16)
            again = R.call_pure_packed("quern.add", z, y, ty_args=Out16)
            out = again
            R.output(out)
        return out


@I.ir_module
class InPlace:
    @R.function
    def main(qkv: Qkv, rope: Rope, span: Span, keys: Keys, values: Values) -> R.Tensor((1, 4), "float32"):
        with R.dataflow():
            appended = R.call_inplace_packed(
                "quern.rope_append", qkv, rope, span, keys, values, 1, 1, 4, inplace_indices=[-1, 3, 4],
                ty_args=[R.Tensor((1, 4), "float32"), Keys, Values],
            )  # fmt: skip
            q = appended[0]
            new_keys = appended[1]
            new_values = appended[2]
            y = R.call_pure_packed(
                "quern.attention", q, new_keys, new_values, span, 1, 1, 4, 0.5, 0.0, 0,
                ty_args=R.Tensor((1, 4), "float32"),
            )  # fmt: skip
            out = y
            R.output(out)
        return out


@pytest.fixture(scope="module", params=[NATIVE, RPI4], ids=lambda t: t.name)
def lowered(request: pytest.FixtureRequest) -> Lowered:
    return lower_to_schedules(TwoFunctions, request.param)


def calls(mod: tvm.IRModule, function: str) -> Iterator[relax.Call]:
    (block,) = mod[function].body.blocks
    return (b.value for b in block.bindings if isinstance(b.value, relax.Call))


def test_every_operator_has_a_schedule() -> None:
    """fp16 linear layers are for GPUs alone: `build` refuses them on a CPU."""
    every = {ops.PREFIX + name for name in ops.SIGNATURES}
    assert set(lowerings()) == {name for name in every if not name.startswith("quern.linear_half")}
    assert set(cuda.lowerings()) == every


def test_no_operator_is_left(lowered: Lowered) -> None:
    verify(lowered.mod, "scheduled")
    assert "quern." not in lowered.mod.script()


def test_equal_calls_share_a_kernel(lowered: Lowered) -> None:
    kernels = [var.name_hint for var, f in lowered.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(kernels) == 5  # quantize and linear for 1 and for 16 tokens, one add for both additions
    first, second = list(calls(lowered.mod, "prefill"))[-2:]
    assert first.args[0].same_as(second.args[0])


def test_weights_take_the_layout_of_their_kernel_in_every_function(lowered: Lowered) -> None:
    # x86: 40 rows are 4 blocks of 16 side by side; 32 inputs of 4 bits are 4 steps of one vector, 4 bytes a row.
    # A Cortex-A72: 10 blocks of 4 rows; 64 inputs are 2 steps of one vector, 16 bytes a row.
    on_x86, on_a72 = ((1, 2, 4, 4, 1, 16, 4), (1, 2, 4, 16)), ((10, 2, 1, 4, 16), (10, 2, 4))
    codes, groups = on_a72 if any("widening" in v.name_hint for v in lowered.mod.get_global_vars()) else on_x86
    want = {"codes": (codes, "uint8"), "scale": (groups, "float16"), "zero": (groups, "uint8")}
    assert {name: (p.spec.shape, p.spec.dtype) for name, p in lowered.packings.items()} == want
    for function in ("decode", "prefill"):
        x, *weights = (p for p in lowered.mod[function].params if p.name != "span")
        assert {p.name: (ops.shape_of(p.ty), str(p.ty.dtype)) for p in weights} == want
        assert ops.shape_of(x.ty) == (16 if function == "prefill" else 1, 64)


def test_attributes_and_results_stay(lowered: Lowered) -> None:
    assert int(lowered.mod["decode"].attrs["num_input"]) == 1
    assert ops.shape_of(lowered.mod["prefill"].ret_ty) == (16, 40)


def test_kernels_with_tiles_stand_in_functions_of_their_own() -> None:
    """An operating system may refuse tiles: prefill is there in both forms, decode has no use for them."""
    target = targets.load("sapphire-rapids")
    made = lower_to_schedules(TwoFunctions, target)
    verify(made.mod, "scheduled")
    assert made.tiled == {"prefill": "prefill_amx"}
    kernels = {f: [call.args[0].name_hint for call in calls(made.mod, f)] for f in ("decode", "prefill", "prefill_amx")}
    plain, tiled = kernels["prefill"], kernels["prefill_amx"]
    assert [a == b for a, b in zip(plain, tiled, strict=True)] == [True, False, True, True]
    assert (plain[1].split("_")[2], tiled[1].split("_")[2]) == ("avx512", "amx")
    assert not any("amx" in name for f in ("decode", "prefill") for name in kernels[f])
    assert lower_to_schedules(TwoFunctions, target.plain).packings.keys() == made.packings.keys()
    assert lower_to_schedules(TwoFunctions, target.plain).tiled == {}
    assert {p.name for p in made.mod["prefill_amx"].params} == {p.name for p in made.mod["prefill"].params}


def test_what_is_written_in_place_stays_an_argument() -> None:
    made = lower_to_schedules(InPlace, NATIVE)
    verify(made.mod, "scheduled")
    assert made.packings == {}
    append, attend = calls(made.mod, "main")
    assert append.op.name == "relax.call_tir_inplace"
    assert [int(i) for i in append.attrs.inplace_indices] == [-1, 3, 4]
    assert attend.op.name == "relax.call_tir"


def test_a_lowered_module_runs() -> None:  # two groups of 32 ones times codes c - zero 8, scale 0.5
    made = lower_to_schedules(TwoFunctions, NATIVE)
    canonical: dict[str, np.ndarray] = {
        "codes": np.tile(np.arange(40, dtype=np.uint8)[:, None] % 16, (1, 64)),
        "scale": np.full((40, 2), 0.5, np.float16),
        "zero": np.full((40, 2), 8, np.int16),
    }
    weights = [tvm.runtime.tensor(made.packings[name].pack(array)) for name, array in canonical.items()]
    vm = relax.VirtualMachine(relax.build(made.mod, tvm.target.Target(NATIVE.tvm_target())), tvm.cpu())
    x = tvm.runtime.tensor(np.full((1, 64), 127, np.float32))
    assert vm["decode"](x, *weights).numpy().tolist() == [[(c % 16 - 8) * 0.5 * 64 * 127 for c in range(40)]]


def test_no_schedule_is_the_users_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(request: Request) -> Kernel:
        raise Unsupported(f"{request.op} has no kernel for {request.args[0].shape}")

    monkeypatch.setattr(lowering, "lowerings", lambda: lowerings() | {"quern.quantize": refuse})
    with pytest.raises(UnsupportedError) as caught:
        lower_to_schedules(TwoFunctions, RPI4)
    assert str(caught.value) == "rpi4: quern.quantize has no kernel for (1, 64)"


def test_two_layouts_for_one_weight_are_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lowerings()

    def by_tokens(request: Request) -> Kernel:
        kernel, tokens = plain[request.op](request), request.args[0].shape[0]
        other = Packing(f"for {tokens}", TensorSpec((40, 64), "uint8"), lambda array: array)
        return replace(kernel, packings={**kernel.packings, 3: other})

    monkeypatch.setattr(lowering, "lowerings", lambda: plain | {"quern.linear_int8": by_tokens})
    with pytest.raises(AssertionError, match=r"^codes: for 1 and for 16"):
        lower_to_schedules(TwoFunctions, NATIVE)

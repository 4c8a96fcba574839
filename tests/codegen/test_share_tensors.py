"""One tensor a place: by hand, and what must stay apart."""

from __future__ import annotations

import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from compiler.codegen.share_tensors import share_tensors


@I.ir_module
class Before:
    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        R.func_attr({"relax.force_pure": True})
        one = R.memory.alloc_storage(R.shape([16]), 0, "global", "float32")
        two = R.memory.alloc_storage(R.shape([16]), 0, "global", "float32")
        a = R.memory.alloc_tensor(one, 0, R.shape([4]), "float32")
        b = R.memory.alloc_tensor(two, 0, R.shape([4]), "float32")
        _ = R.call_packed("first", x, a, b, ty_args=R.Tuple)
        both = (a, b)
        low = both[0]
        again = low
        c = R.memory.alloc_tensor(one, 0, R.shape([2, 2]), "float32")
        _1 = R.call_packed("second", again, c, ty_args=R.Tuple)
        d = R.memory.alloc_tensor(two, 0, R.shape([4]), "float32")
        _2 = R.call_packed("third", c, d, ty_args=R.Tuple)
        out = R.builtin.alloc_tensor(R.shape([4]), "float32", 0)
        other = R.builtin.alloc_tensor(R.shape([4]), "float32", 0)
        _3 = R.call_packed("last", d, other, out, ty_args=R.Tuple)
        return out


@I.ir_module
class Expected:
    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tensor((4,), "float32"):
        R.func_attr({"relax.force_pure": True})
        one = R.memory.alloc_storage(R.shape([16]), 0, "global", "float32")
        two = R.memory.alloc_storage(R.shape([16]), 0, "global", "float32")
        a = R.memory.alloc_tensor(one, 0, R.shape([4]), "float32")
        b = R.memory.alloc_tensor(two, 0, R.shape([4]), "float32")
        _ = R.call_packed("first", x, a, b, ty_args=R.Tuple)
        c = R.memory.alloc_tensor(one, 0, R.shape([2, 2]), "float32")
        _1 = R.call_packed("second", a, c, ty_args=R.Tuple)
        _2 = R.call_packed("third", c, b, ty_args=R.Tuple)
        out = R.builtin.alloc_tensor(R.shape([4]), "float32", 0)
        other = R.builtin.alloc_tensor(R.shape([4]), "float32", 0)
        _3 = R.call_packed("last", b, other, out, ty_args=R.Tuple)
        return out


def test_one_tensor_a_place() -> None:
    """Another shape is another tensor, and so is what is no part of the plan."""
    tvm.ir.assert_structural_equal(share_tensors(Before), Expected)


def test_nothing_to_share_stays() -> None:
    tvm.ir.assert_structural_equal(share_tensors(Expected), Expected)

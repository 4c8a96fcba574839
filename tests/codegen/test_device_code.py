"""Device code of a bundle: what is said of kernels that spill."""

from __future__ import annotations

from compiler.codegen.cuda import device_code
from compiler.codegen.nvrtc import DeviceCode, Resources


def test_spills_are_told_and_end_nothing() -> None:
    fine, bad = Resources(64, 0, 0), Resources(96, 8, 0)
    assert device_code.spills(DeviceCode(b"", None, {"a": fine})) == ""
    assert device_code.spills(DeviceCode(b"", None, {"a": fine, "b": bad})) == (
        "slower than need be, because registers spill into memory; please report it: b (8 bytes a thread)"
    )

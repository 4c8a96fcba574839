"""Formats are found by their files; exactly one claims a checkpoint. Dense weights, and what is no dense weight."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compiler.checkpoint import open_checkpoint
from compiler.errors import CheckpointError, FormatError
from compiler.quant import formats
from compiler.quant.formats import Format, open_source
from compiler.quant.ir import DenseWeight, WeightType
from compiler.quant.source import Source
from tests.checkpoint.files import write_checkpoint


def source(folder: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Source:
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return open_source(open_checkpoint(write_checkpoint(folder, config or {}, named)))


def test_every_file_of_the_folder_is_a_format() -> None:
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")} - {"__init__"}
    assert {format_.name.replace("-", "_") for format_ in formats.formats()} == files >= {"dense", "gptq"}


def test_no_format_claims_it(tmp_path: Path) -> None:
    known = ", ".join(format_.name for format_ in formats.formats())
    for method, said in (("magic", "quant_method is 'magic'"), (None, "there is no quant_method")):
        with pytest.raises(FormatError) as error:
            source(tmp_path, {"quantization_config": {"quant_method": method}}, a__weight=np.ones((1, 1), np.float32))
        assert str(error.value) == (
            f"{tmp_path}: no format claims this checkpoint ({said}). quern knows: {known}. Take the model in one of "
            f"these forms, or as plain float16 to be quantised here.")


def test_two_formats_claim_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [Format(name, lambda _config: True, lambda _checkpoint: pytest.fail("opened"))
             for name in ("left", "right")]
    monkeypatch.setattr(formats, "formats", lambda: twins)
    with pytest.raises(FormatError) as error:
        source(tmp_path, a__weight=np.ones((1, 1), np.float32))
    assert str(error.value) == (f"{tmp_path}: the quantisation configuration fits several formats: left, right. "
                                f"Set quant_method to the one that wrote it.")


def test_dense_weights_are_views_of_the_file(tmp_path: Path) -> None:
    dense = source(tmp_path, a__weight=np.array([[1, 2, 3]], np.float16), b__weight=np.array([[0x3F80]], np.uint16),
                   a__bias=np.zeros(1, np.float16), norm__weight=np.array([1.5], np.float16))
    assert dense.modules() == ["a", "b"]
    assert dense.describe("a") == WeightType(1, 3, "float16", 0)
    a, b = dense.load("a"), dense.load("b")
    assert isinstance(a, DenseWeight)
    assert isinstance(b, DenseWeight)
    assert a.values.tolist() == [[1, 2, 3]]
    assert (b.dtype, b.values.tolist()) == ("bfloat16", [[0x3F80]])
    assert not a.values.flags.owndata
    assert dense.vector("norm").tolist() == [1.5]
    zeros = dense.bias("a")
    assert zeros is not None
    assert zeros.tolist() == [0]
    assert dense.bias("b") is None


def test_biases_are_widened(tmp_path: Path) -> None:
    dense = source(tmp_path, a__weight=np.ones((2, 1), np.float32), a__bias=np.array([0x3F80, 0xC000], np.uint16))
    bias = dense.bias("a")
    assert bias is not None
    assert bias.dtype == np.float32
    assert bias.tolist() == [1, -2]


def test_dense_refusals(tmp_path: Path) -> None:
    dense = source(tmp_path, i__weight=np.ones((2, 2), np.int8), e__weight=np.ones((0, 2), np.float32),
                   b__weight=np.ones((2, 2), np.float16), b__bias=np.ones(3, np.float16),
                   c__weight=np.ones((1, 2), np.float16), c__bias=np.array([np.inf], np.float32),
                   nan__weight=np.array([np.nan], np.float32), q__qweight=np.ones((1, 1), np.int32),
                   q__scales=np.ones((1, 1), np.float16))
    file = tmp_path / "model.safetensors"
    need = ("but a dense weight needs two dimensions and one of float16, bfloat16, float32. If it is quantised, "
            "config.json must say how.")
    for module, kind, message in (
        ("i", FormatError, f"{file}: i.weight is int8[2, 2], {need}"),
        ("e", FormatError, f"{file}: e.weight is float32[0, 2], {need}"),
        ("nan", FormatError, f"{file}: nan.weight is float32[1], {need}"),
        ("x", CheckpointError, f"{tmp_path} has no tensor 'x.weight'. Is this the model that config.json describes?"),
        ("q", CheckpointError, f"{tmp_path} has no tensor 'q.weight', but 'q.qweight', 'q.scales'. If another tool "
                               f"quantised it, config.json must name its quant_method."),
    ):
        with pytest.raises(kind) as error:
            dense.load(module)
        assert str(error.value) == message
    for name, kind, message in (
        ("nan", FormatError,
         f"{file}: nan.weight has values that are not finite. The file is damaged: fetch it again."),
        ("b", FormatError, f"{file}: b.weight is float16[2, 2], but a vector needs one dimension and one of float16, "
                           f"bfloat16, float32. Quantised norms are not a thing quern knows."),
        ("x", CheckpointError, f"{tmp_path} has no tensor 'x.weight'. Is this the model that config.json describes?"),
    ):
        with pytest.raises(kind) as error:
            dense.vector(name)
        assert str(error.value) == message
    for module, message in (
        ("b", f"{file}: b.bias is float16[3], but the weight of b has 2 rows, and each needs one number. The file is "
              f"damaged, or from another model: fetch it again."),
        ("c", f"{file}: c.bias has values that are not finite. The file is damaged: fetch it again."),
    ):
        with pytest.raises(FormatError) as error:
            dense.bias(module)
        assert str(error.value) == message

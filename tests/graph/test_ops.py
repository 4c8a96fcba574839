"""The operator vocabulary: whatever `make` puts together, `match` takes apart."""

from __future__ import annotations

import pytest
from tvm import relax

from compiler.graph import ops
from compiler.graph.ops import SIGNATURES

FLOAT = ops.tensor((2, 8), "float32")
ATTRS: dict[str, ops.Attr] = {
    "eps": 1e-5, "group": 32, "bits": 4, "heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, "softcap": 0.0,
    "window": 0, "times": 2.0, "grid": "nf4", "cap": 30.0,
}  # fmt: skip


def variables(name: str) -> list[relax.Var]:
    return [relax.Var(arg, ops.tensor((i + 1, 8), "float16")) for i, arg in enumerate(SIGNATURES[name].args)]


def attributes(name: str) -> dict[str, ops.Attr]:
    return {key: ATTRS[key] for key in SIGNATURES[name].attrs}


def test_a_call_by_hand() -> None:
    x, weight = relax.Var("x", FLOAT), relax.Var("weight", ops.tensor((8,), "float32"))
    call = ops.make("rms_norm", [x, weight], {"eps": 0.5}, [FLOAT])
    assert call.op.name == "relax.call_pure_packed"
    function, *arguments = call.args
    assert function.global_symbol == "quern.rms_norm"
    assert arguments[:2] == [x, weight]
    assert (arguments[2].value, str(arguments[2].ty.dtype)) == (0.5, "float64")
    assert call.ty_args[0].same_as(FLOAT)


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("results", [1, 3])
def test_make_then_match(name: str, results: int) -> None:
    args, attrs, outs = variables(name), attributes(name), [ops.tensor((i + 1,), "int8") for i in range(results)]
    op = ops.match(ops.make(name, args, attrs, outs))
    assert op is not None
    assert (op.name, list(op.args), op.attrs) == (name, args, attrs)
    assert all(type(op.attrs[key]) is type(attrs[key]) for key in attrs)
    assert op.signature is SIGNATURES[name]
    updated = [op.args[op.signature.args.index(arg)].ty for arg in op.signature.inplace]
    assert [(ops.shape_of(t), str(t.dtype)) for t in op.results] == [
        (ops.shape_of(t), str(t.dtype)) for t in [*outs, *updated]
    ]


def test_what_is_written_is_named_by_index() -> None:
    call = ops.make("rope_append", variables("rope_append"), attributes("rope_append"), [FLOAT])
    assert call.op.name == "relax.call_inplace_packed"
    assert [int(i) for i in call.attrs.inplace_indices] == [-1, 3, 4]


def test_names_of_a_signature_are_unique_and_every_written_one_is_an_argument() -> None:
    for signature in SIGNATURES.values():
        names = [*signature.args, *signature.attrs]
        assert len(set(names)) == len(names)
        assert set(signature.inplace) <= set(signature.args)


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name.endswith("_residual")])
def test_a_residual_comes_last(name: str) -> None:  # fuse_residual appends it
    plain = SIGNATURES[name.removesuffix("_residual")]
    assert SIGNATURES[name].args == (*plain.args, "residual")
    assert SIGNATURES[name].attrs == plain.attrs


def test_make_refuses_the_wrong_arguments_and_attributes() -> None:
    x = relax.Var("x", FLOAT)
    with pytest.raises(AssertionError, match=r"^rms_norm takes \('x', 'weight'\)"):
        ops.make("rms_norm", [x], {"eps": 0.5}, [FLOAT])
    with pytest.raises(AssertionError, match=r"^quantize has attributes \('group',\), got \('eps',\)"):
        ops.make("quantize", [x], {"eps": 0.5}, [FLOAT])
    with pytest.raises(KeyError, match="nothing"):
        ops.make("nothing", [x], {}, [FLOAT])


def test_match_leaves_everything_else() -> None:
    x = relax.Var("x", FLOAT)
    others = [
        x,
        relax.TupleGetItem(relax.Tuple([x]), 0),
        relax.op.add(x, x),
        relax.call_pure_packed("quern.nothing", x, ty_args=FLOAT),
        relax.call_pure_packed("other.add", x, x, ty_args=FLOAT),
        relax.op.call_dps_packed("quern.add", (x, x), out_ty=FLOAT),
        None,
    ]
    assert [ops.match(other) for other in others] == [None] * len(others)

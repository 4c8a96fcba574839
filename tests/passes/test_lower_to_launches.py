"""lower_to_launches: one list of launches a function, and no array in another's place while that is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

import targets
from compiler.errors import UnsupportedError
from compiler.graph.build import Function, Graph
from compiler.graph.weights import Linear, Table
from compiler.passes import lower_to_launches as lowering
from compiler.passes.lower_to_launches import ALIGNMENT, HEADER, Launches, Place, lower_to_launches
from compiler.passes.lower_to_schedules import Decision
from compiler.quant.ir import WeightType
from schedules.cuda.kernel import CudaKernel, lowerings
from schedules.kernel import Request, TensorSpec, Unsupported

SM90 = targets.load("cuda-sm90")
DENSE = WeightType(40, 64, "float16", 0)
TABLE, HEAD = Table("embedding", "embedding", DENSE), Linear("head", ("head",), DENSE, (40,))


def module() -> tvm.IRModule:
    """A token's logits, sixteen tokens' sums, and a head for one row."""
    graph = Graph()
    decode = Function(graph, "decode", 1)
    x = decode.embedding(TABLE)
    decode.finish(decode.linear(decode.add(decode.add(x, x), x), HEAD))
    prefill = Function(graph, "prefill_16", 16)
    x = prefill.embedding(TABLE)
    prefill.finish(prefill.add(x, x))
    head = Function(graph, "head_1", 1)
    head.finish(head.linear(head.argument("hidden", (1, 64), "float32"), HEAD))
    return graph.module()


def made() -> Launches:
    return lower_to_launches(module(), SM90)


def test_a_model_by_hand() -> None:
    found = made()
    decode, head, prefill = found.functions
    assert [plan.name for plan in found.functions] == ["decode", "head_1", "prefill_16"]
    assert sorted(found.parameters) == ["embedding", "head.weight"]
    assert (decode.takes, head.takes, prefill.takes) == ("ids", "hidden", "ids")
    assert (decode.result_bytes, prefill.result_bytes, head.input_bytes) == (160, 16 * 256, 256)
    table, weight = (Place(found.parameters.index(name), True) for name in ("embedding", "head.weight"))
    front, start = 2 * ALIGNMENT, 2 * ALIGNMENT + 16 * 256  # header of 16 ids; hidden states of the prompt behind it
    x, y, z = (Place(start + i * ALIGNMENT) for i in range(3))
    # embedding -> x; x + x -> y; y + x -> z; head(z) -> logits, where x and y are free again
    assert [step.arguments for step in decode.steps] == [
        (Place(HEADER), table, x), (x, x, y), (y, x, z), (z, weight, Place(decode.result_at)),
    ]  # fmt: skip
    assert decode.result_at in (x.at, y.at)
    assert prefill.result_at == front
    assert head.steps[0].arguments == (Place(head.input_at), weight, Place(head.result_at))
    assert min(head.input_at, head.result_at) >= start and head.input_at != head.result_at
    assert found.arena_bytes == start + max(3 * ALIGNMENT, 16 * 256)
    assert "decode: ids -> 160 bytes" in found.script()


def test_one_kernel_serves_equal_calls() -> None:
    found = made()
    functions = [step.launch.function for plan in found.functions for step in plan.steps]
    assert len(functions) == 7
    assert len(found.kernels) == 5  # embeddings of 1 and 16 rows, sums of 1 and 16 rows, one linear layer


def test_a_decision_is_applied_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def lower(request: Request) -> CudaKernel:
        seen.append(dict(request.knobs))
        kernel = lowerings()["quern.add"](replace(request, knobs={}))
        name = f"tuned_{kernel.name}" if request.knobs else kernel.name
        launches = tuple(replace(launch, function=name) for launch in kernel.launches)
        return replace(kernel, name=name, source=kernel.source.replace(kernel.name, name), launches=launches)

    table = {**lowerings(), "quern.add": lower}
    monkeypatch.setattr(lowering, "lowerings", lambda: table)
    decision = Decision({"threads": 64}, "0123456789abcdef")
    found = lower_to_launches(
        module(), SM90, lambda r: decision if r.op == "quern.add" and r.args[0].shape[0] == 1 else None
    )
    (name,) = found.tuned
    assert found.tuned[name] == decision and name.startswith("tuned_") and sorted(map(len, seen)) == [0, 1]
    decode, _, prefill = found.functions
    assert [step.launch.function == name for step in decode.steps] == [False, True, True, False]
    assert all(step.launch.function != name for step in prefill.steps)


lifetimes = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=30)


@given(lifetimes)
def test_arrays_that_live_together_lie_apart(given_arrays: list[tuple[int, int, int]]) -> None:
    arrays = [lowering._Array(nbytes, min(a, b), max(a, b)) for nbytes, a, b in given_arrays]
    end = lowering._place(lowering._Function("decode", arrays=arrays), 0, ALIGNMENT)
    for i, one in enumerate(arrays):
        assert one.at % ALIGNMENT == 0 and one.at >= ALIGNMENT and one.at + one.nbytes <= end
        for other in arrays[:i]:
            together = one.first <= other.last and other.first <= one.last
            assert not together or one.at + one.nbytes <= other.at or other.at + other.nbytes <= one.at
    assert end <= ALIGNMENT + sum(-(-a.nbytes // ALIGNMENT) * ALIGNMENT for a in arrays)


def test_temporaries_of_a_kernel_have_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    table = lowerings()

    def with_scratch(request: Request) -> object:
        kernel = table["quern.add"](request)
        launch = replace(kernel.launches[0], arguments=(0, 1, 2, 3))
        return replace(kernel, launches=(launch,), temporaries=(TensorSpec((1000,), "int8"),))

    monkeypatch.setattr(lowering, "lowerings", lambda: {**table, "quern.add": with_scratch})
    for step in made().functions[0].steps[1:3]:
        *_, out, scratch = (place.at for place in step.arguments)
        assert len({*(place.at for place in step.arguments if not place.parameter)}) >= 3
        assert scratch >= out + 256 or out >= scratch + 1000


def test_what_the_gpu_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table = lowerings()
    monkeypatch.setattr(lowering, "lowerings", lambda: {op: f for op, f in table.items() if op != "quern.add"})
    with pytest.raises(UnsupportedError) as caught:
        made()
    assert str(caught.value) == "cuda-sm90: there is no CUDA kernel for quern.add."

    def refuse(request: Request) -> object:
        raise Unsupported("quern.add: sums are too much for it")

    monkeypatch.setattr(lowering, "lowerings", lambda: {**table, "quern.add": refuse})
    with pytest.raises(UnsupportedError) as caught:
        made()
    assert str(caught.value) == "cuda-sm90: quern.add: sums are too much for it"

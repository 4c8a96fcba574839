"""OpenVINO's core API on a graph of the same shape: compressed weights, stateful caches, fused attention.

The graph is what optimum-intel exports for a llama, written with OpenVINO's own operators: int4_sym or int8_sym weights
with one fp16 scale a group (NNCF's form, which the CPU plugin keeps compressed), ReadValue and Assign for the caches,
ScaledDotProductAttention, logits of the last token only. Random weights. The plugin's defaults stay: it may compute in
bfloat16 and quantise activations to int8 where it thinks that right; `about` says what it chose.

python -m compiler.measure.peers.openvino REQUEST is the measured process, in the peer's environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compiler.errors import UnsupportedError
from compiler.measure.peers import PeerModel, Say, environment
from compiler.measure.process import Process, Timed, serve

NAME = "openvino"
VARIANTS = {"native": "the CPU plugin with its defaults"}
VERSION = "2026.4.1"
PACKAGES = [f"openvino=={VERSION}", "numpy==2.4.6; python_version >= '3.11'", "numpy==2.2.6; python_version < '3.11'"]
PROPERTIES = (
    "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION", "INFERENCE_NUM_THREADS",
)  # fmt: skip


def _venv(place: Path) -> Path:
    return place / f"openvino-{VERSION}" / "venv"


def missing(place: Path, variant: str) -> str | None:
    """The environment, when it is not complete."""
    done = _venv(place) / "packages.txt"
    return None if done.is_file() else str(done.parent.relative_to(place))


def install(place: Path, variant: str, say: Say) -> None:
    """Two wheels."""
    environment(_venv(place), PACKAGES, say)


class OpenVino(Timed):
    """The measured process."""

    name = NAME

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self.about: dict[str, object] = process.ask("about")
        self.threads = int(str(self.about["INFERENCE_NUM_THREADS"]))

    def perplexity(self, windows: list[list[int]]) -> float:
        """Its weights are random."""
        raise UnsupportedError("openvino: runs random weights here, which have none")


@contextmanager
def opened(place: Path, variant: str, model: PeerModel, threads: int) -> Iterator[OpenVino]:
    """A graph with random weights of the model's shape. Raises UnsupportedError for bits that OpenVINO has not."""
    if {model.bits, model.head_bits} - {4, 8}:
        raise UnsupportedError(f"{NAME}: has 4-bit and 8-bit weights here, not {model.bits} and {model.head_bits}.")
    if (kind := model.config["model_type"]) not in ("llama", "mistral"):
        raise UnsupportedError(f"{NAME}: the comparison makes llama and mistral graphs, not {kind}.")
    request = {"config": {k: v for k, v in model.config.items() if k != "quantization_config"}, "bits": model.bits,
               "group_size": model.group_size, "head_bits": model.head_bits, "threads": threads}  # fmt: skip
    with Process(_venv(place) / "bin" / "python", __name__, [json.dumps(request)]) as process:
        yield OpenVino(process)


class Graph:
    """Builds the model. Letters as everywhere: n outputs, k inputs of a linear layer."""

    def __init__(self, config: dict[str, Any], bits: int, group_size: int, head_bits: int) -> None:
        import numpy as np
        import openvino as ov
        from openvino import opset13

        self.np, self.ov, self.op = np, ov, opset13
        self.config, self.bits, self.group_size, self.head_bits = config, bits, group_size, head_bits
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.random = np.random.default_rng(0)
        self.sinks: list[Any] = []

    def floats(self, *values: float) -> Any:
        """A constant f32[len(values)]."""
        return self.op.constant(self.np.array(values, self.np.float32))

    def ints(self, *values: int) -> Any:
        """A constant i64[len(values)]."""
        return self.op.constant(self.np.array(values, self.np.int64))

    def linear(self, x: Any, n: int, k: int, bits: int) -> Any:
        """x[.., k] times random codes [n, k / g, g] with scales f16[n, k / g, 1]."""
        np, op = self.np, self.op
        g = self.group_size if 0 < self.group_size < k and k % self.group_size == 0 else k
        packed = np.frombuffer(self.random.bytes(n * k * bits // 8), np.uint8).view(np.int8 if bits == 8 else np.uint8)
        kind = self.ov.Type.i8 if bits == 8 else self.ov.Type.i4
        codes = op.constant(self.ov.Tensor(packed, self.ov.Shape([n, k // g, g]), kind))
        spread = (1 << bits) / 12**0.5 * k**0.5
        scales = (self.random.uniform(0.5, 1.5, (n, k // g, 1)) / spread).astype(np.float16)
        wide = op.multiply(op.convert(codes, np.float16), op.constant(scales))
        weight = op.convert(op.reshape(wide, self.ints(n, k), False), np.float32)
        return op.matmul(x, weight, False, True)

    def norm(self, x: Any) -> Any:
        """RMS norm with weights of one, in the form that the plugin fuses."""
        op = self.op
        mean = op.reduce_mean(op.power(x, self.floats(2)), self.ints(-1), True)
        root = op.divide(self.floats(1), op.sqrt(op.add(mean, self.floats(self.config["rms_norm_eps"]))))
        ones = op.constant(self.np.ones(self.config["hidden_size"], self.np.float32))
        return op.multiply(op.multiply(x, root), ones)

    def split(self, x: Any, heads: int) -> Any:
        """[1, m, heads * d] -> [1, heads, m, d]"""
        shaped = self.op.reshape(x, self.ints(0, 0, heads, self.head_dim), True)
        return self.op.transpose(shaped, self.ints(0, 2, 1, 3))

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        """x * cos + rotate_half(x) * sin, as transformers writes it."""
        op, half = self.op, self.head_dim // 2
        low = op.slice(x, self.ints(0), self.ints(half), self.ints(1), self.ints(3))
        high = op.slice(x, self.ints(half), self.ints(self.head_dim), self.ints(1), self.ints(3))
        turned = op.concat([op.multiply(high, self.floats(-1)), low], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def cached(self, x: Any, name: str, beam: Any) -> Any:
        """Everything that the cache holds, x [1, heads, m, d] included; repeated for the queries that share it."""
        op, ov = self.op, self.ov
        shape = ov.PartialShape([1, self.kv_heads, -1, self.head_dim])
        empty = op.constant(self.np.zeros((1, self.kv_heads, 0, self.head_dim), self.np.float32))
        past = ov.opset6.read_value(empty, name, ov.Type.f32, shape)
        full = op.concat([op.gather(past, beam, self.op.constant(0)), x], 2)
        self.sinks.append(ov.opset6.assign(full, name))
        times = self.heads // self.kv_heads
        if times == 1:
            return full
        repeat = self.ints(1, 1, times, 1, 1)
        wide = op.broadcast(op.unsqueeze(full, self.ints(2)), repeat, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, self.ints(0, self.heads, -1, self.head_dim), True)

    def model(self) -> Any:
        """ids i64[1, m], positions i64[1, m], beam i32[1] -> logits f32[1, 1, vocab] of the last token."""
        np, op, c = self.np, self.op, self.config
        hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
        ids, positions = (op.parameter([1, -1], np.int64, name=n) for n in ("ids", "positions"))
        beam = op.parameter([-1], np.int32, name="beam")
        table = op.constant(self.random.standard_normal((vocab, hidden), np.float32).astype(np.float16))
        x = op.gather(op.convert(table, np.float32), ids, op.constant(0))
        cos, sin, mask = self._positions(positions)
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for i in range(c["num_hidden_layers"]):
            y = self.norm(x)
            q = self.rotate(self.split(self.linear(y, q_width, hidden, self.bits), self.heads), cos, sin)
            k = self.rotate(self.split(self.linear(y, kv_width, hidden, self.bits), self.kv_heads), cos, sin)
            v = self.split(self.linear(y, kv_width, hidden, self.bits), self.kv_heads)
            k, v = self.cached(k, f"k.{i}", beam), self.cached(v, f"v.{i}", beam)
            seen = op.scaled_dot_product_attention(q, k, v, mask, causal=False)
            joined = op.reshape(op.transpose(seen, self.ints(0, 2, 1, 3)), self.ints(0, 0, q_width), True)
            x = op.add(x, self.linear(joined, hidden, q_width, self.bits))
            y = self.norm(x)
            gate, up = op.swish(self.linear(y, ffn, hidden, self.bits)), self.linear(y, ffn, hidden, self.bits)
            x = op.add(x, self.linear(op.multiply(gate, up), hidden, ffn, self.bits))
        last = op.gather(self.norm(x), self.ints(-1), op.constant(1))
        logits = self.linear(last, vocab, hidden, self.head_bits)
        return self.ov.Model([op.result(logits)], self.sinks, [ids, positions, beam], "llama")

    def _positions(self, positions: Any) -> tuple[Any, Any, Any]:
        """cos and sin f32[1, 1, m, d], mask f32[1, 1, m, s]: 0 where a key is not after the query."""
        np, op = self.np, self.op
        theta = (self.config.get("rope_parameters") or {}).get("rope_theta") or self.config.get("rope_theta") or 10000.0
        steps = (theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)).astype(np.float32)
        angles = op.multiply(op.unsqueeze(op.convert(positions, np.float32), self.ints(2)), op.constant(steps))
        angles = op.unsqueeze(op.concat([angles, angles], -1), self.ints(1))
        count = op.add(op.reduce_max(positions, self.ints(0, 1), False), op.constant(np.int64(1)))
        keys = op.range(op.constant(np.int64(0)), count, op.constant(np.int64(1)), "i64")
        seen = op.less_equal(op.unsqueeze(keys, self.ints(0, 1, 2)), op.unsqueeze(positions, self.ints(1, 3)))
        return op.cos(angles), op.sin(angles), op.select(seen, self.floats(0), self.floats(-65504))


class Measured:
    """The compiled model; each method is a verb."""

    def __init__(self, request: dict[str, Any]) -> None:
        import numpy as np
        import openvino as ov

        graph = Graph(request["config"], request["bits"], request["group_size"], request["head_bits"])
        settings = {"INFERENCE_NUM_THREADS": request["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = ov.Core().compile_model(graph.model(), "CPU", settings)
        self.request, self.np, self.vocab = self.compiled.create_infer_request(), np, graph.config["vocab_size"]
        self._run(0, 2)
        self._run(2, 1)

    def _run(self, past: int, tokens: int) -> float:
        np = self.np
        ids = np.random.default_rng(past).integers(0, self.vocab, (1, tokens))
        inputs = {"ids": ids, "positions": np.arange(past, past + tokens)[None], "beam": np.zeros(1, np.int32)}
        started = time.perf_counter()
        self.request.infer(inputs)
        return time.perf_counter() - started

    def about(self) -> dict[str, Any]:
        """Version, and what the plugin chose."""
        import openvino as ov

        return {"version": ov.get_version(), **{name: str(self.compiled.get_property(name)) for name in PROPERTIES}}

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt from an empty context."""
        self.request.reset_state()
        return {"seconds": self._run(0, tokens)}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Tokens one by one after `context` others."""
        self.request.reset_state()
        if context:
            self._run(0, context)
        return {"seconds": sum(self._run(context + i, 1) for i in range(tokens))}


if __name__ == "__main__":
    sys.exit(serve(lambda: Measured(json.loads(sys.argv[1]))))

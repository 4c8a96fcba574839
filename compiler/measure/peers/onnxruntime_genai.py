"""onnxruntime-genai on an ONNX model of the same shape: MatMulNBits with int8 activations, GroupQueryAttention.

The graph is what genai's model builder makes of a llama for the CPU, written here operator by operator, because the
builder wants a checkpoint: 4-bit (or 8-bit) symmetric weights, accuracy level 4 (activations rounded to int8), fp32
caches shared between steps, rotation inside the attention, the head on the last token only. Random weights.

python -m compiler.measure.peers.onnxruntime_genai REQUEST is the measured process, in the peer's environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compiler.errors import UnsupportedError
from compiler.measure.peers import PeerModel, Say, environment
from compiler.measure.process import Process, Timed, serve

NAME = "onnxruntime-genai"
VARIANTS = {"block-32": "a scale for 32 weights, as its model builder makes", "same-group": "groups as quern's"}
VERSION = "0.18.0"
PACKAGES = [f"onnxruntime-genai=={VERSION}", "onnx==1.23.2", "numpy==2.4.6; python_version >= '3.11'",
            "numpy==2.2.6; python_version < '3.11'"]  # fmt: skip
BLOCKS = (16, 32, 64, 128, 256)
ACCURACY_INT8 = 4
SMALL = 1024  # bytes


def _venv(place: Path) -> Path:
    return place / f"onnxruntime-genai-{VERSION}" / "venv"


def missing(place: Path, variant: str) -> str | None:
    """The environment, when it is not complete."""
    done = _venv(place) / "packages.txt"
    return None if done.is_file() else str(done.parent.relative_to(place))


def install(place: Path, variant: str, say: Say) -> None:
    """Wheels of its own."""
    environment(_venv(place), PACKAGES, say)


class Genai(Timed):
    """The measured process."""

    def __init__(self, process: Process, variant: str, threads: int) -> None:
        super().__init__(process)
        self.threads = threads
        self.name = f"{NAME}:{variant}"
        self.about: dict[str, object] = process.ask("about")

    def perplexity(self, windows: list[list[int]]) -> float:
        """Its weights are random."""
        raise UnsupportedError(f"{NAME}: runs random weights here, which have none")


@contextmanager
def opened(place: Path, variant: str, model: PeerModel, threads: int) -> Iterator[Genai]:
    """A model with random weights of this shape. Raises UnsupportedError for bits and groups that it has not."""
    if {model.bits, model.head_bits} - {4, 8}:
        raise UnsupportedError(f"{NAME}: has 4-bit and 8-bit weights here, not {model.bits} and {model.head_bits}.")
    if (kind := model.config["model_type"]) not in ("llama", "mistral"):
        raise UnsupportedError(f"{NAME}: the comparison makes llama and mistral models, not {kind}.")
    block = 32 if variant == "block-32" else model.group_size
    if block not in BLOCKS:
        raise UnsupportedError(f"{NAME}: has groups of {', '.join(map(str, BLOCKS))}, not {block}.")
    config = {k: v for k, v in model.config.items() if k != "quantization_config"}
    with tempfile.TemporaryDirectory(prefix="quern-bench-") as folder:
        request = {"config": config, "bits": model.bits, "block": block, "head_bits": model.head_bits,
                   "threads": threads, "folder": folder}  # fmt: skip
        with Process(_venv(place) / "bin" / "python", __name__, [json.dumps(request)]) as process:
            yield Genai(process, variant, threads)


class Graph:
    """Writes model.onnx and its weights file. Letters: n outputs, k inputs of a linear layer."""

    def __init__(self, config: dict[str, Any], bits: int, block: int, head_bits: int, folder: Path) -> None:
        import numpy as np
        import onnx

        self.np, self.onnx, self.folder = np, onnx, folder
        self.config, self.bits, self.block, self.head_bits = config, bits, block, head_bits
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.data = (folder / "model.onnx.data").open("wb")

    def constant(self, name: str, values: Any) -> str:
        """An initialiser, in the weights file unless it is so small that shapes may be inferred from it."""
        onnx = self.onnx
        if values.nbytes < SMALL:
            self.constants.append(onnx.numpy_helper.from_array(values, name))
            return name
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=values.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        self.data.write(b"\0" * (-self.data.tell() % 4096))
        entries = {"location": "model.onnx.data", "offset": self.data.tell(), "length": values.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self.data.write(values.tobytes())
        self.constants.append(tensor)
        return name

    def node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "com.microsoft", **attributes: Any
    ) -> str:
        """An operator; gives its first output."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def linear(self, x: str, name: str, n: int, k: int, bits: int) -> str:
        """MatMulNBits: codes u8[n, k / block, block * bits / 8], scales f32[n, k / block]."""
        np, block = self.np, self.block
        blocks, spread = -(-k // block), (1 << bits) / 12**0.5 * k**0.5
        codes = np.frombuffer(self.random.bytes(n * blocks * block * bits // 8), np.uint8).reshape(n, blocks, -1)
        scales = (self.random.uniform(0.5, 1.5, (n, blocks)) / spread).astype(np.float32)
        inputs = [x, self.constant(f"{name}.codes", codes), self.constant(f"{name}.scales", scales)]
        return self.node("MatMulNBits", inputs, [name], N=n, K=k, bits=bits, block_size=block,
                         accuracy_level=ACCURACY_INT8)  # fmt: skip

    def write(self) -> None:
        """The model; the weights file is complete then."""
        np, helper, kinds, c = self.np, self.onnx.helper, self.onnx.TensorProto, self.config
        hidden, vocab, layers = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
        info = helper.make_tensor_value_info
        inputs = [info("input_ids", kinds.INT64, ["b", "m"]), info("attention_mask", kinds.INT64, ["b", "s"])]
        outputs = [info("logits", kinds.FLOAT, ["b", 1, vocab])]
        for i in range(layers):
            for part in ("key", "value"):
                cache = ["b", self.kv_heads, "past", self.head_dim]
                inputs.append(info(f"past_key_values.{i}.{part}", kinds.FLOAT, cache))
                outputs.append(info(f"present.{i}.{part}", kinds.FLOAT, cache))
        table = self.random.standard_normal((vocab, hidden), np.float32).astype(np.float16)
        x = self.node("Gather", [self.constant("embedding", table), "input_ids"], ["rows"], "")
        x = self.node("Cast", [x], ["x"], "", to=kinds.FLOAT)
        self._lengths()
        norm = self.constant("ones", np.ones(hidden, np.float32))
        y = self.node("SimplifiedLayerNormalization", [x, norm], ["norm"], "", epsilon=c["rms_norm_eps"], axis=-1)
        for i in range(layers):
            x, y = self._block(i, x, y, norm)
        last = self.node("Gather", [y, self.constant("minus_one", np.array([-1]))], ["last"], "", axis=1)
        self.node("Identity", [self.linear(last, "head", vocab, hidden, self.head_bits)], ["logits"], "")
        self.data.close()
        graph = helper.make_graph(self.nodes, "llama", inputs, outputs, self.constants)
        versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        self.onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), str(self.folder / "model.onnx"))

    def _lengths(self) -> None:
        """seqlens i32[b]: tokens that are known, less one; total i32: positions of the mask."""
        np, kinds = self.np, self.onnx.TensorProto
        one = self.constant("one", np.array([1]))
        count = self.node("ReduceSum", ["attention_mask", one], ["known"], "", keepdims=0)
        self.node("Cast", [self.node("Sub", [count, one], ["known_1"], "")], ["seqlens"], "", to=kinds.INT32)
        shape = self.node("Shape", ["attention_mask"], ["mask_shape"], "")
        total = self.node("Gather", [shape, self.constant("axis", np.array(1))], ["mask_length"], "", axis=0)
        self.node("Cast", [total], ["total"], "", to=kinds.INT32)
        theta = (self.config.get("rope_parameters") or {}).get("rope_theta") or self.config.get("rope_theta") or 10000.0
        steps = theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = np.outer(np.arange(self.config["max_position_embeddings"]), steps)
        self.constant("cos", np.cos(angles).astype(np.float32))
        self.constant("sin", np.sin(angles).astype(np.float32))

    def _block(self, i: int, x: str, y: str, norm: str) -> tuple[str, str]:
        """One layer: (residual sum, its norm) to the same."""
        c, eps = self.config, self.config["rms_norm_eps"]
        hidden, ffn = c["hidden_size"], c["intermediate_size"]
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv = self.linear(y, f"qkv.{i}", q_width + 2 * kv_width, hidden, self.bits)
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        seen = self.node(
            "GroupQueryAttention", [qkv, "", "", *past, "seqlens", "total", "cos", "sin"],
            [f"attention.{i}", f"present.{i}.key", f"present.{i}.value"], num_heads=self.heads,
            kv_num_heads=self.kv_heads, do_rotary=1, scale=self.head_dim**-0.5,
        )  # fmt: skip
        made = self.linear(seen, f"o.{i}", hidden, q_width, self.bits)
        y = self._skip_norm(x, made, norm, f"ffn_norm.{i}", eps)
        x = f"ffn_norm.{i}.sum"
        gate, up = (self.linear(y, f"{part}.{i}", ffn, hidden, self.bits) for part in ("gate", "up"))
        silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], [f"sigmoid.{i}"], "")], [f"silu.{i}"], "")
        product = self.node("Mul", [silu, up], [f"product.{i}"], "")
        made = self.linear(product, f"down.{i}", hidden, ffn, self.bits)
        return f"next_norm.{i}.sum", self._skip_norm(x, made, norm, f"next_norm.{i}", eps)

    def _skip_norm(self, x: str, more: str, norm: str, name: str, eps: float) -> str:
        """The norm of x + more; the sum itself is NAME.sum."""
        outputs = [name, "", "", f"{name}.sum"]
        return self.node("SkipSimplifiedLayerNormalization", [x, more, norm], outputs, epsilon=eps)


def genai_config(config: dict[str, Any], threads: int) -> dict[str, Any]:
    """genai_config.json of the model that Graph writes."""
    heads, positions = config["num_attention_heads"], config["max_position_embeddings"]
    past = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    return {
        "model": {
            "type": "llama", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "context_length": positions,
            "vocab_size": config["vocab_size"],
            "decoder": {
                "session_options": {"intra_op_num_threads": threads, "provider_options": []},
                "filename": "model.onnx", "head_size": config.get("head_dim") or config["hidden_size"] // heads,
                "hidden_size": config["hidden_size"], "num_attention_heads": heads,
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "num_hidden_layers": config["num_hidden_layers"],
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
                "outputs": {"logits": "logits", **present},
            },
        },
        "search": {"max_length": positions, "past_present_share_buffer": True, "do_sample": False},
    }  # fmt: skip


class Measured:
    """The loaded model; each method is a verb. Tokens are given, not sampled."""

    def __init__(self, request: dict[str, Any]) -> None:
        import numpy as np
        import onnxruntime_genai as og

        folder, config = Path(request["folder"]), request["config"]
        Graph(config, request["bits"], request["block"], request["head_bits"], folder).write()
        settings = json.dumps(genai_config(config, request["threads"]))
        (folder / "genai_config.json").write_text(settings, encoding="utf-8")
        self.og, self.block, self.bits = og, request["block"], request["bits"]
        self.model = og.Model(str(folder))
        self.ids = np.random.default_rng(0).integers(2, config["vocab_size"], config["max_position_embeddings"])
        self.decode(2, 1)

    def about(self) -> dict[str, Any]:
        """Versions, weights."""
        from importlib.metadata import version

        versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
        return {**versions, "bits": self.bits, "block": self.block, "accuracy_level": ACCURACY_INT8}

    def _generator(self, positions: int) -> Any:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=positions + 1, min_length=positions + 1)
        return self.og.Generator(self.model, parameters)

    def prefill(self, tokens: int) -> dict[str, Any]:
        """A prompt from an empty context."""
        generator = self._generator(tokens)
        started = time.perf_counter()
        generator.append_tokens(self.ids[:tokens].astype("int32"))
        return {"seconds": time.perf_counter() - started}

    def decode(self, context: int, tokens: int) -> dict[str, Any]:
        """Tokens one by one after `context` others."""
        generator = self._generator(context + tokens)
        if context:
            generator.append_tokens(self.ids[:context].astype("int32"))
        started = time.perf_counter()
        for i in range(context, context + tokens):
            generator.append_tokens(self.ids[i : i + 1].astype("int32"))
        return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    sys.exit(serve(lambda: Measured(json.loads(sys.argv[1]))))

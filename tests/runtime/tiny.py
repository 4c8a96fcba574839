"""A whole bundle in a few seconds: a toy model with the contract's functions, built with TVM, and its numpy definition.

The toy: x_t = embedding[id_t]; the cache row of position p becomes x_p; hidden_t = sum of cache rows 0..p(t);
logits = hidden @ head^T. Each position depends on all before it, so a wrong span, cache or chunk shows in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime import device
from runtime import manifest as mf

VOCAB, HIDDEN, CONTEXT = 32, 8, 48
PREFILL = (4, 16)
CHUNK_BYTES = 512  # small, so that the few weights make several chunks
EOS = 1
ALPHABET = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", ".", "!", "?"]


def weights() -> dict[str, np.ndarray]:
    """embedding f16[VOCAB, HIDDEN], head f32[VOCAB, HIDDEN]: multiples of 1/8, so that sums are exact in float32."""
    rng = np.random.default_rng(7)
    return {
        "embedding": (rng.integers(-8, 9, (VOCAB, HIDDEN)) / 8).astype("float16"),
        "head": (rng.integers(-8, 9, (VOCAB, HIDDEN)) / 8).astype("float32"),
    }


def reference(ids: list[int]) -> np.ndarray:
    """Logits f32[len(ids), VOCAB] of the toy, by its definition."""
    w = weights()
    return np.cumsum(w["embedding"].astype("float32")[ids], axis=0) @ w["head"].T


def add_kernels(builder: Any, m: int) -> dict[str, Any]:
    """The three kernels for m tokens, as functions of a relax.BlockBuilder: name -> GlobalVar."""
    from tvm.script import tirx as T

    @T.prim_func(private=True, s_tir=True)
    def append(
        ids: T.Buffer((m,), "int32"),
        span: T.Buffer((2,), "int32"),
        table: T.Buffer((VOCAB, HIDDEN), "float16"),
        cache: T.Buffer((CONTEXT, HIDDEN), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for t, h in T.grid(m, HIDDEN):
            with T.sblock("append"):
                vt, vh = T.axis.remap("SS", [t, h])
                if vt < span[1]:
                    cache[span[0] + vt, vh] = T.Cast("float32", table[ids[vt], vh])

    @T.prim_func(private=True, s_tir=True)
    def mix(
        cache: T.Buffer((CONTEXT, HIDDEN), "float32"),
        span: T.Buffer((2,), "int32"),
        out: T.Buffer((m, HIDDEN), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for t, h, p in T.grid(m, HIDDEN, CONTEXT):
            with T.sblock("mix"):
                vt, vh, vp = T.axis.remap("SSR", [t, h, p])
                with T.init():
                    out[vt, vh] = T.float32(0)
                if vp <= span[0] + vt:
                    out[vt, vh] = out[vt, vh] + cache[vp, vh]

    @T.prim_func(private=True, s_tir=True)
    def head(
        hidden: T.Buffer((m, HIDDEN), "float32"),
        weight: T.Buffer((VOCAB, HIDDEN), "float32"),
        out: T.Buffer((m, VOCAB), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(m):
            for v, h in T.grid(VOCAB, HIDDEN):
                with T.sblock("head"):
                    vt, vv, vh = T.axis.remap("SSR", [t, v, h])
                    with T.init():
                        out[vt, vv] = T.float32(0)
                    out[vt, vv] = out[vt, vv] + hidden[vt, vh] * weight[vv, vh]

    @T.prim_func(private=True, s_tir=True)
    def last(
        hidden: T.Buffer((m, HIDDEN), "float32"), span: T.Buffer((2,), "int32"), out: T.Buffer((1, HIDDEN), "float32")
    ):
        T.func_attr({"tirx.noalias": True})
        for h in range(HIDDEN):
            with T.sblock("last"):
                vh = T.axis.spatial(HIDDEN, h)
                out[0, vh] = hidden[span[1] - 1, vh]

    kernels = {"append": append, "mix": mix, "head": head, "last": last}
    return {name: builder.add_func(kernel, f"{name}_{m}_kernel") for name, kernel in kernels.items()}


def add_functions(builder: Any, m: int) -> dict[str, mf.Function]:
    """`decode` and `head_1` for m = 1, otherwise `prefill_m` and `logits_m`; returns their manifest entries."""
    from tvm import relax

    def var(name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return relax.Var(name, relax.TensorType(shape, dtype))

    def emit(kernel: str, args: list[Any], columns: int, rows: int = m) -> Any:
        return builder.emit(relax.call_tir(kernels[kernel], args, relax.TensorType((rows, columns), "float32")))

    kernels = add_kernels(builder, m)
    cache_type = relax.TensorType((CONTEXT, HIDDEN), "float32")
    made: dict[str, mf.Function] = {}

    def step(name: str, last_only: bool) -> None:
        ids, span, cache, table, weight = params = [
            var("ids", (m,), "int32"),
            var("span", (2,), "int32"),
            var("cache", (CONTEXT, HIDDEN), "float32"),
            var("embedding", (VOCAB, HIDDEN), "float16"),
            var("head", (VOCAB, HIDDEN), "float32"),
        ]
        params = params[:-1] if last_only else params
        # The VM checks ids and span, kernels check the rest.
        with builder.function(name, params, attrs={"num_input": 2}):
            args = relax.Tuple([ids, span, table, cache])
            cache = builder.emit(relax.call_tir_inplace(kernels["append"], args, [3], cache_type))
            hidden = emit("mix", [cache, span], HIDDEN)
            result = emit("last", [hidden, span], HIDDEN, 1) if last_only else emit("head", [hidden, weight], VOCAB)
            builder.emit_func_output(result)
        shape = (1, HIDDEN) if last_only else (m, VOCAB)
        inputs = ("ids", "span", "cache", "embedding", "head")[: len(params)]
        made[name] = mf.Function(m, inputs, mf.TensorType("float32", shape))

    if m > 1:
        step(f"prefill_{m}", last_only=True)
        step(f"logits_{m}", last_only=False)
        return made
    step("decode", last_only=False)
    head = [var("hidden", (1, HIDDEN), "float32"), var("weight", (VOCAB, HIDDEN), "float32")]
    with builder.function("head_1", head):
        builder.emit_func_output(emit("head", head, VOCAB))
    made["head_1"] = mf.Function(1, ("hidden", "head"), mf.TensorType("float32", (1, VOCAB)))
    return made


def tokenizer_json() -> str:
    """A byte-level tokenizer with one token a letter, and a truncation setting that must not be obeyed."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {piece: i for i, piece in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(4)
    return str(tokenizer.to_str())


def build(folder: Path) -> mf.Manifest:
    """Compile the toy for this machine and write its bundle into `folder`."""
    import tvm
    from tvm import relax

    folder.mkdir(parents=True)
    builder, functions = relax.BlockBuilder(), {}
    for m in (1, *PREFILL):
        functions.update(add_functions(builder, m))
    executable = tvm.compile(builder.get(), tvm.target.Target({"kind": "llvm"}))
    executable.export_library(str(folder / "model.so"))
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    tensors, blob = [], b""
    for name, array in weights().items():
        blob += bytes(-len(blob) % 64)
        tensors.append(mf.Weight(name, str(array.dtype), array.shape, len(blob), array.nbytes))
        blob += array.tobytes()
    (folder / "weights.bin").write_bytes(blob)
    manifest = mf.Manifest(
        model=mf.Model("toy", "tiny", VOCAB, CONTEXT, 1, 2 * VOCAB * HIDDEN),
        quantization={"format": "none", "bits": 16},
        target=mf.Target("native", device.arch(), f"{device.arch()}-linux-gnu", "generic", (), "2.17"),
        tvm=mf.TvmVersions("0.27.0.post1", "0.1.14.post1"),
        tuning={},
        library="model.so",
        functions=functions,
        caches=(mf.Cache("cache", "float32", (CONTEXT, HIDDEN)),),
        weights=mf.Weights("weights.bin", 64, tuple(tensors)),
        memory=mf.Memory(len(blob), 4 * CONTEXT * HIDDEN, 4096, len(blob) + 4 * CONTEXT * HIDDEN + 4096),
        tokens=mf.Tokens(0, (EOS,)),
        chat=mf.ChatFormat("turns", ("s.", ""), ("u.", ""), ("a.", "!"), "", "a.", None),
        files={
            "model.so": mf.digest_file(folder / "model.so"),
            "tokenizer.json": mf.digest_file(folder / "tokenizer.json"),
            "weights.bin": mf.digest_file(folder / "weights.bin", CHUNK_BYTES),
        },
    )
    mf.dump(manifest, folder / mf.FILE_NAME)
    return manifest


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change top-level keys of a manifest file, whatever the schema says, and sign it again."""
    path = folder / mf.FILE_NAME
    path.write_text(signed({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def signed(data: dict[str, Any]) -> str:
    """The text of a manifest with these keys, with a right `sha256`."""
    return json.dumps({**data, "sha256": mf._digest_of_keys(data)})

"""compressed-tensors: words by hand, an independent loop over elements, which group has which module, the refusals."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from compiler.checkpoint import open_checkpoint
from compiler.errors import CheckpointError, ConfigError, FormatError, UnsupportedError, UserError
from compiler.quant.formats import open_source
from compiler.quant.ir import DenseWeight, QuantWeight, WeightType
from compiler.quant.packing import pack
from compiler.quant.reference import dequantize
from tests.checkpoint.files import write_checkpoint
from tests.quant.test_auto_round import ORIGINAL


def weights(**changed: Any) -> dict[str, Any]:
    values = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8, "dynamic": False,
              "actorder": None, "observer": "minmax", **changed}
    return {key: value for key, value in values.items() if value is not ...}


def settings(group: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    one = {"targets": ["Linear"], "weights": weights(), "input_activations": None, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
              "config_groups": {"group_0": one | (group or {})}, "ignore": ["lm_head"], "kv_cache_scheme": None,
              "sparsity_config": {}, "transform_config": {}, "version": "0.19.0", **changed}
    return {"quantization_config": {key: value for key, value in config.items() if value is not ...}}


PLAIN: dict[str, Any] = {"format": "int-quantized",
         "group": {"weights": weights(num_bits=8, strategy="channel", group_size=None)}}


def tensors(**changed: Any) -> dict[str, np.ndarray]:
    """Module "m" of 16 inputs in groups of 8 and 2 outputs, packed; a dense head and a norm; with some changed."""
    parts: dict[str, Any] = {
        "m.weight_packed": np.full((2, 2), 0x76543210, np.int32), "m.weight_scale": np.full((2, 2), 0.5, np.float32),
        "m.weight_shape": np.array([2, 16], np.int64), "lm_head.weight": np.ones((4, 16), np.float16),
        "norm.weight": np.ones(16, np.float32)}
    parts |= {name.replace("__", "."): value for name, value in changed.items()}
    return {name: value for name, value in parts.items() if value is not None}


def plain(**changed: Any) -> dict[str, Any]:
    return {"m__weight_packed": None, "m__weight_shape": None, "m__weight_scale": np.full((2, 1), 0.5, np.float32),
            "m__weight": np.array([[-128, -1, 0, 127]] * 2, np.int8), **changed}


def checkpoint(folder: Path, config: dict[str, Any], **changed: Any) -> Any:
    return open_source(open_checkpoint(write_checkpoint(folder, config, tensors(**changed))))


def load(folder: Path, config: dict[str, Any], **changed: Any) -> QuantWeight:
    source = checkpoint(folder, config, **changed)
    w = source.load("m")
    assert isinstance(w, QuantWeight)
    assert source.describe("m") == w.type
    return w


def test_packed_by_hand(tmp_path: Path) -> None:  # nibbles 0..7 are q = -8..-1, scale 0.5
    w = load(tmp_path, settings())
    assert dequantize(w)[0].tolist() == [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5] * 2
    assert w.type == WeightType(2, 16, "int4", 8, "float32", symmetric=True)


def test_zero_points_are_packed_along_n_by_hand(tmp_path: Path) -> None:  # row 0: stored 9 and 1, row 1: 2 and 15
    asymmetric = settings({"weights": weights(symmetric=False, zp_dtype="torch.int8")})
    packed = np.array([[0x29, 0xF1]], np.uint32).view(np.int32)
    w = load(tmp_path, asymmetric, m__weight_zero_point=packed)
    assert w.zero.tolist() == [[9, 1], [2, 15]]
    assert not w.symmetric
    assert dequantize(w)[0, 7:9].tolist() == [-1, -0.5]
    old = np.array([[1, -7], [-6, 7]], np.int8)  # before 0.9 they were not packed: 9 - 8, 1 - 8...
    assert np.array_equal(load(tmp_path, asymmetric, m__weight_zero_point=old).zero, w.zero)


def test_plain_by_hand(tmp_path: Path) -> None:
    w = load(tmp_path, settings(**PLAIN), **plain())
    assert w.type == WeightType(2, 4, "int8", 4, "float32", symmetric=True)
    assert w.codes[0].tolist() == [0, 127, 128, 255]
    assert dequantize(w)[0].tolist() == [-64, -0.5, 0, 63.5]
    group = {"weights": weights(num_bits=8, strategy="channel", group_size=None, symmetric=False)}
    w = load(tmp_path, settings(group, format="naive-quantized"), **plain(
        m__weight_zero_point=np.array([[-128], [127]], np.int8)))
    assert dequantize(w).tolist() == [[0, 63.5, 64, 127.5], [-127.5, -64, -63.5, 0]]


def test_a_corner_of_a_real_file(tmp_path: Path) -> None:
    """Eight inputs and outputs that llm-compressor wrote (compressed-tensors 0.19.0, round to nearest, asymmetric)."""
    scale = [0.03129882737994194, 0.02767740935087204, 0.02618815191090107, 0.02826334722340107, 0.02426757849752903,
             0.02363281324505806, 0.03122558631002903, 0.02814127691090107]
    packed = [0x88587637, 0x4AA77BA8, 0x7CDCFC89, 0x79A3CA6F, 0x989D48A9, 0xAA8679E9, 0x95628676, 0x99895587]
    w = load(tmp_path, settings({"weights": weights(symmetric=False)}),
             m__weight_packed=np.array(packed, np.uint32).view(np.int32)[:, None],
             m__weight_zero_point=np.array([[0x77978886]], np.uint32).view(np.int32),
             m__weight_scale=np.array(scale, np.float32)[:, None], m__weight_shape=np.array([8, 8], np.int64))
    half = np.array(scale)[:, None] * (0.5 + 1e-6)  # round to nearest
    assert (np.abs(dequantize(w)[:, :4] - ORIGINAL) <= half).all()


def test_four_bits_in_bytes_by_hand(tmp_path: Path) -> None:
    group = {"weights": weights(strategy="channel", group_size=None)}
    w = load(tmp_path, settings(group, format="int-quantized"), **plain(m__weight=np.array([[-8, 7]] * 2, np.int8)))
    assert w.codes.tolist() == [[0, 15]] * 2
    with pytest.raises(FormatError) as error:
        load(tmp_path, settings(group, format="int-quantized"), **plain(m__weight=np.array([[-8, 8]] * 2, np.int8)))
    assert str(error.value) == (
        f"{tmp_path / 'model.safetensors'}: m.weight: a value is 8, but num_bits = 4 allows -8 to 7. The configuration "
        f"belongs to another checkpoint, or the file is damaged.")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_all(tmp_path: Path, shape: tuple[int, ...]) -> None:
    group = {"weights": weights(num_bits=8, strategy="tensor", group_size=None)}
    w = load(tmp_path, settings(group, format="int-quantized"), **plain(m__weight_scale=np.full(shape, 2, np.float16)))
    assert w.scale.tolist() == [[2], [2]]
    assert w.type.scale == "float16"


@pytest.mark.parametrize(("inputs", "said"), [
    (None, "any"), ({"num_bits": 8, "dynamic": True, "strategy": "token", "type": "int"}, "int8-token"),
    ({"num_bits": 8, "dynamic": False, "strategy": "tensor", "type": "int", "symmetric": False}, "int8-static"),
])
def test_activations_are_remembered(tmp_path: Path, inputs: dict[str, Any] | None, said: str) -> None:
    group = PLAIN["group"] | {"input_activations": inputs}
    extra = {"m__input_scale": np.ones(1, np.float32), "m__input_zero_point": np.zeros(1, np.int8)}
    assert load(tmp_path, settings(group, format="int-quantized"), **plain(**extra)).type.activations == said


def test_act_order(tmp_path: Path) -> None:
    g_idx = np.array([1, 0] * 8, np.int32)
    config = settings({"weights": weights(actorder="group")})
    scale = np.array([[1, 2]] * 2, np.float32)
    w = load(tmp_path, config, m__weight_scale=scale, m__weight_g_idx=g_idx)
    assert w.permutation is not None
    assert w.permutation.tolist() == [*range(1, 16, 2), *range(0, 16, 2)]
    assert dequantize(w)[0, :4].tolist() == [-16, -7, -12, -5]
    assert load(tmp_path, config, m__weight_g_idx=np.full(16, -1, np.int32)).permutation is None
    assert load(tmp_path, settings({"weights": weights(actorder="static")})).permutation is None


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(bits=st.sampled_from([2, 3, 4, 8]), n=st.integers(1, 40), k=st.integers(1, 70),
       group=st.sampled_from([0, 7, 32]), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_agrees_with_the_definition(tmp_path: Path, bits: int, n: int, k: int, group: int, symmetric: bool,
                                    seed: int) -> None:
    """q is what the quantiser had; it is offset, padded with zero fields to whole words, and packed."""
    rng = np.random.default_rng(seed)
    middle, size = 1 << bits - 1, min(group or k, k)
    groups = -(-k // size)
    q = rng.integers(-middle, middle, (n, k))
    zero = np.zeros((n, groups), np.int64) if symmetric else rng.integers(-middle, middle, (n, groups))
    scale = rng.standard_normal((n, groups)).astype(np.float32)

    def packed(values: np.ndarray) -> np.ndarray:
        words = -(-values.shape[1] * bits // 32)
        fields = np.pad(values + middle, ((0, 0), (0, -values.shape[1] % 32)))
        return pack(fields.astype(np.uint8), bits, 1)[:, :words]

    stored = {"m__weight_packed": packed(q), "m__weight_scale": scale, "m__weight_shape": np.array([n, k], np.int64)}
    if not symmetric:
        stored["m__weight_zero_point"] = np.ascontiguousarray(packed(zero.T).T)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": -1}
    w = load(tmp_path, settings({"weights": weights(num_bits=bits, symmetric=symmetric, **strategy)}), **stored)
    at = np.arange(k) // size
    assert np.array_equal(dequantize(w), scale[:, at] * (q - zero[:, at]).astype(np.float32))
    assert np.array_equal(packed(w.codes.astype(np.int64) - middle), stored["m__weight_packed"])


def test_a_checkpoint(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, settings(), m__bias=np.ones(2, np.float16))
    assert source.modules() == ["m", "lm_head"]
    assert (source.has("m"), source.has("lm_head"), source.has("n")) == (True, True, False)
    assert isinstance(source.load("lm_head"), DenseWeight)
    assert source.bias("m").tolist() == [1, 1]
    assert source.vector("norm").tolist() == [1.0] * 16


@pytest.mark.parametrize(("targets", "found"), [  # names first, then patterns in alphabetical order, then the class
    ({"a": ["Linear"], "b": ["m"]}, "b"), ({"a": ["Linear"], "b": ["re:.*m"]}, "b"),
    ({"a": ["m"], "b": ["re:.*"]}, "a"), ({"a": ["re:m.*"], "b": ["re:.*m"]}, "b"),
    ({"a": ["re:.m"], "b": ["Linear"]}, "b"), ({"a": ["x", "m"]}, "a"),
])
def test_targets(tmp_path: Path, targets: dict[str, list[str]], found: str) -> None:
    groups = {name: {"targets": listed, "weights": weights(group_size=8 if name == found else 4)}
              for name, listed in targets.items()}
    assert load(tmp_path, settings(config_groups=groups)).group_size == 8


def test_groups_of_different_formats(tmp_path: Path) -> None:
    groups = {"a": {"targets": ["re:.*head"], "weights": weights(num_bits=8, strategy="channel", group_size=None),
                    "format": "int-quantized"}, "b": {"targets": ["Linear"], "weights": weights(),
                                                      "format": "pack-quantized"}}
    source = checkpoint(tmp_path, settings(format="mixed-precision", config_groups=groups),
                        lm_head__weight=np.ones((4, 16), np.int8), lm_head__weight_scale=np.ones((4, 1), np.float32))
    assert (source.describe("m").grid, source.describe("lm_head").grid) == ("int4", "int8")


def refusal(folder: Path, config: dict[str, Any], kind: type[UserError], **changed: Any) -> str:
    with pytest.raises(kind) as error:
        checkpoint(folder, config, **changed).load("m")
    assert type(error.value) is kind
    return str(error.value)


END = "config_groups is of another checkpoint, or the file is damaged."
NEEDS = "but pack-quantized with 4 bits and group_size 8 needs"
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"m__weight_shape": np.array([3, 16])},
          f"m.weight_packed is int32[2, 2], {NEEDS} int32[n, ceil(k * 4 / 32)], and weight_shape says n = 3, k = 16. "
          f"{END}"),
    "k": ({"m__weight_shape": np.array([2, -16])},
          f"m.weight_packed is int32[2, 2], {NEEDS} int32[n, ceil(k * 4 / 32)], and weight_shape says n = 2, k = -16. "
          f"{END}"),
    "weight_shape": ({"m__weight_shape": np.array([2, 16, 1])},
                     f"m.weight_shape is int64[3], {NEEDS} int64[2]. {END}"),
    "dtype": ({"m__weight_packed": np.zeros((2, 2), np.int8)},
              f"m.weight_packed is int8[2, 2], {NEEDS} int32 in two dimensions, neither of them 0. {END}"),
    "scale": ({"m__weight_scale": np.ones((2, 1), np.float32)},
              f"m.weight_scale is float32[2, 1], {NEEDS} 16- or 32-bit floats [2, 2]. {END}"),
    "integer scale": ({"m__weight_scale": np.ones((2, 2), np.int8)},
                      f"m.weight_scale is int8[2, 2], {NEEDS} 16- or 32-bit floats [2, 2]. {END}"),
    "zero": ({"m__weight_zero_point": np.zeros((2, 2), np.int32)},
             f"m.weight_zero_point is int32[2, 2], {NEEDS} int32[1, 2]. {END}"),
    "zero where there is none": ({"m__weight_zero_point": np.full((1, 2), 0x88888889 - 2**32, np.int32)},
                                 "m.weight_zero_point: a zero point is 1, but symmetric = true needs 0 everywhere. If "
                                 "the file has zero points, config.json must say symmetric = false."),
    "g_idx": ({"m__weight_g_idx": np.zeros(16, np.int32)},
              "m.weight_g_idx is there, but actorder is not 'group'. The configuration belongs to another checkpoint, "
              "or was edited."),
    "g_idx shape": ({"m__weight_g_idx": np.zeros(15, np.int32)},
                    f"m.weight_g_idx is int32[15], {NEEDS} int32[16]. {END}"),
    "NaN": ({"m__weight_scale": np.full((2, 2), np.inf, np.float32)},
            "m.weight_scale: 4 of 4 are NaN or infinite. The file is damaged or the quantisation failed: fetch it "
            "again, or quantise again."),
}


@pytest.mark.parametrize("case", SHAPES)
def test_refuses_tensors_that_lie(tmp_path: Path, case: str) -> None:
    changed, message = SHAPES[case]
    assert refusal(tmp_path, settings(), FormatError, **changed) == f"{tmp_path / 'model.safetensors'}: {message}"


def test_refuses_a_g_idx_that_names_no_group(tmp_path: Path) -> None:
    config = settings({"weights": weights(actorder="group")})
    assert refusal(tmp_path, config, FormatError, m__weight_g_idx=np.full(16, 7, np.int32)) == (
        f"{tmp_path / 'model.safetensors'}: m.weight_g_idx: input 0 is in group 7, but group_size 8 makes groups 0 to "
        f"1. The file is damaged, or group_size is wrong.")


def test_refuses_missing_and_double_tensors(tmp_path: Path) -> None:
    for part in ("weight_scale", "weight_shape"):
        assert refusal(tmp_path, settings(), FormatError, **{f"m__{part}": None}) == (
            f"{tmp_path}: m has no .{part}, which config_groups says it has. The configuration belongs to another "
            f"checkpoint, or the file is damaged.")
    assert refusal(tmp_path, settings(), FormatError, m__weight=np.zeros((2, 16), np.float16)) == (
        f"{tmp_path}: m has both .weight and .weight_packed. Remove the one that is not the model's.")
    assert refusal(tmp_path, settings({"targets": ["x"]}), FormatError) == (
        f"{tmp_path}: m is quantised, but no group of config_groups has it among its targets. The configuration "
        f"belongs to another checkpoint, or was edited.")


def test_refuses_its_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    packed = refusal(tmp_path, settings(**PLAIN), FormatError)
    assert packed == (f"{tmp_path}: m has no .weight, which config_groups says it has. The configuration belongs to "
                      f"another checkpoint, or the file is damaged.")
    fake = refusal(tmp_path, settings(**PLAIN), FormatError, **plain(m__weight=np.ones((2, 4), np.float16)))
    assert fake == (f"{file}: m.weight is float16[2, 4], but int-quantized with 8 bits and one group a row needs int8 "
                    f"in two dimensions, neither of them 0. {END}")
    gptq = {"m__weight_packed": None, "m__weight_scale": None, "m__weight_shape": None,
            "m__qweight": np.zeros((2, 8), np.int32)}
    assert refusal(tmp_path, settings(), CheckpointError, **gptq) == (
        f"{tmp_path} has no tensor 'm.weight', but 'm.qweight'. If another tool quantised it, config.json must name "
        f"its quant_method.")
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8}}
    assert refusal(tmp_path, config, CheckpointError) == (
        f"{tmp_path} has no tensor 'm.weight', but 'm.weight_packed', 'm.weight_scale', 'm.weight_shape'. If another "
        f"tool quantised it, config.json must name its quant_method.")


def group(**changed: Any) -> dict[str, Any]:
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": weights(), **changed}}}


UNKNOWN = ("quern does not know this key and will not guess what it changes. If it changes nothing in the computation, "
           "remove it; otherwise the model is not supported.")
CONFIGS: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "format": ({"format": "float-quantized"}, UnsupportedError,
               "config_groups.group_0.format is 'float-quantized', but quern reads pack-quantized and int-quantized. "
               "Take the model in one of these."),
    "status": ({"quantization_status": "calibration"}, ConfigError,
               "quantization_status is 'calibration', but it must be one of 'compressed', 'frozen'."),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedError,
               "sparsity_config is not empty, and quern does not support it. Take the model without it."),
    "rotation": ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, UnsupportedError,
                 "transform_config is not empty, and quern does not support it. Take the model without it."),
    "kv": ({"kv_cache_scheme": {"num_bits": 8}}, UnsupportedError,
           "kv_cache_scheme is not empty, and quern does not support it. Take the model without it."),
    "float": (group(weights=weights(type="float")), ConfigError,
              "config_groups.g.weights.type is 'float', but it must be one of 'int'."),
    "bits": (group(weights=weights(num_bits=7)), UnsupportedError,
             "config_groups.g.weights.num_bits is 7, but quern decodes pack-quantized with 2, 3, 4, 8 bits. Take the "
             "model with one of these."),
    "dynamic": (group(weights=weights(dynamic=True)), UnsupportedError,
                "config_groups.g.weights.dynamic is true: the weights have no stored scales."),
    "block": (group(weights=weights(strategy="block")), ConfigError,
              "config_groups.g.weights.strategy is 'block', but it must be one of 'group', 'channel', 'tensor'."),
    "block_structure": (group(weights=weights(block_structure=[8, 8])), UnsupportedError,
                        "config_groups.g.weights.block_structure is set, but quern has groups within rows only."),
    "group_size": (group(weights=weights(group_size=-1)), FormatError,
                   "config_groups.g.weights.group_size is -1, but strategy is 'group': a group needs at least 1, "
                   "anything else none."),
    "outputs": (group(output_activations={"num_bits": 8}), UnsupportedError,
                "config_groups.g.output_activations is set, but quern does not quantise what linear layers put out. "
                "Take the model without that."),
    "inputs": (group(input_activations={"num_bits": 8, "type": "float"}), ConfigError,
               "config_groups.g.input_activations.type is 'float', but it must be one of 'int'."),
    "few input bits": (group(input_activations={"num_bits": 4}), ConfigError,
                       "config_groups.g.input_activations.num_bits is 4, but it must be an integer from 8 to 8."),
    "preset": ({"config_groups": {"W8A8": ["Linear"]}}, ConfigError,
               'config_groups.W8A8 is ["Linear"], but it must be an object.'),
    "pattern": (group(targets=["re:(?!x)"]), UnsupportedError,
                "config_groups.g.targets is a pattern that quern does not match: invalid perl operator: (?!. Write it "
                "without lookaround and back references, or name the modules."),
    "unknown": ({"zipper": 1}, ConfigError, f"zipper is 1: {UNKNOWN}"),
    "unknown in weights": (group(weights=weights(warp=2)), ConfigError,
                           f"config_groups.g.weights.warp is 2: {UNKNOWN}"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_refuses_settings_it_does_not_know(tmp_path: Path, case: str) -> None:
    changed, kind, message = CONFIGS[case]
    assert refusal(tmp_path, settings(**changed), kind) == (
        f"{tmp_path / 'config.json'}: quantization_config.{message}")


def test_a_dense_sparsity_is_none(tmp_path: Path) -> None:
    dense = {"format": "dense", "global_sparsity": 0.1, "ignore": [], "targets": []}
    assert load(tmp_path, settings(sparsity_config=dense, transform_config={"config_groups": {}})).group_size == 8


STATIC = {**PLAIN, "group": PLAIN["group"] | {"input_activations": {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "group_size": None, "block_structure": None,
    "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {}}}}


def test_frozen_files_of_older_llm_compressors_are_the_same(tmp_path: Path) -> None:
    w = load(tmp_path, settings(**PLAIN, quantization_status="frozen"), **plain())
    assert dequantize(w)[0].tolist() == [-64, -0.5, 0, 63.5]


@pytest.mark.parametrize("scale", [
    np.array([0.02], np.float32), np.array([0x3CA4], np.uint16), np.array(0.5, np.float16)])
def test_static_activations_as_llm_compressor_writes_them(tmp_path: Path, scale: np.ndarray) -> None:
    w = load(tmp_path, settings(**STATIC), **plain(m__input_scale=scale))
    assert w.type == WeightType(2, 4, "int8", 4, "float32", activations="int8-static", symmetric=True)


@pytest.mark.parametrize(("scale", "said"), [
    (None, "{folder}: m has no .input_scale, which config_groups with static input_activations says it has. The "
           "configuration belongs to another checkpoint, or the file is damaged."),
    (np.ones(2, np.float32), "{file}: m.input_scale is float32[2], but static input_activations need one 16- or 32-bit "
                             "float. config_groups is of another checkpoint, or the file is damaged."),
    (np.zeros(1, np.float32), "{file}: m.input_scale is 0, but a scale is above 0. The file is damaged: fetch it "
                              "again."),
    (np.full(1, np.nan, np.float32), "{file}: m.input_scale: 1 of 1 are NaN or infinite. The file is damaged or the "
                                     "quantisation failed: fetch it again, or quantise again."),
])
def test_static_activations_without_a_sound_scale_are_refused(tmp_path: Path, scale: Any, said: str) -> None:
    with pytest.raises(FormatError) as error:
        load(tmp_path, settings(**STATIC), **plain(m__input_scale=scale))
    assert str(error.value) == said.format(folder=tmp_path, file=tmp_path / "model.safetensors")

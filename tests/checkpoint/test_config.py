"""Typed getters, the message of each, merging of the quantisation part, and refusal of keys that nobody read."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiler.checkpoint.config import Config, read_config
from compiler.errors import ConfigError


def config(**values: Any) -> Config:
    return Config.of(values, "config.json")


def test_getters_give_values_and_defaults() -> None:
    c = config(i=3, n=1, f=0.5, b=False, s="silu", one=1, many=[1, 2], names=["x"], null=None, sub={"k": 1})
    assert (c.integer("i", 0, 9), c.integer("absent", 0, 9, 4), c.integer("null", 0, 9, 5)) == (3, 4, 5)
    assert (c.number("n", 0, 1), c.number("f", 0, 1), c.number("absent", 0, 1, 0.25)) == (1.0, 0.5, 0.25)
    assert (c.boolean("b"), c.boolean("absent", True)) == (False, True)
    assert (c.string("s"), c.string("s", ["silu", "gelu"]), c.string("absent", (), "x")) == ("silu", "silu", "x")
    assert (c.integers("one", 0, 9), c.integers("many", 0, 9), c.integers("absent", 0, 9, ())) == ((1,), (1, 2), ())
    assert c.strings("names") == ("x",)
    assert c.section("sub").integer("k", 0, 1) == 1
    assert (c.has("null"), c.has("absent"), c.has("i")) == (False, False, True)
    assert c.names() == ["i", "n", "f", "b", "s", "one", "many", "names", "sub"]


WRONG: list[tuple[Any, Callable[[Config], object], str]] = [
    ("4", lambda c: c.integer("k", 1, 9), "'4', but it must be an integer from 1 to 9"),
    (True, lambda c: c.integer("k", 1, 9), "true, but it must be an integer from 1 to 9"),
    (4.0, lambda c: c.integer("k", 1, 9), "4.0, but it must be an integer from 1 to 9"),
    (10, lambda c: c.integer("k", 1, 9), "10, but it must be an integer from 1 to 9"),
    (None, lambda c: c.integer("k", 1, 9), "null, but it must be an integer from 1 to 9"),
    ([1, 99], lambda c: c.integers("k", 1, 9), "[1, 99], but it must be an integer from 1 to 9, or a list of them"),
    (float("inf"), lambda c: c.number("k", 0, 1e30), "Infinity, but it must be a number from 0 to 1e+30"),
    (float("nan"), lambda c: c.number("k", 0, 1), "NaN, but it must be a number from 0 to 1"),
    (10**400, lambda c: c.number("k", 0, 1), f"1{'0' * 119}..., but it must be a number from 0 to 1"),
    (True, lambda c: c.number("k", 0, 1), "true, but it must be a number from 0 to 1"),
    (0, lambda c: c.boolean("k"), "0, but it must be true or false"),
    ("gelu", lambda c: c.string("k", ["silu"]), "'gelu', but it must be one of 'silu'"),
    (1, lambda c: c.string("k"), "1, but it must be a string"),
    ("x" * 81, lambda c: c.string("k"), f"'{'x' * 81}', but it must be a string of at most 80 characters"),
    (["a", 1], lambda c: c.strings("k"), '["a", 1], but it must be a list of strings'),
    ([], lambda c: c.section("k"), "[], but it must be an object"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_value_is_named(case: int) -> None:
    value, get, message = WRONG[case]
    with pytest.raises(ConfigError) as error:
        get(config(k=value))
    assert str(error.value) == f"config.json: k is {message}."


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        config(sub={}).section("sub").integer("k", 1, 2)
    assert str(error.value) == "config.json: sub.k is missing, but it must be an integer from 1 to 2."


def test_unhandled_keys_are_refused_by_name() -> None:
    c = config(hidden_size=8, use_cache=True, logit_softcap=30.0, unset=None, rope={"theta": 1, "factor": 8}, other=1)
    c.integer("hidden_size", 1, 9)
    c.section("rope").integer("theta", 1, 9)
    with pytest.raises(ConfigError) as error:
        c.refuse_unhandled(["other"])
    assert str(error.value) == (
        "config.json: logit_softcap is 30.0; config.json: rope.factor is 8: quern does not know this key and will not "
        "guess what it changes. If it changes nothing in the computation, remove it; otherwise the model is "
        "not supported.")
    c.accept("logit_softcap")
    c.section("rope").accept("factor")
    c.refuse_unhandled(["other"])


def test_many_unhandled_keys_make_a_short_message() -> None:
    with pytest.raises(ConfigError, match=r"k5 is 5; and 94 more: quern does not know"):
        config(**{f"k{i}": i for i in range(100)}).refuse_unhandled()


def folder(tmp_path: Path, **files: Any) -> Path:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_the_quantisation_part_is_merged_from_both_places(tmp_path: Path) -> None:
    c = read_config(folder(tmp_path, config={"a": 1, "quantization_config": {"bits": 4, "name": None}},
                           quantize_config={"bits": 4, "group_size": 128, "name": "x"}))
    assert c.quantization is not None
    assert c.quantization.data == {"bits": 4, "name": "x", "group_size": 128}
    assert c.data == {"a": 1, "quantization_config": {"bits": 4, "name": "x", "group_size": 128}}
    assert c.quantization.where("bits") == f"{tmp_path / 'config.json'}: quantization_config.bits"
    assert c.quantization.where("group_size") == f"{tmp_path / 'quantize_config.json'}: group_size"
    c.accept("a")
    c.refuse_unhandled()  # a model does not answer for the quantisation part


def test_no_quantisation_part(tmp_path: Path) -> None:
    assert read_config(folder(tmp_path, config={"quantization_config": None})).quantization is None


def test_a_contradiction_is_reported_when_it_matters(tmp_path: Path) -> None:
    c = read_config(folder(tmp_path, config={"quantization_config": {"bits": 4, "damp_percent": 0.1}},
                           quantize_config={"bits": 8, "damp_percent": 0.01})).quantization
    assert c is not None
    with pytest.raises(ConfigError) as error:
        c.integer("bits", 1, 8)
    assert str(error.value) == (
        f"{tmp_path / 'config.json'}: quantization_config.bits is 4, but {tmp_path / 'quantize_config.json'}: bits is "
        f"8. Make them agree: both describe the same tensors.")
    c.refuse_unhandled(["damp_percent"])


def test_a_quantisation_part_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(folder(tmp_path, config={"quantization_config": [4]}))
    assert str(error.value) == f"{tmp_path / 'config.json'}: quantization_config is [4], but it must be an object."

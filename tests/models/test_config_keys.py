"""Every key of every architecture's configuration class in transformers, one at a time.

Another value changes the graph, its constants or what is folded into weights, or it is refused, or it is in HARMLESS.
A key that is taken out means what transformers' default means, or is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from compiler import models
from compiler.checkpoint.config import Config
from compiler.errors import UserError
from compiler.graph.weights import Constant
from compiler.models import Options
from compiler.quant.ir import WeightType
from tests.models.oracle import SMALL

NAMES = [name for name in models.known() if name != "gemma3"]  # whose keys are gemma3_text's, one level down
# Values with which other keys say something, for the classes that know them.
TELLING = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
OWN = {
    "phi3": {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}},
}  # fmt: skip
# Where a file comes from, how it was trained or is run; or what other keys say already, in the same file.
HARMLESS = {
    "architectures", "dtype", "transformers_version", "use_cache", "initializer_range", "attention_dropout",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
    "_name_or_path", "pretraining_tp", "pad_token_id", "embd_pdrop", "resid_pdrop", "output_attentions",
}  # fmt: skip
BESIDE_LAYER_TYPES = {"max_window_layers", "_sliding_window_pattern"}
UNSET = {"head_dim": 14, "sliding_window": 9, "bos_token_id": 5, "attn_logit_softcapping": 3.0, "layer_types": ["x"],
         "final_logit_softcapping": 3.0, "use_bidirectional_attention": True, "num_key_value_heads": 3}  # fmt: skip


def written(name: str) -> dict[str, Any]:
    """Everything that the class knows, as save_pretrained would write it and more."""
    class_ = CONFIG_MAPPING[name]
    telling = {key: value for key, value in TELLING.items() if key in class_().to_dict()}
    values: dict[str, Any] = class_(**{**SMALL, **telling, **OWN.get(name, {})}).to_dict()
    return values


def signature(values: dict[str, Any], head: int) -> tuple[Any, ...]:
    """The graph, its constants, what else is folded, and the tokens that begin and end a text.

    head: elements of a head in the checkpoint, whose other widths are SMALL's.
    """
    hidden, heads, kv = (SMALL[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    ffn, vocab = SMALL["intermediate_size"], SMALL["vocab_size"]
    shapes = {
        "q_proj": (heads * head, hidden), "k_proj": (kv * head, hidden), "v_proj": (kv * head, hidden),
        "o_proj": (hidden, heads * head), "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn), "embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden),
        "qkv_proj": ((heads + 2 * kv) * head, hidden), "gate_up_proj": (2 * ffn, hidden),
    }  # fmt: skip
    options = Options(None, (), "float32", lambda weight: weight, lambda weight: weight)
    config = Config.of(copy.deepcopy(values), "config.json")
    model = models.build(config, lambda m: WeightType(*shapes[m.rpartition(".")[2]], "float16", 0), options)
    weights = [(w.name, w.values.tobytes()) if isinstance(w, Constant) else w for w in model.weights]
    return model.graph.module().script(), weights, model.context, model.bos, model.eos


def another(key: str, value: Any) -> Any:
    """A value of the same kind that means something else."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return f"other {value}"
    if isinstance(value, list):
        return list(reversed(value)) if len(set(map(str, value))) > 1 else ["other"]
    if isinstance(value, dict):
        return {inner: another(inner, item) for inner, item in value.items()}
    return UNSET[key]


def head_of(values: dict[str, Any]) -> int:
    """Elements of a head."""
    return values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]


@pytest.mark.parametrize("name", NAMES)
def test_another_value_shows_or_is_refused(name: str) -> None:
    values = written(name)
    plain, silent, head = signature(values, head_of(values)), [], head_of(values)
    for key in values.keys() - HARMLESS:
        changed = {**values, key: another(key, values[key])}
        if key in BESIDE_LAYER_TYPES:
            del changed["layer_types"]
        try:
            if signature(changed, head) == plain:
                silent.append(key)
        except UserError:
            continue
    assert silent == []


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_key_means_what_transformers_means(name: str) -> None:
    usual, values = CONFIG_MAPPING[name]().to_dict(), written(name)
    wrong, head = [], head_of(values)
    for key in values.keys() - HARMLESS - {"model_type", "bos_token_id", "eos_token_id"}:
        without = {other: value for other, value in values.items() if other != key}
        try:
            if signature(without, head) != signature({**values, key: usual[key]}, head):
                wrong.append(key)
        except UserError:
            continue
    assert wrong == []

"""Tokenizers out of GGUF metadata encode as the ones that went in: byte-level BPE and SentencePiece BPE."""
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compiler.checkpoint import gguf_tokenizer
from compiler.errors import CheckpointError, UnsupportedError, UserError
from tests.checkpoint.gguf_files import TOKENS, TYPES

TEXTS = ["Once upon a time, there were 1234567 mice.", "  two  spaces\tand\n\nlines ", "It's DON'T we'LL", "naïve café",
         "日本語 と emoji 🐭🧀", "a</s>b <s>", "x" * 50, "", " ", "snake_case(foo)=>[1,2]"]
CORPUS = [*TEXTS, "the mill grinds big grain small, the miller sings, the grain is ground", "mice and men"] * 3
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
SPM = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": TOKENS,
       "tokenizer.ggml.scores": -np.arange(len(TOKENS), dtype=np.float32),
       "tokenizer.ggml.token_type": np.array(TYPES, np.int32), "tokenizer.ggml.bos_token_id": 1,
       "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


def built(metadata: dict[str, Any]) -> Any:
    return Tokenizer.from_str(gguf_tokenizer.files(metadata, "FILE")["tokenizer.json"].decode())


def refusal(metadata: dict[str, Any], kind: type[UserError] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        gguf_tokenizer.files(metadata, "FILE")
    assert type(error.value) is kind
    return str(error.value)


def trained(split: Any, normalizer: Any = None, **options: Any) -> Any:
    """A byte-level BPE as GPT-2's kin have it."""
    made: Any = Tokenizer(models.BPE(**options))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    return made


def as_metadata(made: Any, pre: str) -> dict[str, Any]:
    """As convert_hf_to_gguf.py writes it: merges with a space between, special tokens of type 3."""
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
            "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(tokens) - 2), np.int32),
            "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}


def split_and_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(("pre", "made"), [
    ("gpt-2", trained(GPT2)),
    ("smollm", trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]))),
    ("qwen2", trained(split_and_bytes(LLAMA3.replace("{1,3}", "")), normalizers.NFC())),
    ("llama-bpe", trained(split_and_bytes(LLAMA3), ignore_merges=True)),
    ("dbrx", trained(split_and_bytes(LLAMA3))),
])
def test_byte_level_bpe_encodes_as_the_original(pre: str, made: Any) -> None:
    mine = built(as_metadata(made, pre))
    for text in TEXTS:
        ids = made.encode(text, add_special_tokens=False).ids
        assert mine.encode(text, add_special_tokens=False).ids == ids, text
        assert mine.decode(ids) == made.decode(ids)
    begins = [0] if pre == "llama-bpe" else []
    assert mine.encode("a").ids == [*begins, *made.encode("a").ids]


def test_start_and_end_tokens_follow_the_metadata() -> None:
    metadata = as_metadata(trained(GPT2), "gpt-2")
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ids = built(metadata).encode("mice").ids
    assert built(metadata | flags).encode("mice").ids == [0, *ids, 1]
    assert built(SPM).encode("").ids == [1]
    assert built(SPM | {"tokenizer.ggml.add_bos_token": False}).encode("").ids == []


def llama2(prefix: bool) -> tuple[Any, list[str]]:
    """A BPE with byte fallback, put together as Llama 2's tokenizer.json is, from merges learnt here."""
    words: Any = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    words.train_from_iterator([text for text in CORPUS if "<" not in text],
                              trainers.BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(words.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    characters = sorted(set(model["vocab"]) - {a + b for a, b in merges})
    tokens = [*TOKENS[:259], *dict.fromkeys(a + b for a, b in merges), *characters]
    made: Any = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace] if prefix else [replace])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])
    return made, tokens


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe_encodes_as_the_original(prefix: bool) -> None:
    made, tokens = llama2(prefix)
    assert len(tokens) > 400
    mine = built(SPM | {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": -np.arange(len(tokens), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), np.int32),
        "tokenizer.ggml.add_space_prefix": prefix})
    for text in TEXTS:
        assert mine.encode(text).ids == made.encode(text).ids, text
        assert mine.decode(mine.encode(text).ids) == made.decode(made.encode(text).ids)


def test_sentencepiece_merges_by_hand() -> None:  # "ab" scores higher than "▁a", so "▁ab" comes from ▁ and ab
    mine = built(SPM)
    assert mine.encode("ab").tokens == ["<s>", "\u2581ab"]
    assert mine.encode("abc é").tokens == ["<s>", "\u2581ab", "c", "\u2581", "<0xC3>", "<0xA9>"]
    assert mine.decode(mine.encode("abc é").ids) == "abc é"


def test_what_chat_needs() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    files = gguf_tokenizer.files(SPM | {"tokenizer.chat_template": template}, "FILE")
    assert json.loads(files["tokenizer_config.json"]) == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    assert gguf_tokenizer.files({}, "FILE") == {}


DAMAGED = "The file is damaged, or was converted wrongly: fetch another one."


@pytest.mark.parametrize(("changed", "message"), [
    ({"tokens": None}, f"FILE: tokenizer.ggml.tokens is no list of strings. {DAMAGED}"),
    ({"tokens": ["a", "a"]}, f"FILE: tokenizer.ggml.tokens has a token twice. {DAMAGED}"),
    ({"token_type": np.zeros(3, np.int32)},
     f"FILE: tokenizer.ggml.token_type is no list of {len(TOKENS)} integers. {DAMAGED}"),
    ({"scores": None}, f"FILE: tokenizer.ggml.scores is no list of {len(TOKENS)} numbers. {DAMAGED}"),
    ({"scores": np.full(len(TOKENS), np.nan, np.float32)},
     f"FILE: tokenizer.ggml.scores has a score that is not finite. {DAMAGED}"),
    ({"bos_token_id": 999},
     f"FILE: tokenizer.ggml.bos_token_id is 999, but it must be one of {len(TOKENS)} tokens. {DAMAGED}"),
    ({"model": "gpt2", "pre": "gpt-2"}, f"FILE: tokenizer.ggml.merges is no list of strings. {DAMAGED}"),
    ({"model": "gpt2", "pre": "gpt-2", "merges": ["a b", "ab"]},
     f"FILE: the merge 'ab' is not two tokens. {DAMAGED}"),
])
def test_refuses_damage(changed: dict[str, Any], message: str) -> None:
    assert refusal(SPM | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}) == message


def test_refuses_what_it_would_get_wrong() -> None:
    known = ", ".join(gguf_tokenizer.SPLITS)
    assert refusal(SPM | {"tokenizer.ggml.model": "t5"}, UnsupportedError) == (
        "FILE: tokenizer.ggml.model is 't5', but quern reads gpt2 and llama. Take the model as safetensors, with its "
        "tokenizer.json.")
    for pre, shown in ((None, "null"), ("viking", "'viking'")):
        assert refusal(SPM | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}, UnsupportedError) == (
            f"FILE: tokenizer.ggml.pre is {shown}, but quern knows {known}. Convert the model with a current "
            f"llama.cpp, or take it as safetensors.")
    assert refusal(SPM | {"tokenizer.ggml.remove_extra_whitespaces": True}, UnsupportedError) == (
        "FILE: the tokenizer normalises text (remove_extra_whitespaces or precompiled_charsmap), which quern does not "
        "do for SentencePiece BPE. Take the model as safetensors, with its tokenizer.json.")


@pytest.mark.parametrize(("pre", "pieces"), [  # by hand, from the patterns in the models' tokenizer.json
    ("qwen2", ["don", "'t", " HTTPServer", " getName", " ", "1", "2", "3", "4", "/\n"]),
    ("llama-bpe", ["don", "'t", " HTTPServer", " getName", " ", "123", "4", "/\n"]),
    ("gpt-4o", ["don't", " HTTPServer", " get", "Name", " ", "123", "4", "/\n"]),
    ("tekken", ["don", "'t", " HTTPServer", " get", "Name", " ", "1", "2", "3", "4", "/\n"]),
    ("smollm", ["don", "'t", " HTTPServer", " getName", " ", "1", "2", "3", "4", "/", "\n"]),
])  # fmt: skip
def test_where_a_text_is_split(pre: str, pieces: list[str]) -> None:
    text = "don't HTTPServer getName 1234/\n"
    model = {"type": "BPE", "vocab": {}, "merges": []}
    splitter = {"version": "1.0", "pre_tokenizer": gguf_tokenizer.SPLITS[pre], "model": model}
    made = Tokenizer.from_str(json.dumps(splitter))
    assert [text[a:b] for _, (a, b) in made.pre_tokenizer.pre_tokenize_str(text)] == pieces

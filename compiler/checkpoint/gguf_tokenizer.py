"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json, in the layout of the tokenizers library.

tokenizer.ggml.model "gpt2": byte-level BPE with merges; tokenizer.ggml.pre names the split before it.
tokenizer.ggml.model "llama": SentencePiece BPE; merges follow from the scores, as transformers' converter has it.
Other kinds (bert, t5, rwkv) and unknown splits are refused: a wrong split gives wrong tokens without any sign.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from compiler.checkpoint.strict_json import shown
from compiler.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"
LONGEST_PIECE = 256  # characters of a token that may take part in merges
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        _byte_level(use_regex=False)]}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_GPT2 = _byte_level(use_regex=True)
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}
_LLAMA3, _QWEN2 = _split(_WORDS % r"\p{N}{1,3}"), _split(_WORDS % r"\p{N}")
# Words are cut where small letters end; %s: what may follow a word, twice, and a number.
_CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
          r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O, _TEKKEN = _split(_CASED % (_ENDING, _ENDING, r"\p{N}{1,3}")), _split(_CASED % ("", "", r"\p{N}"))
# tokenizer.ggml.pre -> what splits the text before BPE, as the tokenizer.json of those models has it.
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2, "phi-2": _GPT2, "olmo": _GPT2, "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "dbrx": _LLAMA3, "smaug-bpe": _LLAMA3,
    "falcon3": _LLAMA3, "gpt-4o": _GPT4O, "tekken": _TEKKEN, "megrez": _QWEN2,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}
BEGIN = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a text begins with BOS unless the file says otherwise
WHOLE_WORDS_FIRST = (*BEGIN, "tekken")  # a word that is a token needs no merges
NFC = ("qwen2", "deepseek-r1-qwen")


def files(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; nothing when the file has no tokenizer. Raises UserError."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none"):
        return {}
    tokens, types = _tokens(metadata, where)
    if kind == "gpt2":
        made = _gpt2(metadata, tokens, where)
    elif kind == "llama":
        made = _sentencepiece(metadata, tokens, types, where)
    else:
        raise UnsupportedError(f"{where}: tokenizer.ggml.model is {shown(kind)}, but quern reads gpt2 and llama. "
                               f"Take the model as safetensors, with its tokenizer.json.")
    made |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(tokens, types),
             "post_processor": _post_processor(metadata, tokens, kind, where)}
    return {"tokenizer.json": json.dumps(made, ensure_ascii=False).encode("utf-8", "strict"),
            "tokenizer_config.json": json.dumps(_config(metadata, tokens)).encode()}


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what}. The file is damaged, or was converted wrongly: fetch another one.")


def _tokens(metadata: Mapping[str, Any], where: str) -> tuple[list[str], list[int]]:
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not _is_strings(tokens) or not tokens:
        _refuse(where, "tokenizer.ggml.tokens is no list of strings")
    if len(set(tokens)) != len(tokens):
        _refuse(where, "tokenizer.ggml.tokens has a token twice")
    if types is None:
        return tokens, [NORMAL] * len(tokens)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        _refuse(where, f"tokenizer.ggml.token_type is no list of {len(tokens)} integers")
    return tokens, types.tolist()


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _gpt2(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    pre, merges = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.merges")
    if pre not in SPLITS:
        raise UnsupportedError(f"{where}: tokenizer.ggml.pre is {shown(pre)}, but quern knows {', '.join(SPLITS)}. "
                               f"Convert the model with a current llama.cpp, or take it as safetensors.")
    if merges is None or not _is_strings(merges):
        _refuse(where, "tokenizer.ggml.merges is no list of strings")
    pairs = []
    for merge in merges:
        left, _, right = merge[1:].partition(" ")  # from the second character on: a token is never empty
        if not right:
            _refuse(where, f"the merge {shown(merge)} is not two tokens")
        pairs.append([merge[:1] + left, right])
    return {
        "normalizer": {"type": "NFC"} if pre in NFC else None, "pre_tokenizer": SPLITS[pre],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, pairs, ignore_merges=pre in WHOLE_WORDS_FIRST),
    }


def _bpe(tokens: list[str], merges: list[list[str]], **changed: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges, **changed}


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        _refuse(where, f"tokenizer.ggml.scores is no list of {len(tokens)} numbers")
    if not np.isfinite(scores).all():
        _refuse(where, "tokenizer.ggml.scores has a score that is not finite")
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces") or metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise UnsupportedError(f"{where}: the tokenizer normalises text (remove_extra_whitespaces or "
                               f"precompiled_charsmap), which quern does not do for SentencePiece BPE. "
                               f"Take the model as safetensors, with its tokenizer.json.")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [
            *([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            back, {"type": "ByteFallback"}, {"type": "Fuse"}, *(strip if prefix else [])]},
        "model": _bpe(tokens, _merges(tokens, types, scores.tolist()), unk_token=unknown, fuse_unk=True,
                      byte_fallback=True),
    }


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """SentencePiece merges the neighbours whose union scores highest; pairs are listed in that order."""
    pieces = {token: number for number, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for token, number in pieces.items():
        if len(token) > LONGEST_PIECE:
            continue
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        inside = [(pieces[a], pieces[b], a, b) for a, b in halves if a in pieces and b in pieces]
        found += [(scores[number], len(a), len(b), a, b) for _, _, a, b in sorted(inside)]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [[a, b] for *_, a, b in found]


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Tokens that are found in text as a whole; the special ones do not come out of decoding."""
    return [{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": kind != USER_DEFINED}
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token]


def _post_processor(metadata: Mapping[str, Any], tokens: list[str], kind: str, where: str) -> dict[str, Any] | None:
    """Start and end tokens, where the file or llama.cpp's default for the kind asks for them."""
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in BEGIN
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special: dict[str, Any] = {}
    for key, default, place in (("bos", begins, 0), ("eos", False, 2)):
        if metadata.get(f"tokenizer.ggml.add_{key}_token", default) is not True:
            continue
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is not int or not 0 <= number < len(tokens):
            _refuse(where, f"tokenizer.ggml.{key}_token_id is {shown(number)}, but it must be one of {len(tokens)} "
                           f"tokens")
        single.insert(place, {"SpecialToken": {"id": tokens[number], "type_id": 0}})
        special[tokens[number]] = {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
    if not special:
        return None
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What chat needs: the template, and the special tokens it may name."""
    found: dict[str, Any] = {}
    for key, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found[f"{ours}_token"] = tokens[number]
    template = metadata.get("tokenizer.chat_template")
    return found | ({"chat_template": template} if isinstance(template, str) else {})

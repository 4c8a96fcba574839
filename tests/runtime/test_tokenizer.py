"""Streaming text: whole characters only, spaces where they belong, stop strings that straddle tokens."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from runtime.errors import BundleError, InputError
from runtime.tokenizer import StopStrings, TextStream
from runtime.tokenizer import Tokenizer as OurTokenizer
from tests.runtime import tiny

BYTES = [f"<0x{b:02X}>" for b in range(256)]


def byte_level() -> Tokenizer:
    """Each byte is a token, as in GPT-2: ids 0..255 in the order of the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama-like: words with a leading ▁, unknown characters as bytes, a leading space that decoding strips."""
    words = ["▁", "▁Hello", "▁world", "Hello", "world", ",", "▁a", "a", "b", "▁b", "é", "你"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *BYTES, *words])}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def stream_all(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    stream = TextStream(lambda window: tokenizer.decode(list(window)), prompt)
    return [*(stream.push(i) for i in ids), stream.finish()]


# --- streaming -------------------------------------------------------------------------------------------------------


def test_half_characters_wait() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a€b").ids
    assert len(ids) == 5
    assert stream_all(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def test_bytes_of_sentencepiece_wait() -> None:
    tokenizer = sentencepiece()
    ids = [1 + b for b in "€é".encode()]
    assert stream_all(tokenizer, ids) == ["", "", "€", "", "é", ""]


def test_an_unfinished_character_comes_out_as_a_replacement_at_the_end() -> None:
    tokenizer = byte_level()
    assert stream_all(tokenizer, tokenizer.encode("a€").ids[:-1]) == ["a", "", "", "\ufffd"]


def test_bytes_that_never_become_text_do_not_block() -> None:
    tokenizer = byte_level()
    lone = tokenizer.encode("é").ids[0]
    pieces = stream_all(tokenizer, [lone] * 30)
    assert "".join(pieces) == "\ufffd" * 30
    assert pieces[8]  # held for eight tokens, then let go


def test_a_leading_space_belongs_to_the_first_token_only_without_a_prompt() -> None:
    tokenizer = sentencepiece()
    ids = [tokenizer.get_vocab()[t] for t in ("▁Hello", ",", "▁world")]
    assert stream_all(tokenizer, ids) == ["Hello", ",", " world", ""]
    assert stream_all(tokenizer, ids, prompt=ids) == [" Hello", ",", " world", ""]


def test_a_prompt_that_ends_inside_a_run_of_bytes() -> None:
    tokenizer = sentencepiece()
    prompt = [1 + b for b in ("€" * 10).encode()]
    ids = [1 + b for b in "€é".encode()]
    assert stream_all(tokenizer, ids, prompt) == ["", "", "€", "", "é", ""]
    assert stream_all(tokenizer, ids, prompt[:-1])[-1] != "\ufffd"


@settings(max_examples=150)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30), st.integers(0, 10))
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_pieces_join_to_the_whole_text(make: object, text: str, cut: int) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    everything = tokenizer.encode(text).ids
    prompt, ids = everything[:cut], everything[cut:]
    pieces = stream_all(tokenizer, ids, prompt)
    before = tokenizer.decode(prompt)
    if "\ufffd" not in before:  # the cut may fall inside a character
        assert before + "".join(pieces) == tokenizer.decode(everything)
        assert "\ufffd" not in "".join(pieces)


# --- stop strings ----------------------------------------------------------------------------------------------------


def test_stop_strings_by_hand() -> None:
    stops = StopStrings(["END", "\n\n"])
    assert stops.push("one E") == ("one ", False)  # E may begin END
    assert stops.push("N") == ("", False)
    assert stops.push("T\n") == ("ENT", False)
    assert stops.push("x\n") == ("\nx", False)
    assert stops.push("\nrest") == ("", True)
    assert stops.finish() == ""


def test_held_text_comes_out_at_the_end() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the EN") == ("the ", False)
    assert stops.finish() == "EN"


def test_the_earliest_stop_wins() -> None:
    assert StopStrings(["cd", "b"]).push("abcd") == ("a", True)


def test_an_empty_stop_string() -> None:
    with pytest.raises(InputError) as caught:
        StopStrings(["a", ""])
    assert str(caught.value) == "a stop string is empty, but it must have at least one character."


@settings(max_examples=300)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_no_cut_changes_the_result(text: str, stops: list[str], data: st.DataObject) -> None:
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    watcher, shown, done = StopStrings(stops), "", False
    left = text
    while left and not done:
        size = data.draw(st.integers(1, 4))
        piece, done = watcher.push(left[:size])
        shown, left = shown + piece, left[size:]
        assert not any(s in shown for s in stops)
    shown += "" if done else watcher.finish()
    assert done == bool(found)
    if not found:
        assert shown == text
    else:  # the text is cut at the first stop that was complete; one that begins earlier may have been longer
        assert text.startswith(shown)
        assert any(text.startswith(s, len(shown)) for s in stops)


# --- the library -----------------------------------------------------------------------------------------------------


def test_truncation_is_switched_off(toy: Path) -> None:
    assert OurTokenizer(toy / "tokenizer.json").encode("abcdefgh") == [2, 3, 4, 5, 6, 7, 8, 9]


def test_special_tokens(toy: Path) -> None:
    tokenizer = OurTokenizer(toy / "tokenizer.json")
    assert tokenizer.encode("a</s>") == [2, tiny.EOS]
    assert tokenizer.has_special("a</s>")
    assert not tokenizer.has_special("a/s")
    assert tiny.EOS not in tokenizer.encode_plain("a</s>b")
    assert tokenizer.encode("</s>") == [tiny.EOS]
    assert tokenizer.decode([2, tiny.EOS, 3]) == "ab"


def test_refuses_what_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: is no tokenizer that this version of "):
        OurTokenizer(path)


def test_refuses_a_prompt_that_is_no_text(toy: Path) -> None:
    with pytest.raises(InputError) as caught:
        OurTokenizer(toy / "tokenizer.json").encode("a\udcff")
    assert str(caught.value) == "the prompt is not valid UTF-8. Check the encoding of the terminal or file."

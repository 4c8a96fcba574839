"""Text to ids and back. The only file that imports the `tokenizers` library.

Streaming text is harder than it looks: one character may take several tokens, and a tokenizer may write a leading space
only where a token is not the first. `TextStream` therefore decodes a short window of tokens, never one token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import BundleError, InputError

UNDECIDED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)
PROMPT_TAIL_TOKENS = 8  # enough for a decoder to see that a reply does not begin the text
MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; more undecided tokens than this are not going to become one


def library() -> Any:
    """The class that reads tokenizer.json; BundleError where the library is not installed."""
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise BundleError(
            "The Python package tokenizers is not installed, but text needs it. "
            "Install it (pip install tokenizers), or use the logits command, which takes ids."
        ) from None
    return Fast


class Tokenizer:
    """tokenizer.json, with the truncation and padding that some checkpoints ship switched off."""

    def __init__(self, path: Path) -> None:
        fast = library()
        try:
            self._fast = fast.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(
                f"{path}: is no tokenizer that this version of the tokenizers package can read: {error}. "
                "Update the package or rebuild the bundle."
            ) from None
        self._fast.no_truncation()
        self._fast.no_padding()
        self._special = tuple(t.content for t in self._fast.get_added_tokens_decoder().values() if t.special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text. `special`: let the tokenizer add its start and end tokens, as for a plain prompt."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("the prompt is not valid UTF-8. Check the encoding of the terminal or file.") from None
        return list(self._fast.encode(text, add_special_tokens=special).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special: "</s>" is four characters here."""
        self._fast.encode_special_tokens = True
        try:
            return self.encode(text, special=False)
        finally:
            self._fast.encode_special_tokens = False

    def has_special(self, text: str) -> bool:
        """Whether `encode` would find a special token written out in the text."""
        return any(content in text for content in self._special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._fast.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """Text of a growing list of tokens, a piece at a time; the pieces never hold half a character.

    `decode` gives the text of ids. `prompt` is what comes before, of which only the end matters: it decides on a
    leading space, and is not repeated.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = _tail(decode, prompt)  # tokens whose text is out, then tokens that are held
        self._out_tokens = len(self._window)
        self._out_text = decode(self._window) if self._window else ""

    def push(self, token: int) -> str:
        """Text that this token settles: "" while a character is incomplete."""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._out_tokens
        if text.endswith(UNDECIDED) and held <= MAX_HELD_TOKENS:
            settled = text.rstrip(UNDECIDED)
            if not settled.startswith(self._out_text):
                return ""
            piece, self._out_text = settled[len(self._out_text) :], settled
            return piece
        piece = text[len(self._out_text) :]
        self._window = self._window[-held:]  # begins where a character begins: a run of byte tokens decodes as a whole
        self._out_tokens, self._out_text = len(self._window), self._decode(self._window)
        return piece

    def finish(self) -> str:
        """What is still held: an incomplete character comes out as U+FFFD."""
        if self._out_tokens == len(self._window):
            return ""
        text = self._decode(self._window)
        self._out_tokens = len(self._window)
        return text[len(self._out_text) :]


def _tail(decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, a few more than needed when they would begin inside a character."""
    for count in range(PROMPT_TAIL_TOKENS, PROMPT_TAIL_TOKENS + 4):
        tail = list(prompt[-count:])
        if not decode(tail).startswith(UNDECIDED):
            return tail
    return list(prompt[-PROMPT_TAIL_TOKENS:])


class StopStrings:
    """Ends a text before the first stop string, which may straddle tokens: what could become one is held back."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise InputError("a stop string is empty, but it must have at least one character.")
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string was found; after that nothing may be pushed."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def finish(self) -> str:
        """What was held and did not become a stop string."""
        shown, self._held = self._held, ""
        return shown

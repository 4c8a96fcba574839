"""A conversation: turns into ids, with the KV cache kept between them, and the terminal loop around it.

manifest.chat states the text around each part, so no template engine is needed on the device. A bundle without it gets
the plain form: what you type continues the text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Literal, NamedTuple, Optional

from .errors import ContextFullError, InputError
from .generate import Generation, Statistics
from .manifest import ChatFormat
from .sampler import Sampler
from .session import Session
from .tokenizer import StopStrings, TextStream, Tokenizer

Role = Literal["system", "user", "assistant"]
HELP = "/reset starts over, Ctrl-C ends a reply, /exit (or end of input) leaves."


class Part(NamedTuple):
    """A piece of a turn. What the user wrote is `literal`: special tokens spelt out in it are ordinary text."""

    text: str
    literal: bool


def turn(chat: Optional[ChatFormat], text: str, first: bool, system: Optional[str] = None) -> list[Part]:
    """What to take in for a user's turn, up to where the assistant begins to speak.

    Follows the model's own template: start, system, user, generation prompt; later turns first close the reply before.
    """
    if chat is None:
        return [Part("" if first else "\n", False), Part(text, True)]
    parts = [Part(chat.start if first else chat.assistant[1], False)]
    told = chat.default_system if system is None else system
    if first and told is not None and chat.system is not None:
        parts += [Part(chat.system[0], False), Part(told, True), Part(chat.system[1], False)]
    parts += [
        Part(chat.user[0], False),
        Part(text, True),
        Part(chat.user[1], False),
        Part(chat.generation_prompt, False),
    ]
    return parts


def messages(chat: Optional[ChatFormat], turns: Sequence[tuple[Role, str]]) -> list[Part]:
    """What to take in for a whole conversation: perhaps a system message, then user and assistant in turns.

    The last is the user's; the parts end where the assistant begins to speak. Without a format: a text a line.
    """
    if chat is None:
        return [Part(("" if i == 0 else "\n") + text, True) for i, (_, text) in enumerate(turns)]
    parts = [Part(chat.start, False)]
    around = {"system": chat.system, "user": chat.user, "assistant": chat.assistant}
    if turns[0][0] != "system" and chat.default_system is not None:
        turns = [("system", chat.default_system), *turns]
    for role, text in turns:
        before, after = around[role] or ("", "")
        parts += [Part(before, False), Part(text, True), Part(after, False)]
    return [*parts, Part(chat.generation_prompt, False)]


def encode(tokenizer: Tokenizer, parts: Sequence[Part], special: bool) -> list[int]:
    """Ids of a turn: as one text, which is how templates are trained, unless the user's text spells a special token."""
    if not any(part.literal and tokenizer.has_special(part.text) for part in parts):
        return tokenizer.encode("".join(part.text for part in parts), special=special)
    ids: list[int] = []
    for part in parts:
        ids += tokenizer.encode_plain(part.text) if part.literal else tokenizer.encode(part.text, special=False)
    return ids


class Conversation:
    """Keeps the session's cache in step with what was said. A turn that does not fit leaves everything as it was."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        max_new_tokens: int,
        stops: Sequence[str] = (),
        system: Optional[str] = None,
    ) -> None:
        self._session, self._tokenizer, self._sampler = session, tokenizer, sampler
        self._max_new_tokens, self._stops, self._system = max_new_tokens, tuple(stops), system
        self._chat = session.manifest.chat
        if system is not None and (self._chat is None or self._chat.system is None):
            raise InputError("the model's chat template has no system message. Leave out --system.")
        self._end_ids = frozenset(session.manifest.tokens.eos)
        self._pending: list[int] = []  # tokens of the last reply that the session has not taken in
        self._first = True

    def reset(self) -> None:
        """Forget all turns."""
        self._session.reset()
        self._sampler.forget()
        self._pending, self._first = [], True

    def say(self, text: str) -> Generator[str, None, None]:
        """Take in the user's turn and yield the reply as it grows. Raises ContextFullError before anything changes.

        An interrupt in the middle of the turn leaves everything as it was; later, what was said of the reply stays.
        """
        ids = encode(
            self._tokenizer,
            turn(self._chat, text, self._first, self._system),
            special=self._chat is None and self._first,
        )
        bos = self._session.manifest.tokens.bos
        ids = self._pending + ids or ([] if bos is None else [bos])
        self._session.check_ids(ids)
        start = self._session.position
        reply = Generation(self._session, self._sampler, self._max_new_tokens, Statistics(0.0), self._end_ids)
        try:
            yield from reply.text(ids, TextStream(self._tokenizer.decode, ids), StopStrings(self._stops))
        finally:
            said = self._session.position - start - len(ids)
            if said < 0:
                self._session.rewind(start)
            else:
                self._pending, self._first = reply.tokens[said:], False


def converse(
    conversation: Conversation, read: Callable[[], str], write: Callable[[str], None], interactive: bool = False
) -> None:
    """Read lines until /exit or EOFError, write replies. interactive: an interrupt ends a reply, not everything."""
    while True:
        try:
            line = read()
        except EOFError:
            return
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
            write("(new conversation)\n")
        elif command.startswith("/"):
            write(f"(unknown command {command.split()[0]}: {HELP})\n")
        elif command:
            try:
                with closing(conversation.say(line)) as reply:
                    for piece in reply:
                        write(piece)
                write("\n")
            except ContextFullError as error:
                write(f"({error} {HELP})\n")
            except KeyboardInterrupt:
                if not interactive:
                    raise
                write("\n(interrupted; /exit leaves)\n")


def terminal_reader() -> Callable[[], str]:
    """Lines from standard input: with a prompt and line editing on a terminal, silent in a pipe."""
    if not sys.stdin.isatty():

        def from_pipe() -> str:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")

        return from_pipe
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing
    print(HELP, file=sys.stderr)  # noqa: T201
    return lambda: input("> ")

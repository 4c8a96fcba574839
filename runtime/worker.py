"""What a server computes: one request after the other, in the thread that made the session.

A request keeps what it shares with the one before it in the cache, so a conversation that grows is not read again from
its start. Tokenizer and session are used here only, so neither needs a lock.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import NamedTuple, Union

from .chat import encode
from .completions import Asked, Usage
from .errors import InputError, UserError
from .generate import Generation, Statistics
from .sampler import Sampler
from .session import Session
from .tokenizer import StopStrings, TextStream, Tokenizer


class End(NamedTuple):
    """The last of a request's events: why it stopped, and its tokens."""

    reason: str
    usage: Usage


Event = Union[str, End, BaseException]  # a piece of text, the end, or what went wrong


class Left(Exception):
    """Nobody waits for this job any more."""


class Job:
    """A request on its way. `events` come from the thread that computes; `gone` is set when nobody waits any more."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.gone = threading.Event()

    def go_on(self) -> None:
        """Raise Left when nobody waits any more."""
        if self.gone.is_set():
            raise Left


class Worker:
    """Computes jobs, one at a time."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session, self._tokenizer = session, tokenizer
        self._ends = frozenset(session.manifest.tokens.eos)
        self._held: list[int] = []  # the ids that the cache holds, by position

    def work(self, job: Job) -> None:
        """All of a job while somebody waits, into its events. Whatever goes wrong with it goes there, too."""
        try:
            self._work(job)
        except Left:
            return
        except (UserError, MemoryError) as error:
            job.events.put(error)

    def _work(self, job: Job) -> None:
        ids, session = self._ids(job.asked), self._session
        shared = self._shared(ids)
        sampler = Sampler(job.asked.sampling, session.manifest.model.vocab_size)
        session.rewind(shared)
        del self._held[shared:]
        session.check_ids(ids[shared:])
        sampler.observe(ids[:shared])
        clock = Statistics(time.perf_counter())
        reply = Generation(session, sampler, job.asked.max_new_tokens, clock, self._ends, between=job.go_on)
        stream, stops = TextStream(self._tokenizer.decode, ids), StopStrings(job.asked.stops)
        try:
            for piece in reply.text(ids[shared:], stream, stops):
                job.events.put(piece)
                job.go_on()
        finally:
            self._held = [*ids, *reply.tokens][: session.position]
        usage = Usage(len(ids), shared, len(reply.tokens))
        job.events.put(End(reply.stop_reason, usage))

    def _ids(self, asked: Asked) -> list[int]:
        ids = list(asked.ids) or encode(self._tokenizer, asked.parts, asked.special)
        bos = self._session.manifest.tokens.bos
        if ids:
            return ids
        if bos is None:
            raise InputError("the prompt is empty and the model has no start token. Give some text.")
        return [bos]

    def _shared(self, ids: list[int]) -> int:
        """How many ids the cache has already; the last one is always computed, for its logits."""
        limit = min(len(self._held), len(ids) - 1)
        return next((i for i in range(limit) if self._held[i] != ids[i]), limit)

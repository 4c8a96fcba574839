"""The loop: take in a prompt, choose a token, take it in, until something says stop. With its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Callable, Optional

from .sampler import Sampler
from .session import Session

if TYPE_CHECKING:
    from .tokenizer import StopStrings, TextStream


@dataclass
class Statistics:
    """What a run took. `first_token_s` counts from `started`; decode leaves out the first token."""

    started: float
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    first_token_s: Optional[float] = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens a second, after the first."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


@dataclass
class Generation:
    """One reply while it grows. `stop_reason`: "eos", "stop", "length" (max_new_tokens) or "context" (no room left).

    `tokens` are all chosen ids without the end token; the session may not have taken in the last one yet.
    between: as in Session.prefill.
    """

    session: Session
    sampler: Sampler
    max_new_tokens: int
    statistics: Statistics
    end_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    stop_reason: str = "length"
    between: Callable[[], object] = lambda: None

    def run(self, ids: Sequence[int]) -> Iterator[int]:
        """Take in `ids`, then yield tokens. Closing the iterator early leaves `tokens` right."""
        clock, statistics = time.perf_counter, self.statistics
        statistics.prompt_tokens, begun = len(ids), clock()
        self.sampler.observe(ids)
        logits = self.session.prefill(ids, self.between)
        statistics.prefill_s = clock() - begun
        while len(self.tokens) < self.max_new_tokens:
            token = self.sampler.sample(logits)
            if statistics.first_token_s is None:
                statistics.first_token_s = clock() - statistics.started
            if token in self.end_ids:
                self.stop_reason = "eos"
                return
            self.tokens.append(token)
            yield token
            if len(self.tokens) == self.max_new_tokens:
                return
            if not self.session.remaining:
                self.stop_reason = "context"
                return
            begun = clock()
            logits = self.session.step(token)
            statistics.decode_s += clock() - begun
            statistics.decode_steps += 1

    def text(self, ids: Sequence[int], stream: TextStream, stops: StopStrings) -> Iterator[str]:
        """The same as text that is decided: no half characters, nothing that may turn out to be a stop string."""
        for token in self.run(ids):
            piece, stopped = stops.push(stream.push(token))
            if piece:
                yield piece
            if stopped:
                self.stop_reason = "stop"
                return
        piece, stopped = stops.push(stream.finish())
        if stopped:
            self.stop_reason = "stop"
        else:
            piece += stops.finish()
        if piece:
            yield piece

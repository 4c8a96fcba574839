"""Speed of a bundle on the device that runs it. Tokens are given, nothing is sampled; no tokenizer and no numpy needed.

A prefill goes from an empty context to the logits of its last token; decoding is the mean over its tokens. Both take
turns. What else explains a speed is told with it: the cores' clock and temperature before and after, as Linux has them.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from . import device
from .errors import InputError
from .session import Session

SEED = 0
MODEL, HEAT = Path("/proc/device-tree/model"), Path("/sys/class/thermal/thermal_zone0/temp")


class Timed:
    """Times calls of a session, in seconds."""

    def __init__(self, session: Session) -> None:
        self._session = session
        pick, model = random.Random(SEED), session.manifest.model  # noqa: S311 no secret
        self.ids = [pick.randrange(model.vocab_size) for _ in range(model.context)]
        self.filled = 0  # positions of the cache that hold the keys and values of `ids`

    def prefill(self, tokens: int, session: Optional[Session] = None) -> float:
        """A prompt of `tokens` from an empty context to the logits after it; in another session, if one is given."""
        used = session or self._session
        used.reset()
        started = time.perf_counter()
        used.prefill(self.ids[:tokens])
        seconds = time.perf_counter() - started
        if used is self._session:
            self.filled = max(self.filled, tokens)
        return seconds

    def decode(self, context: int, tokens: int) -> float:
        """`tokens` tokens one by one, after `context` others, whose part in the cache is filled only once."""
        session = self._session
        if self.filled < context:
            session.reset()
            session.prefill(self.ids[:context])
            self.filled = context
        session.position = context
        given = self.ids[context : context + tokens]
        started = time.perf_counter()
        for token in given:
            session.step(token)
        seconds = time.perf_counter() - started
        self.filled = max(self.filled, context + tokens)
        return seconds


def fitting(
    limit: int, prompt: Optional[int], context: Optional[int], steps: Optional[int], rounds: Optional[int]
) -> tuple[int, int, int, int]:
    """The same numbers for `measure`, with what a context of `limit` positions has room for where None is given."""
    steps = min(16, max(1, limit // 2)) if steps is None else steps
    context = max(0, min(128, limit - steps)) if context is None else context
    return min(512, limit) if prompt is None else prompt, context, steps, 5 if rounds is None else rounds


def measure(
    session: Session, prompt: int, context: int, steps: int, rounds: int, load_s: float, told: Callable[[str], object]
) -> dict[str, Any]:
    """tokens/s of every round, and what there is to know of the device. Raises InputError for what does not fit."""
    limit = session.context
    if not (1 <= prompt <= limit and steps >= 1 and 0 <= context <= limit - steps and rounds >= 1):
        raise InputError(
            f"a prompt of {prompt} tokens and {steps} tokens after {context}, {rounds} times: all but the tokens "
            f"before must be at least 1, and this bundle has a context of {limit}."
        )
    timed, before = Timed(session), _state()
    timed.decode(0, 1)  # pages of the weights and the threads of the pool, once
    speeds: dict[str, list[float]] = {"prefill_tok_s": [], "decode_tok_s": []}
    for number in range(1, rounds + 1):
        speeds["prefill_tok_s"].append(prompt / timed.prefill(prompt))
        speeds["decode_tok_s"].append(steps / timed.decode(context, steps))
        last = {name: values[-1] for name, values in speeds.items()}
        told(f"round {number}: prefill {last['prefill_tok_s']:.1f}, decode {last['decode_tok_s']:.1f} tokens/s")
    after = _state()
    return {
        "device": _device(),
        "threads": session.threads,
        "prompt_tokens": prompt,
        "context": context,
        "decode_tokens": steps,
        "rounds": rounds,
        **{name: [round(value, 4) for value in values] for name, values in speeds.items()},
        "load_s": round(load_s, 3),
        "peak_rss_mib": round(device.peak_rss_mib(), 1),
        **{name: [before[name], after[name]] for name in before},
        "max_mhz": _thousandth(device.CPU_FOLDER / "cpu0/cpufreq/cpuinfo_max_freq"),
    }


def _device() -> str:
    """As the board names itself (device tree), or its processor."""
    named = device.read_text(MODEL).rstrip("\0")
    found = re.search(r"^model name\s*: (.*)$", device.read_text(device.CPUINFO), re.MULTILINE)
    return named or (found[1] if found else device.arch())


def _state() -> dict[str, Optional[int]]:
    """The first core's clock and the board's temperature, None where Linux does not tell."""
    return {"mhz": _thousandth(device.CPU_FOLDER / "cpu0/cpufreq/scaling_cur_freq"), "celsius": _thousandth(HEAT)}


def _thousandth(path: Path) -> Optional[int]:
    text = device.read_text(path)
    return round(int(text) / 1000) if text.isdigit() else None

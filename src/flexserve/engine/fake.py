"""A fake engine: scripted answers in scripted time. A public test double, never part of a real world.

It keeps an engine's visible promises (token events, embeddings, stop strings, UTF-8 that is never cut, context
overflow with both numbers, cancelling, timings) and computes nothing. A token is one byte of UTF-8, its id
the byte's value. Without a script it echoes the prompt; sampling settings are accepted and change nothing.

Time comes from the clock passed in. `VirtualClock` never sleeps, so a test that scripts an hour takes no
time; `SystemClock` sleeps for real, for whoever wants to watch a client against a slow model.

It knows nothing of models, memory, queues and threads: that is `worlds/fake.py`.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import math
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from ..core import Event, Finished, FinishReason, Request, Timings, Token
from ..errors import ContextOverflow, FlexServeError, InvalidRequest


class Clock(Protocol):
    """Seconds since some moment, and waiting."""

    def now(self) -> float: ...

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        """Let `seconds` pass, or less when `wake` is set."""


class VirtualClock:
    """Time that passes only when somebody sleeps, and then at once."""

    def __init__(self) -> None:
        self._now = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        with self._lock:
            self._now += seconds


class SystemClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float, wake: threading.Event) -> None:
        if seconds > 0:
            wake.wait(seconds)


@dataclass(frozen=True)
class Script:
    """What to answer to one prompt: `text`, then the end of the answer or `error`."""

    text: str
    error: FlexServeError | None = None


def prompt_text(request: Request) -> str:
    """The prompt as the fake engine sees it, and the key under which a script is found.

    Messages: the content of the last one. Token ids: the text they stand for.
    """
    if request.messages is not None:
        return request.messages[-1].content
    if request.token_ids is not None:
        if any(t > 255 for t in request.token_ids):
            raise InvalidRequest("token_ids must be below the vocabulary size 256")
        return bytes(request.token_ids).decode("utf-8", "replace")
    assert request.prompt is not None
    return request.prompt


class FakeEngine:
    """Answers from `scripts` (prompt text -> Script), else echoes the prompt.

    `prefill_s` passes before the first token, `token_s` before each following one.
    """

    def __init__(
        self,
        scripts: Mapping[str, Script] | None = None,
        *,
        clock: Clock | None = None,
        prefill_s: float = 0.0,
        token_s: float = 0.0,
    ) -> None:
        self.scripts = dict(scripts or {})
        self.clock: Clock = clock or VirtualClock()
        self.prefill_s = prefill_s
        self.token_s = token_s

    def answer(
        self, request: Request, *, context_tokens: int, wake: threading.Event, accepted_s: float
    ) -> Iterator[Event]:
        """Token events, then one `Finished`. Setting `wake` cancels. `accepted_s`: on this clock.

        Raises `ContextOverflow`, `InvalidRequest`, and whatever the script says.
        """
        started = self.clock.now()
        prompt = prompt_text(request)
        if request.messages is not None:
            prompt_tokens = sum(len(m.content.encode()) + 2 for m in request.messages)
        else:
            prompt_tokens = len(prompt.encode())
        room = context_tokens - prompt_tokens
        if room < (request.max_tokens or 1):
            raise ContextOverflow(
                f"the prompt has {prompt_tokens} tokens and the answer may have {request.max_tokens or 1}, "
                f"together more than the context of {context_tokens}"
            )
        if request.embed:
            yield self._embedding(prompt, prompt_tokens, wake)
            return
        script = self.scripts.get(prompt, Script(prompt))
        data = script.text.encode()
        stream = itertools.cycle(data or b" ") if request.ignore_eos else iter(data)
        limit = request.max_tokens or room

        self.clock.sleep(self.prefill_s, wake)
        first = self.clock.now()
        text = _TextStream(request.stop)
        ids: list[int] = []
        reason = FinishReason.STOP
        for byte in stream:
            if wake.is_set():
                break
            if len(ids) == limit:
                reason = FinishReason.LENGTH
                break
            if ids:
                self.clock.sleep(self.token_s, wake)
            ids.append(byte)
            yield Token(byte, text.push(byte))
            if text.stopped:
                break
        if wake.is_set():
            reason = FinishReason.CANCELLED
        elif script.error is not None:
            raise script.error
        end = self.clock.now()
        yield Finished(
            text.finish(),
            tuple(ids),
            reason,
            Timings(
                queue_s=started - accepted_s,
                prefill_s=first - started,
                ttft_s=first - accepted_s,
                decode_s=end - first,
                total_s=end - accepted_s,
                prompt_tokens=prompt_tokens,
                output_tokens=len(ids),
                prefill_tokens_per_s=_rate(prompt_tokens, first - started),
                decode_tokens_per_s=_rate(len(ids) - 1, end - first),
            ),
        )

    def _embedding(self, prompt: str, prompt_tokens: int, wake: threading.Event) -> Finished:
        begun = self.clock.now()
        self.clock.sleep(self.prefill_s, wake)
        script = self.scripts.get(prompt)
        if script is not None and script.error is not None:
            raise script.error
        took = self.clock.now() - begun
        timings = Timings(prefill_s=took, ttft_s=took, total_s=took, prompt_tokens=prompt_tokens)
        if wake.is_set():
            return Finished("", (), FinishReason.CANCELLED, timings)
        return Finished("", (), FinishReason.STOP, timings, fake_embedding(prompt))


def fake_embedding(text: str) -> bytes:
    """A vector of eight numbers that depends on the text and on nothing else."""
    digest = hashlib.sha256(text.encode()).digest()
    raw = [byte - 127.5 for byte in digest[:8]]
    length = math.hypot(*raw)
    return struct.pack("<8f", *(x / length for x in raw))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0


class _TextStream:
    """Bytes in, printable pieces out; holds back what may become a stop string or half a character."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._out = ""
        self._held = ""
        self.stopped = False

    def push(self, byte: int) -> str:
        self._held += self._decoder.decode(bytes((byte,)))
        cuts = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if cuts:
            self.stopped = True
            return self._release(min(cuts))
        hold = 0
        for s in self._stop:
            for size in range(min(len(s) - 1, len(self._held)), hold, -1):
                if self._held.endswith(s[:size]):
                    hold = size
                    break
        return self._release(len(self._held) - hold)

    def finish(self) -> str:
        """The whole text: with what was held back, unless a stop string ended it."""
        if not self.stopped:
            self._held += self._decoder.decode(b"", final=True)
            self._release(len(self._held))
        return self._out

    def _release(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self._out += piece
        return piece

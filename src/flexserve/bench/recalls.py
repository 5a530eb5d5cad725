"""How fast memory comes back: recalls of several sizes, idle and while an answer is generated (paper, table 1).

    async      until the call returns: bytes are chosen
    two_stage  until all of them are back, cheapest first, without saving what need not be saved
    sync       what a recall without stages has to do before it returns: save all conversations, then give back

Before each one every segment is resident and one conversation is idle and unsaved. Knows a running world; prints
nothing.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core import Token
from ..errors import EngineFailure, FlexServeError
from ..worlds.base import Generation
from .sides import EVERYTHING, SealedWorld

SIZES = {"128 MiB": 128 << 20, "1 GiB": 1 << 30, "all": EVERYTHING}
WAIT_S = 120.0
TOKENS_BEFORE = 4  # whose distances are the usual ones
TOKENS_AFTER = 4


@dataclass(frozen=True)
class RecallTimes:
    """One recall; seconds since the call. The gaps between tokens are of a recall during an answer."""

    chosen_bytes: int
    later_bytes: int  # had to be saved first
    freed_bytes: int
    async_s: float
    first_byte_s: float
    two_stage_s: float
    sync_s: float | None = None  # of another recall, prepared alike
    usual_gap_s: float | None = None
    longest_gap_s: float | None = None


class Decoding:
    """An answer in progress, and when its tokens came."""

    def __init__(self, world: SealedWorld, token_ids: list[int]) -> None:
        """The answer ends when the context is full, or with `end`."""
        self.times: list[float] = []
        self._changed = threading.Condition()
        self._error: FlexServeError | None = None
        self._over = False
        most = world.settings.context_tokens - len(token_ids)
        self._generation: Generation = world.world.generate(world.request(token_ids, most))
        self._thread = threading.Thread(target=self._read, name="decoding")
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._generation:
                if isinstance(event, Token):
                    with self._changed:
                        self.times.append(time.perf_counter())
                        self._changed.notify_all()
        except FlexServeError as error:
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Until so many tokens have come. Raises `EngineFailure` when the answer ends before."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.times) >= count or self._over, WAIT_S)
            if self._error is not None:
                raise self._error
            if not came or len(self.times) < count:
                raise EngineFailure(f"an answer has {len(self.times)} tokens and not {count}")

    def end(self) -> None:
        """Cancel, and wait for the end."""
        self._generation.cancel()
        self._thread.join()


def gaps(times: Sequence[float], begin: float) -> tuple[float, float]:
    """The usual distance between two tokens before `begin`, and the longest of those that end after it."""
    pairs = [(later, later - earlier) for earlier, later in pairwise(times)]
    before = [gap for at, gap in pairs if at <= begin]
    after = [gap for at, gap in pairs if at > begin]
    return statistics.median(before), max(after)


def prepare(world: SealedWorld, token_ids: list[int]) -> None:
    """Everything resident, and a conversation that is not saved."""
    world.ask(token_ids)


def once(world: SealedWorld, nbytes: int) -> RecallTimes:
    """A recall while nothing computes. Raises `EngineFailure` when nothing comes back."""
    recalling = world.world.recall(nbytes)
    done = recalling.wait(WAIT_S)
    if not done.freed_bytes:
        raise EngineFailure("a recall gave nothing back")
    return RecallTimes(
        recalling.chosen_bytes,
        recalling.later_bytes,
        done.freed_bytes,
        recalling.answered_s,
        done.first_byte_s,
        done.done_s,
    )


def synchronous(world: SealedWorld, nbytes: int) -> float:
    """Seconds of a recall in whose way everything else is done too."""
    start = time.perf_counter()
    world.world.save_sessions()
    world.world.recall(nbytes).wait(WAIT_S)
    return time.perf_counter() - start


def idle(world: SealedWorld, token_ids: list[int], nbytes: int) -> RecallTimes:
    """Both kinds, each prepared alike."""
    prepare(world, token_ids)
    sync_s = synchronous(world, nbytes)
    prepare(world, token_ids)
    times = once(world, nbytes)
    return RecallTimes(**{**vars(times), "sync_s": sync_s})


def generating(world: SealedWorld, token_ids: list[int], nbytes: int) -> RecallTimes:
    """A recall during an answer, which gets its memory back as soon as all of it is given back."""
    prepare(world, token_ids)
    decoding = Decoding(world, token_ids)
    try:
        decoding.wait(TOKENS_BEFORE + 1)
        begin = time.perf_counter()
        times = once(world, nbytes)
        world.give_memory()
        there = len(decoding.times)
        decoding.wait(there + TOKENS_AFTER)
        usual_s, longest_s = gaps(decoding.times, begin)
    finally:
        decoding.end()
    return RecallTimes(**{**vars(times), "usual_gap_s": usual_s, "longest_gap_s": longest_s})

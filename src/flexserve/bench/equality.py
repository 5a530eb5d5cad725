"""`flexserve bench equality`: a long answer under a storm of recalls is the undisturbed answer, token by token.

Random weights in a true shape, a random prompt from a printed seed, greedy. The storm takes weights at random moments
between two tokens and gives the memory back, so that compute has to wait for them again. Knows a running world.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import SEGMENT_SIZE, Finished, Token
from ..errors import EngineFailure, Usage
from ..flexmem.processors import PROCESSORS
from . import machine
from .cold_start import random_prompt
from .files import Progress, Say, prepare_model
from .sides import SealedWorld, Settings

MOST_SEGMENTS = 64  # of one recall
WAIT_S = 120.0


@dataclass(frozen=True)
class EqualityOptions:
    """What to compare. Raises `Usage`."""

    shape: str = "llama-3.2-1b"
    quant: str = "Q8_0"
    prompt_tokens: int = 128
    tokens: int = 512
    segments: int = 1024  # to be lost during the answer, at least
    seed: int | None = None
    directory: Path = Path("bench")
    threads: int = 0  # 0: all cores

    def __post_init__(self) -> None:
        if min(self.tokens, self.segments) < 2:
            raise Usage("an answer of two tokens and two lost segments are the least that can be compared")


def run(options: EqualityOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Compare; the result is what `--json` prints (docs/schemas/bench-equality.json).

    Raises `Usage`, `StorageFailure`, `EngineFailure`.
    """
    seed = secrets.randbits(32) if options.seed is None else options.seed
    model = prepare_model(options.directory, options.shape, options.quant, say, progress)
    prompt = random_prompt(seed, options.shape, options.prompt_tokens)
    threads = options.threads or len(PROCESSORS)
    settings = Settings(threads, options.prompt_tokens + options.tokens, options.tokens)
    say(f"seed {seed}")
    with closing(SealedWorld(model, settings, warm_up=prompt[:1])) as world:
        world.give_memory()
        calm, calm_s = _answer(world, prompt, None)
        say(f"undisturbed: {len(calm.token_ids)} tokens in {calm_s:.1f} s")
        world.give_memory()
        storm = _Storm(world, options, random.Random(seed))  # noqa: S311
        stormy, stormy_s = _answer(world, prompt, storm)
        storm.end()
        say(f"in the storm: {storm.recalls} recalls took {storm.lost_segments} segments, {stormy_s:.1f} s")
    if storm.lost_segments < options.segments:
        say(f"these are fewer than the {options.segments} that were wanted: ask for a longer answer")
    pairs = zip(calm.token_ids, stormy.token_ids, strict=False)
    equal = next(
        (n for n, (a, b) in enumerate(pairs) if a != b), min(len(calm.token_ids), len(stormy.token_ids))
    )
    return {
        "bench": "equality",
        "machine": machine.describe(),
        "shape": options.shape,
        "quant": options.quant,
        "threads": threads,
        "prompt_tokens": options.prompt_tokens,
        "seed": seed,
        "tokens": len(calm.token_ids),
        "equal_tokens": equal,
        "equal": calm.token_ids == stormy.token_ids,
        "recalls": storm.recalls,
        "lost_segments": storm.lost_segments,
        "suspended_s": stormy.timings.suspended_s,
        "undisturbed_s": calm_s,
        "disturbed_s": stormy_s,
    }


def _answer(world: SealedWorld, prompt: list[int], storm: _Storm | None) -> tuple[Finished, float]:
    begun = time.monotonic()
    for event in world.world.generate(world.request(prompt)):
        if isinstance(event, Token):
            if storm is not None:
                storm.token()
        else:
            return event, time.monotonic() - begun
    raise EngineFailure("an answer did not end")


class _Storm:
    """Recalls on a thread of its own, so many after each token that enough is lost before the answer ends."""

    def __init__(self, world: SealedWorld, options: EqualityOptions, chance: random.Random) -> None:
        self.recalls = self._lost_bytes = 0
        self._world, self._options, self._chance = world, options, chance
        self._changed = threading.Condition()
        self._tokens = 0
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="storm")
        self._thread.start()

    @property
    def lost_segments(self) -> int:
        return self._lost_bytes // SEGMENT_SIZE

    def token(self) -> None:
        """One more has come."""
        with self._changed:
            self._tokens += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Wait for the recall under way; raises what went wrong."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for seconds in self._moments():
                time.sleep(seconds)
                segments = self._chance.randint(1, MOST_SEGMENTS)
                done = self._world.world.recall(segments * SEGMENT_SIZE).wait(WAIT_S)
                self._world.give_memory()
                self.recalls += 1
                self._lost_bytes += done.freed_bytes
        except BaseException as error:
            self._error = error

    def _moments(self) -> Iterator[float]:
        """How long to wait behind a token, whenever less is lost than its place in the answer wants."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._behind())
                if self._over:
                    return
            yield self._chance.random() * 0.05

    def _behind(self) -> bool:
        # All of it in the first nine tenths, so that the last recall is felt too.
        wanted = self._options.segments * self._tokens / (0.9 * self._options.tokens)
        return self.lost_segments < min(wanted, self._options.segments)

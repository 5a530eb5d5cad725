"""`flexserve bench soak`: requests under a storm of recalls, offers, budgets and cancels, with every answer compared.

Conversations of one to three turns with random prompts go to two worlds: one that is disturbed, and one that is left
alone and answers the same. Greedy answers must be equal, token by token. A turn that could reuse more or less of its
conversation's KV than the undisturbed one is computed in other batches and may differ (docs/decisions.md): it is
counted as recomputed and not compared.

Everything random follows from the printed seed, but for the order in which threads run. Knows the invariants, of
which each failure is one violation.
"""

from __future__ import annotations

import random
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import SEGMENT_SIZE, Finished, FinishReason, Request, Token
from ..errors import Busy, EngineFailure, FlexServeError, OutOfBudget
from ..flexmem.loader import WORKERS
from . import machine
from .background import resident_bytes
from .files import BenchModel, Progress, Say, prepare_model
from .shapes import shape_named
from .sides import EVERYTHING, SealedWorld, Settings

CLIENTS = 3
PATIENCE_S = 180.0  # a request without any event for so long is stuck
SETTLE_S = 60.0  # until what is held is within the budget again
LEAK_BYTES = 48 << 20  # by which the secure process may have grown beside what it holds
SLACK_BYTES = WORKERS * SEGMENT_SIZE  # invariant 4: one segment for each loader
ALLOWED = (Busy.code, OutOfBudget.code)  # errors that a client may get when memory is short
MOST_SHOWN = 20
TURNS, PROMPT_TOKENS, OUTPUT_TOKENS = (1, 3), (8, 160), (4, 48)
CANCELLED_SHARE = 0.15
PAUSE_S = (0.02, 0.6)  # between two disturbances


@dataclass(frozen=True)
class SoakOptions:
    """What to run, and for how long."""

    minutes: float = 30.0
    shape: str = "llama-3.2-1b"
    quant: str = "Q8_0"
    directory: Path = Path("bench")
    threads: int = 1  # of each world's two
    seed: int | None = None  # None: a new one


@dataclass
class Tally:
    """What happened, counted by all threads."""

    requests: int = 0
    tokens: int = 0
    compared_answers: int = 0
    compared_tokens: int = 0
    recomputed_answers: int = 0
    cancelled_answers: int = 0
    recalls: int = 0
    recalled_bytes: int = 0
    saved_first_bytes: int = 0
    offers: int = 0
    budget_changes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    violations: int = 0
    shown: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def violation(self, text: str) -> None:
        with self.lock:
            self.violations += 1
            if len(self.shown) < MOST_SHOWN:
                self.shown.append(text)


def run(options: SoakOptions, say: Say, progress: Progress | None = None) -> dict[str, Any]:
    """Run; the result is what `--json` prints (docs/schemas/bench-soak.json). Raises `Usage`, `EngineFailure`."""
    seed = secrets.randbits(32) if options.seed is None else options.seed
    model = prepare_model(options.directory, options.shape, options.quant, say, progress)
    longest = TURNS[1] * (PROMPT_TOKENS[1] + OUTPUT_TOKENS[1])
    settings = Settings(options.threads, max(512, longest), OUTPUT_TOKENS[1])
    warm_up = list(range(8))
    say(f"soaking {options.shape} {options.quant} for {options.minutes:g} minutes, seed {seed}")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        stored, kept = Path(directory, "stormy"), Path(directory, "calm")
        for path in (stored, kept):
            path.mkdir(mode=0o700)
        stormy = SealedWorld(model, settings, warm_up=warm_up, session_dir=stored, lazy=True)
        try:
            calm = SealedWorld(model, settings, warm_up=warm_up, session_dir=kept)
            try:
                return _soak(options, seed, model, stormy, calm, say)
            finally:
                calm.close()
        finally:
            stormy.close()


def _soak(  # noqa: PLR0917
    options: SoakOptions,
    seed: int,
    model: BenchModel,
    stormy: SealedWorld,
    calm: SealedWorld,
    say: Say,
) -> dict[str, Any]:
    tally = Tally()
    pid = stormy.pid
    begin_bytes = resident_bytes(pid)
    begun = time.monotonic()
    end = begun + 60 * options.minutes
    calm.give_memory()
    storm = _Storm(stormy, tally, random.Random(f"{seed} storm"), end)  # noqa: S311
    vocabulary = shape_named(options.shape).vocabulary
    clients = [
        _Client(n, stormy, calm, tally, random.Random(f"{seed} {n}"), vocabulary, end)  # noqa: S311
        for n in range(CLIENTS)
    ]
    _watch([storm, *clients], tally, say, begun)
    end_bytes = resident = 0
    if not any(one.is_alive() for one in (storm, *clients)):
        resident = _at_rest(stormy, tally)
        end_bytes = _settled(pid, begin_bytes) if stormy.pid == pid else begin_bytes
        if end_bytes > begin_bytes + LEAK_BYTES:
            tally.violation(f"the secure process grew from {begin_bytes} to {end_bytes} bytes")
    restarts = stormy.world.status().restarts
    if restarts:
        tally.violation(f"the secure world was started again {restarts} times")
    return {
        "bench": "soak",
        "machine": machine.describe(),
        "shape": options.shape,
        "quant": options.quant,
        "threads": options.threads,
        "weight_bytes": model.weight_bytes,
        "seed": seed,
        "minutes": (time.monotonic() - begun) / 60,
        **{
            name: value
            for name, value in vars(tally).items()
            if name not in ("errors", "shown", "lock", "violations")
        },
        "recalled_segments": tally.recalled_bytes // SEGMENT_SIZE,
        "errors": dict(tally.errors),
        "restarts": restarts,
        "begin_bytes": begin_bytes,
        "end_bytes": end_bytes,
        "end_resident_bytes": resident,
        "violations": tally.violations,
        "violation_list": tally.shown,
    }


class _Worker(threading.Thread):
    """A thread that says when it last got on. Any error that nobody expected is a violation."""

    def __init__(self, name: str, tally: Tally, end: float) -> None:
        super().__init__(name=name, daemon=True)
        self.tally, self.end, self.got_on = tally, end, time.monotonic()

    def run(self) -> None:
        while time.monotonic() < self.end:
            self.got_on = time.monotonic()
            try:
                self.turn()
            except FlexServeError as error:
                self.tally.violation(f"{self.name}: {error.message} ({error.code})")
            except Exception as error:  # a bug of the bench or of ours: it must not look like a good end
                self.tally.violation(f"{self.name}: {type(error).__name__}: {error}")

    def turn(self) -> None:
        """One piece of work."""
        raise NotImplementedError


def _watch(workers: list[_Worker], tally: Tally, say: Say, begun: float) -> None:
    """Until all have ended; one that is stuck is left behind, as a violation."""
    for one in workers:
        one.start()
    said = begun
    while waiting := [one for one in workers if one.is_alive()]:
        waiting[0].join(1.0)
        now = time.monotonic()
        stuck = [one for one in waiting if now - one.got_on > PATIENCE_S]
        for one in stuck:
            tally.violation(f"{one.name} got no event for {PATIENCE_S:.0f} s")
        if stuck:
            return
        if now - said > 60:
            said = now
            say(
                f"  {(now - begun) / 60:5.1f} min: {tally.requests} requests, {tally.compared_tokens} tokens compared, "
                f"{tally.recalls} recalls of {tally.recalled_bytes / 1e9:.1f} GB, {tally.violations} violations"
            )


class _Storm(_Worker):
    """Recalls, offers and budgets at random, each checked for what it promises."""

    def __init__(self, world: SealedWorld, tally: Tally, rng: random.Random, end: float) -> None:
        super().__init__("storm", tally, end)
        self._world, self._rng = world.world, rng
        self._weights = world.model.weight_bytes
        self._has_budget = self._world.status().budget is not None
        kinds: list[Callable[[], None]] = [self._recall] * 5
        if self._has_budget:
            kinds += [self._offer] * 4 + [self._budget] * 2 + [self._plenty] * 2
        self._kinds = kinds

    def run(self) -> None:
        """Leaves enough memory behind: whoever still waits for some shall get it and end."""
        super().run()
        if self._has_budget:
            self._plenty()

    def turn(self) -> None:
        self._rng.choice(self._kinds)()
        if self._has_budget:
            self._check_budget()
        time.sleep(self._rng.uniform(*PAUSE_S))

    def _size(self) -> int:
        """From one segment to the whole model, each order of magnitude as often."""
        return int(SEGMENT_SIZE * (self._weights / SEGMENT_SIZE) ** self._rng.random())

    def _recall(self) -> None:
        asked = EVERYTHING if self._rng.random() < 0.1 else self._size()
        recalling = self._world.recall(asked, deadline_s=self._rng.choice([0.1, 1.0, 10.0]))
        try:
            done = recalling.wait(PATIENCE_S / 2)
        except TimeoutError:
            self.tally.violation(f"a recall of {asked} bytes is not over")
            return
        self.tally.add(recalls=1, recalled_bytes=done.freed_bytes, saved_first_bytes=recalling.later_bytes)
        if recalling.answered_s > done.done_s or done.first_byte_s > done.done_s:
            self.tally.violation("a recall was over before it was answered")

    def _offer(self) -> None:
        self._world.offer(self._size())
        self.tally.add(offers=1)

    def _budget(self) -> None:
        """Mostly enough for the model, sometimes for half of it."""
        self._world.budget(soft_bytes=round(self._weights * self._rng.uniform(0.4, 1.6)))
        self.tally.add(budget_changes=1)

    def _plenty(self) -> None:
        self._world.budget(soft_bytes=4 * self._weights)
        self.tally.add(budget_changes=1)

    def _check_budget(self) -> None:
        """Within the budget as soon as what was chosen is back."""
        end = time.monotonic() + SETTLE_S
        while True:
            budget = self._world.budget()
            if budget.held_bytes <= max(budget.soft_bytes, budget.floor_bytes) + SLACK_BYTES:
                return
            if time.monotonic() > end:
                self.tally.violation(
                    f"{budget.held_bytes} bytes are held, and the budget is {budget.soft_bytes}"
                )
                return
            time.sleep(0.01)


class _Client(_Worker):
    """One conversation after another, on both worlds."""

    def __init__(  # noqa: PLR0917
        self,
        number: int,
        stormy: SealedWorld,
        calm: SealedWorld,
        tally: Tally,
        rng: random.Random,
        vocabulary: int,
        end: float,
    ) -> None:
        super().__init__(f"client {number}", tally, end)
        self._stormy, self._calm, self._rng, self._vocabulary = stormy, calm, rng, vocabulary

    def turn(self) -> None:
        """A whole conversation."""
        said: list[int] = []
        for _ in range(self._rng.randint(*TURNS)):
            said += [self._rng.randrange(self._vocabulary) for _ in range(self._rng.randint(*PROMPT_TOKENS))]
            output = self._rng.randint(*OUTPUT_TOKENS)
            cancel_after = self._rng.randrange(output) if self._rng.random() < CANCELLED_SHARE else None
            answer = self._ask(self._stormy, self._stormy.request(said, output), cancel_after)
            if answer is None:
                return
            expected = self._ask(self._calm, self._calm.request(said, output), None)
            if expected is None:
                raise EngineFailure("the undisturbed world did not answer")
            self._compare(answer, expected, output)
            if answer.finish_reason == FinishReason.CANCELLED:
                return
            said += answer.token_ids

    def _ask(self, world: SealedWorld, request: Request, cancel_after: int | None) -> Finished | None:
        """None when it ended with an error that is allowed."""
        stormy = world is self._stormy
        if stormy:
            self.tally.add(requests=1)
        generation, tokens, finished = None, 0, None
        try:
            generation = world.world.generate(request)
            if cancel_after == 0:
                generation.cancel()
            for event in generation:
                self.got_on = time.monotonic()
                if finished is not None:
                    self.tally.violation("something came after the end of an answer")
                if isinstance(event, Token):
                    tokens += 1
                    if tokens == cancel_after:
                        generation.cancel()
                else:
                    finished = event
        except FlexServeError as error:
            self.got_on = time.monotonic()
            self.tally.errors[error.code] += 1
            if not stormy or error.code not in ALLOWED:
                self.tally.violation(f"a request ended with {error.message} ({error.code})")
            return None
        if finished is None:
            self.tally.violation("an answer has no end")
            return None
        if stormy:
            self.tally.add(tokens=len(finished.token_ids))
        return finished

    def _compare(self, answer: Finished, expected: Finished, output: int) -> None:
        cancelled = answer.finish_reason == FinishReason.CANCELLED
        if cancelled:
            self.tally.add(cancelled_answers=1)
        elif len(answer.token_ids) != output:
            self.tally.violation(f"an answer has {len(answer.token_ids)} tokens and not {output}")
        # A cancelled answer may not say what it reused: then its tokens alone decide.
        reused = answer.timings.cached_prompt_tokens
        if reused != expected.timings.cached_prompt_tokens and (reused or not cancelled):
            self.tally.add(recomputed_answers=1)
            return
        if answer.token_ids != expected.token_ids[: len(answer.token_ids)]:
            self.tally.violation(f"an answer of {len(answer.token_ids)} tokens is not the undisturbed one")
            return
        self.tally.add(compared_answers=1, compared_tokens=len(answer.token_ids))


def _at_rest(world: SealedWorld, tally: Tally) -> int:
    """Weights that stay in memory after everything was recalled; more than the floor is a violation."""
    status = world.world.status()
    if status.active_requests or status.waiting_requests:
        tally.violation(
            f"{status.active_requests} requests are active and {status.waiting_requests} wait at the end"
        )
    if status.budget is not None:
        world.world.budget(floor_bytes=0)
    world.world.recall(EVERYTHING).wait(PATIENCE_S)
    resident = sum(one.resident_bytes for one in world.world.status().models)
    if resident:
        tally.violation(f"{resident} bytes of weights stay after everything was recalled")
    return resident


def _settled(pid: int, wanted: int) -> int:
    """The process's memory, as soon as it is what it was, or after a while."""
    end = time.monotonic() + 10
    while (now := resident_bytes(pid)) > wanted + LEAK_BYTES and time.monotonic() < end:
        time.sleep(0.1)
    return now

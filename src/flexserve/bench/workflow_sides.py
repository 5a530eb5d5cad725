"""What answers in the workflow benches: plain processes, sealed worlds of one model each, and FlexServe's one world.

    PlainModels   `as_is`: a llama.cpp process for each model; given back = the process has ended, and its file is out
                  of the page cache, which is part of the memory the budget stands for
    SealedModels  `fair`: a world for each model: same files, pipeline and conversations; given back = recalled whole
    ServedModels  one world with all models, whose Framework decides within the budget

Knows how each of them answers and gives back; when, is said from outside.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..core import Request, Sampling, Timings, Token
from ..errors import EngineFailure
from ..framework.settings import Settings as Framework
from ..worlds.base import World
from ..worlds.linux import LinuxWorld
from . import machine
from .child import Child
from .files import BenchModel
from .sides import EVERYTHING, FLOOR_BYTES

Models = Mapping[str, BenchModel]
EMPTY_TRIES = 20
GAP_S = 1.0  # what separates two runs of an app: the minutes that lie between them are not waited for


class Clock:
    """Seconds that count: not those in which the bench stands for something else, and with those nobody waits for."""

    def __init__(self) -> None:
        self._not_counted = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._not_counted

    def skip(self, seconds: float) -> None:
        """Let time pass that nobody waits for."""
        self._not_counted -= seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The block takes no time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._not_counted += time.perf_counter() - begin


@dataclass(frozen=True)
class Asked:
    """One request to a model. `client`: the app that it is from."""

    model: str
    token_ids: tuple[int, ...]
    output_tokens: int
    client: str | None = None


@dataclass(frozen=True)
class Answer:
    """When things happened, on the bench's clock; and what was there before."""

    begin_s: float
    first_s: float
    end_s: float
    load_bytes: int | None = None  # until the first token; None: not known of plain llama.cpp
    cached_prompt_tokens: int = 0
    prefetched_bytes: int = 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.begin_s

    @property
    def decode_s(self) -> float:
        return self.end_s - self.first_s


@dataclass(frozen=True)
class Common:
    """What all sides have in common."""

    models: Models
    threads: int
    context_tokens: int
    session_dir: Path  # a directory for saved conversations, below which each world gets its own
    clock: Clock


class Backend(Protocol):
    """Models that answer, and go when they are told to."""

    def ready(self, models: Sequence[str]) -> None:
        """Outside the clock: whatever can be done before a workflow that needs these models."""

    def ask(self, asked: Asked) -> Answer: ...

    def give_back(self, model: str) -> None:
        """All memory of one model, before this returns."""

    def clear(self) -> None:
        """All memory of all models; whatever is asked next finds nothing but saved conversations."""

    def close(self) -> None: ...


class PlainModels:
    """`as_is`."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._running: dict[str, Child] = {}
        self._spare: list[Child] = []  # have loaded the library, and no model
        for model in common.models.values():
            machine.evict(model.gguf)

    def ready(self, models: Sequence[str]) -> None:
        while len(self._spare) < len(models):
            self._spare.append(self._start())

    def ask(self, asked: Asked) -> Answer:
        clock = self._common.clock
        begin = clock.now()
        if asked.model not in self._running:
            if not self._spare:
                with clock.stopped():
                    self._spare.append(self._start())
            self._running[asked.model] = self._spare.pop()
        child = self._running[asked.model]
        path = self._common.models[asked.model].gguf
        job = {"model": str(path), "token_ids": asked.token_ids, "output_tokens": asked.output_tokens}
        first = child.ask(json.dumps(job))
        first_at = clock.now()
        if first.strip() != "first" or not (answer := child.listen()):
            raise EngineFailure(f"plain llama.cpp failed on {path}")
        _check_length(asked, json.loads(answer)["tokens"])
        return Answer(begin, first_at, clock.now())

    def give_back(self, model: str) -> None:
        child = self._running.pop(model, None)
        if child is not None:
            child.close()
            with (
                self._common.clock.stopped()
            ):  # under pressure the kernel would do it when it needs the memory
                machine.evict(self._common.models[model].gguf)

    def clear(self) -> None:
        for name in list(self._running):
            self.give_back(name)

    def close(self) -> None:
        for child in (*self._running.values(), *self._spare):
            child.close()
        self._running.clear()
        self._spare.clear()

    def _start(self) -> Child:
        common = self._common
        child = Child("flexserve.bench.workflow_plain", str(common.threads), str(common.context_tokens))
        if child.listen().strip() != "ready":
            child.close()
            raise EngineFailure("plain llama.cpp did not start")
        return child


class _Worlds:
    """What sealed sides share: requests that are timed at the client."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._numbers = itertools.count()
        for model in common.models.values():
            machine.evict(model.source.sealed)

    def _world(self, name: str, models: Sequence[str], settings: Framework) -> LinuxWorld:
        """A world with these models registered, and nothing resident."""
        some = self._common.models[models[0]]
        world = LinuxWorld(
            str(some.device_key),
            vendor_pub=some.vendor_pub,
            threads=self._common.threads,
            context_tokens=self._common.context_tokens,
            session_dir=self._common.session_dir / name,
            settings=settings,
        )
        try:
            world.start()
            for model in models:
                world.register(replace(self._common.models[model].source, name=model))
        except BaseException:
            world.close()
            raise
        return world

    def _ask(self, world: World, asked: Asked, begin: float) -> Answer:
        request = Request(
            id=f"bench-{next(self._numbers)}",
            model=asked.model,
            token_ids=asked.token_ids,
            max_tokens=asked.output_tokens,
            ignore_eos=True,
            sampling=Sampling(temperature=0),
            client=asked.client,
        )
        first: float | None = None
        for event in world.generate(request):
            if isinstance(event, Token):
                if first is None:
                    first = self._common.clock.now()
                continue
            _check_length(asked, event.token_ids)
            assert first is not None
            t: Timings = event.timings
            return Answer(
                begin,
                first,
                self._common.clock.now(),
                t.load_bytes,
                t.cached_prompt_tokens,
                t.prefetched_bytes,
            )
        raise EngineFailure("the answer did not end")


class SealedModels(_Worlds):
    """`fair`. Sessions are outside the budget: what they take counts for nobody but FlexServe."""

    def __init__(self, common: Common) -> None:
        super().__init__(common)
        self._made: dict[str, LinuxWorld] = {}
        self._empty: set[str] = set()
        settings = Framework(
            budget_bytes=EVERYTHING, cap_bytes=EVERYTHING, floor_bytes=0, lazy=False, prefetch=False
        )
        try:
            for name in common.models:
                self._made[name] = self._world(f"fair-{name}", [name], settings)
                self.give_back(name)
        except BaseException:
            self.close()
            raise

    def ready(self, models: Sequence[str]) -> None:
        pass

    def ask(self, asked: Asked) -> Answer:
        begin = self._common.clock.now()
        world = self._made[asked.model]
        if asked.model in self._empty:
            self._empty.remove(asked.model)
            # A recall of nothing, so that the background loads nothing beside the request for a while.
            world.recall(0).wait()
            world.budget(EVERYTHING, EVERYTHING, _floor(self._common.models[asked.model].weight_bytes))
        return self._ask(world, asked, begin)

    def give_back(self, model: str) -> None:
        if model not in self._empty:
            _empty(self._made[model])
            self._empty.add(model)

    def clear(self) -> None:
        for name in self._made:
            self.give_back(name)

    def close(self) -> None:
        for world in self._made.values():
            world.close()


class ServedModels(_Worlds):
    """FlexServe, as it is served."""

    def __init__(self, common: Common, name: str, budget_bytes: int, *, prefetch: bool) -> None:
        super().__init__(common)
        self._budget, self._floor = budget_bytes, _floor(budget_bytes)
        settings = Framework(
            budget_bytes=budget_bytes,
            cap_bytes=budget_bytes,
            floor_bytes=self._floor,
            prefetch=prefetch,
            workflow_gap_s=GAP_S,
        )
        self._one = self._world(name, list(common.models), settings)
        self._cleared = False

    def ready(self, models: Sequence[str]) -> None:
        if self._cleared:
            self._one.recall(0).wait()
            self._one.budget(self._budget, self._budget, self._floor)
            self._cleared = False

    def ask(self, asked: Asked) -> Answer:
        return self._ask(self._one, asked, self._common.clock.now())

    def give_back(self, model: str) -> None:
        raise NotImplementedError("the Framework decides what goes")

    def clear(self) -> None:
        _empty(self._one)
        self._cleared = True

    @property
    def world(self) -> LinuxWorld:
        return self._one

    def close(self) -> None:
        self._one.close()


def _floor(nbytes: int) -> int:
    """With no memory at all an answer that has begun could not reach the end of its token."""
    return min(FLOOR_BYTES, nbytes // 8)


def _empty(world: World) -> None:
    """No weight resident, and no budget for one. Raises `EngineFailure` when one stays."""
    world.budget(floor_bytes=0)
    for _ in range(EMPTY_TRIES):
        world.recall(EVERYTHING).wait()
        if not any(model.resident_bytes for model in world.status().models):
            return
        # The last answer may not be over for the secure world yet, and keeps what it computes on.
        time.sleep(0.05)
    raise EngineFailure("weights stay resident after a recall")


def _check_length(asked: Asked, tokens: Sequence[int]) -> None:
    if len(tokens) != asked.output_tokens:
        raise EngineFailure(
            f"{asked.model} answered with {len(tokens)} tokens, and was asked for {asked.output_tokens}"
        )

"""The loader: threads that keep an arena filled ahead of compute, and serve the pages compute waits for.

    fault handler   one thread: a missing page becomes an urgent span
    workers         read -> authenticate and decrypt -> place; urgent spans first, then the plans in order
    watchdog        one thread: nobody waits for ever, whatever dies

Knows nothing of models; a plan is a list of index ranges (framework.order), one for each priority. llama.cpp is not
involved: a compute thread that runs ahead of the loader waits in the kernel until its page is placed.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Protocol

from ..errors import EngineFailure, FlexServeError
from ..framework.effects import Priority
from ..framework.order import Range
from .arena import Arena, SegmentState, Span
from .processors import PROCESSORS
from .source import Source, Staging
from .uffd import Userfaultfd

WORKERS = 3  # with one read each in flight, enough to keep storage busy while another decrypts
FAULT_TIMEOUT_S = 60.0  # storage that is silent for longer ends the request
WATCH_PERIOD_S = 1.0
REPORT_BYTES = 32 << 20  # of planned spans; those that compute waited for are told of at once
REPORT_PERIOD_S = 0.02
RUN_LIMIT = 64  # small segments that one fault brings at most
RUNS = 16  # of faults that may be gone on with: a few for each compute thread
LOOK_AHEAD = 8  # ranges of a plan: what compute waits for is near its beginning


@dataclass(frozen=True)
class LoadTimes:
    """Sums over all workers since the start; seconds and bytes."""

    load_bytes: int = 0
    read_s: float = 0.0
    decrypt_s: float = 0.0
    place_s: float = 0.0
    faults: int = 0
    fault_wait_s: float = 0.0

    def since(self, earlier: LoadTimes) -> LoadTimes:
        """The difference, for one request."""
        names = (field.name for field in fields(self))
        return LoadTimes(**{name: getattr(self, name) - getattr(earlier, name) for name in names})


class Listener(Protocol):
    """Who hears of what happens here, on the loader's own threads."""

    def changed(self) -> None:
        """The arena's journal has news."""

    def computes_at(self, segment: int) -> None:
        """Compute waits for this segment."""

    def poisoned(self, error: FlexServeError) -> None:
        """Nothing more will be loaded."""


@dataclass(frozen=True)
class SpanTrace:
    """When one span went through its stages, for `flexserve bench cold-start --plot`: time.perf_counter()."""

    worker: int  # native id of the thread
    first: int
    length: int
    begun: float
    read: float
    decrypted: float
    place_begun: float
    placed: float


class Loader:
    """Fills one arena from one source. All methods may be called from any thread."""

    def __init__(
        self,
        arena: Arena,
        source: Source,
        faults: Userfaultfd | None,
        *,
        workers: int = WORKERS,
        name: str = "model",
        trace: Callable[[SpanTrace], None] | None = None,
        listener: Listener | None = None,
    ) -> None:
        """`trace` is called by the workers, for each span that was placed."""
        self.arena = arena
        self._trace = trace
        self._listener = listener
        self._unreported, self._reported_at = 0, 0.0
        self._source = source
        self._faults = faults
        self._lock = threading.Lock()
        self._work_to_do = threading.Condition(self._lock)  # workers wait for it
        self._plan_done = threading.Condition(self._lock)  # `wait` waits for it
        self._urgent: deque[Span] = deque()
        self._plans: list[deque[Range]] = [deque() for _ in Priority]
        self._busy = 0
        self._waiting: dict[int, float] = {}  # first segment of an urgent span -> when its fault came
        self._begun: dict[int, float] = {}  # first segment of a span a worker has -> since when
        self._times = LoadTimes()
        self._closing = False
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._work, name=f"load-{name}-{i}", daemon=True) for i in range(workers)
        ]
        if faults is not None:
            self._handler = threading.Thread(target=self._handle, name=f"fault-{name}", daemon=True)
            self._threads.append(self._handler)
            self._threads.append(threading.Thread(target=self._watch, name=f"watch-{name}", daemon=True))
        with _unbound():
            for thread in self._threads:
                thread.start()

    @property
    def on_demand(self) -> bool:
        """Whether compute may start before everything is placed."""
        return self._faults is not None

    def load(self, order: Iterable[Range]) -> None:
        """Load these ranges, in this order, in the background; replaces what was planned before."""
        with self._lock:
            self._forget_plans()
            self._plans[Priority.REQUEST].extend(order)
            self._work_to_do.notify_all()

    def extend(self, ranges: Iterable[Range], priority: Priority) -> None:
        """Load these too, behind what was asked for with the same priority."""
        with self._lock:
            self._plans[priority].extend(ranges)
            self._work_to_do.notify_all()

    def stop(self) -> None:
        """Forget what has not begun; the arena's journal says which."""
        with self._lock:
            for plan in self._plans:
                for one in plan:
                    self.arena.note_stopped(one.first, one.count)
            self._forget_plans()
            self._plan_done.notify_all()

    def wait(self) -> None:
        """Until the plan is done or the arena is poisoned, or the loader closes."""
        with self._lock:
            self._plan_done.wait_for(
                lambda: (not any(self._plans) and not self._busy) or self.arena.poisoned or self._closing
            )

    def wait_for_rows(self, rows: Sequence[Range]) -> None:
        """Until these are placed, as far as they were planned as `Priority.ROWS`, or the arena is poisoned, or the
        loader closes.

        A prompt's rows are scattered over the embedding: a compute thread would wait for each by a fault of its own,
        one after the other and some milliseconds each while all cores are busy.
        """
        with self._lock:
            self._plan_done.wait_for(
                lambda: (
                    not (self._plans[Priority.ROWS] or any(map(self._is_loading, rows)))
                    or self.arena.poisoned
                    or self._closing
                )
            )

    def _is_loading(self, rows: Range) -> bool:
        return any(
            self.arena.state(index) == SegmentState.LOADING
            for index in range(rows.first, rows.first + rows.count)
        )

    def times(self) -> LoadTimes:
        with self._lock:
            return self._times

    def check(self) -> None:
        """Raises the error that poisoned the arena, if one did: nothing computed since then may be used."""
        if self.arena.poisoned is not None:
            raise self.arena.poisoned

    # Workers

    def _next(self, staging: Staging) -> Span | None:
        """The next span to load, claimed; None when closing."""
        while True:
            with self._lock:
                while not self._closing:
                    span = self._urgent.popleft() if self._urgent else self._next_planned()
                    if span is not None:
                        self._busy += 1
                        self._begun[span.first] = time.perf_counter()
                        return span
                    if self._unreported:
                        break
                    if not self._busy:
                        self._plan_done.notify_all()
                    staging.wipe()  # no plaintext lies about while there is nothing to do
                    self._work_to_do.wait()
                if self._closing:
                    return None
                self._unreported = 0
            self._changed()

    def _next_planned(self) -> Span | None:
        for plan in self._plans:
            span = self._next_of(plan)
            if span is not None or self.arena.poisoned:
                return span
        return None

    def _forget_plans(self) -> None:
        for plan in self._plans:
            plan.clear()

    def _next_of(self, plan: deque[Range]) -> Span | None:
        while plan:
            ahead = plan[0]
            state = self.arena.state
            skip = 0
            while skip < ahead.count and state(ahead.first + skip) != SegmentState.ABSENT:
                skip += 1
            span = None
            if skip < ahead.count:
                limit = min(ahead.count - skip, self.arena.block(ahead.first + skip))
                span = self.arena.claim(ahead.first + skip, limit)
                if span is not None:
                    skip += span.count
                elif self.arena.poisoned:
                    self._forget_plans()
                    return None
            if skip >= ahead.count:
                plan.popleft()
            else:
                plan[0] = Range(ahead.first + skip, ahead.count - skip)
            if span is not None:
                return span
        return None

    def _work(self) -> None:
        staging = Staging()
        try:
            while (span := self._next(staging)) is not None:
                self._load_one(span, staging)
        except BaseException as error:  # a worker that dies must not leave compute waiting
            self._give_up(EngineFailure(f"a loader thread ended: {type(error).__name__}: {error}"))
        finally:
            staging.close()

    def _load_one(self, span: Span, staging: Staging) -> None:
        placed = None
        try:
            staging.used = True
            claimed = time.perf_counter()
            staging.populate()
            begun = time.perf_counter()
            took = self._source.fetch(span, staging)
            with self._lock:  # before compute can go on with it: whoever answers then counts it
                self._times = replace(
                    self._times,
                    load_bytes=self._times.load_bytes + span.length,
                    read_s=self._times.read_s + took.read_s,
                    decrypt_s=self._times.decrypt_s + took.decrypt_s,
                )
            start = time.perf_counter()
            moved = self.arena.place(span, staging.address, movable=True)
            placed = time.perf_counter()
            if moved:
                staging.moved(moved)
            if self._trace is not None:
                read = begun + took.read_s
                stages = (begun, read, read + took.decrypt_s, start, placed)
                self._trace(SpanTrace(threading.get_native_id(), span.first, span.length, *stages))
        except FlexServeError as error:
            self._give_up(error)
        with self._lock:
            self._busy -= 1
            self._begun.pop(span.first, None)
            began = self._waiting.pop(span.first, None)
            if placed is not None:
                waited = placed - began if began is not None else 0.0
                self._times = replace(
                    self._times,
                    place_s=self._times.place_s + (begun - claimed) + (placed - start),
                    fault_wait_s=self._times.fault_wait_s + waited,
                )
            if not self._plans[Priority.ROWS]:
                self._plan_done.notify_all()
            report = placed is not None and self._is_due(span.length, urgent=began is not None)
        if report:
            self._changed()

    def _is_due(self, nbytes: int, *, urgent: bool) -> bool:
        """Whether the listener is to hear of what was placed now. Call with the lock held."""
        self._unreported += nbytes
        now = time.perf_counter()
        if not (urgent or self._unreported >= REPORT_BYTES or now - self._reported_at >= REPORT_PERIOD_S):
            return False
        self._unreported, self._reported_at = 0, now
        return True

    def _changed(self) -> None:
        if self._listener is not None:
            self._listener.changed()

    def _give_up(self, error: FlexServeError) -> None:
        self.arena.poison(error)
        if self._listener is not None:
            self._listener.poisoned(self.arena.poisoned or error)
        with self._lock:
            self._forget_plans()
            self._urgent.clear()
            self._waiting.clear()
            self._begun.clear()
            self._plan_done.notify_all()

    # Faults

    def _handle(self) -> None:
        try:
            self._serve_faults()
        except BaseException as error:
            self._give_up(EngineFailure(f"the fault handler ended: {type(error).__name__}: {error}"))
            with contextlib.suppress(Exception):  # the watchdog is the last to try
                self._serve_faults()  # poisoned now: every page is answered with zeros

    def _serve_faults(self) -> None:
        assert self._faults is not None
        poll = select.poll()
        poll.register(self._faults.fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        runs: dict[
            int | None, int
        ] = {}  # segment -> how many are read from there, if a thread comes to wait for it
        while not self._closing:
            poll.poll()
            for address in self._faults.faults():
                offset = address - self.arena.base
                with self._lock:
                    ahead = [one for plan in self._plans for one in islice(plan, LOOK_AHEAD)]
                segment = self.arena.segment_at(offset)
                run = runs.pop(segment, 1)
                span = self.arena.claim_fault(offset, ahead, run)
                if span is not None:  # a thread that goes on behind it gets twice as much at once
                    runs[span.first + span.count] = min(2 * run, RUN_LIMIT)
                    if len(runs) > RUNS:
                        del runs[next(iter(runs))]
                with self._lock:
                    self._times = replace(self._times, faults=self._times.faults + 1)
                    if span is not None:
                        self._waiting[span.first] = time.perf_counter()
                        self._urgent.append(span)
                        self._work_to_do.notify()
                if self._listener is not None and segment is not None:
                    self._listener.computes_at(segment)

    def _watch(self) -> None:
        """Poison when the fault handler is dead or a segment does not arrive; serve zeros in its place.

        A thread may wait for a segment that was on its way before, so every load in progress counts. Time in
        which this thread did not run either (a frozen or stopped process) does not.
        """
        ages: dict[tuple[int, float], float] = {}
        looked = time.perf_counter()
        while not self._closing:
            select.select([self._stop_read], [], [], WATCH_PERIOD_S)
            passed = min(time.perf_counter() - looked, 2 * WATCH_PERIOD_S)
            looked = time.perf_counter()
            with self._lock:
                since = [*self._begun.items(), *self._waiting.items()]
            ages = {load: ages.get(load, 0.0) + passed for load in since}
            stuck = [index for (index, _), age in ages.items() if age > FAULT_TIMEOUT_S]
            if stuck:
                self._give_up(
                    EngineFailure(f"segment {stuck[0]} did not arrive within {FAULT_TIMEOUT_S:.0f} s")
                )
            if not self._handler.is_alive() and not self._closing:
                self._give_up(EngineFailure("the fault handler is gone"))
                self._serve_faults()

    def close(self) -> None:
        """Stop all threads; the arena stays as it is. Nothing may compute on it any more. May be called twice."""
        with self._lock:
            again, self._closing = self._closing, True
            self._work_to_do.notify_all()
            self._plan_done.notify_all()
        if not again:
            os.write(self._stop_write, b"x")
        for thread in self._threads:
            thread.join()
        if not again:  # the numbers may be somebody else's descriptors by now
            os.close(self._stop_read)
            os.close(self._stop_write)


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """Threads started here may run on every processor, even if this one is a compute thread, which is bound."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, PROCESSORS)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)

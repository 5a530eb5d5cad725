"""The Framework in the linux world: events in from any thread, its effects carried out in their order.

    any thread       posts an event; whoever posts first carries out what is decided, until nothing is left
    memory thread    what takes time: zeroing and giving back, handing over, making firm, closing models
    storage thread   sessions, to files and from files (saving.py)
    clock thread     a Tick when the Framework wants one

Effects about one model's memory stay in order: as long as the memory thread has some of them, later ones queue behind.
Knows how to carry effects out; every decision is the Framework's.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ...core import Budget, Request
from ...engine.guide import Beginning
from ...engine.model import SecureModel
from ...engine.model_sessions import Match
from ...errors import FlexServeError, by_code
from ...framework import effects as ef
from ...framework import events as ev
from ...framework import trace
from ...framework.machine import Framework
from ...framework.order import Range
from ...framework.settings import Settings
from ...framework.tables import SegmentTrigger
from ...framework.view import View
from .outside import Outside, changes, pieces, session_name
from .run import Run
from .workflow_seal import Digests

if TYPE_CHECKING:
    from .saving import Saver

T = TypeVar("T")

TRACE_EVENTS = 4096
TICK_S = 0.05  # between two of them, at least


@dataclass
class _Model:
    """A registered model, and how many effects about it the memory thread has."""

    model: SecureModel
    pending: int = 0
    later: list[Callable[[], None]] = field(
        default_factory=list
    )  # of them, those that wait for an answer's end


class Runner:
    """Thread-safe."""

    def __init__(self, settings: Settings, outside: Outside) -> None:
        self._framework = Framework(settings)
        self._outside = outside
        self._start = time.perf_counter()
        self._lock = threading.Lock()  # of the queue, and of everything that is kept here
        self._events: deque[ev.Event] = deque()
        self._deciding = threading.Lock()  # of the Framework
        self._running = threading.Lock()  # held by whoever carries effects out
        self._models: dict[str, _Model] = {}
        self._closing: set[str] = set()  # names of models that are gone, but not for the Framework yet
        self._runs: dict[str, Run] = {}
        self._streamed: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._trace: deque[tuple[int, float, ev.Event, tuple[ef.Decision, ...]]] = deque(maxlen=TRACE_EVENTS)
        self._handled = itertools.count(1)
        self._memory: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._due: float | None = None
        self._later: deque[Callable[[], None]] = deque()
        self._clock_changed = threading.Condition()
        self.saver: Saver | None = None  # set once, before anything is posted
        self.digests: Digests | None = None  # the same; without, no workflow is told apart
        for name, work in (("memory", self._work_on_memory), ("clock", self._watch_clock)):
            threading.Thread(target=work, name=name, daemon=True).start()

    # Events

    def post(self, *events: ev.Event) -> None:
        """Tell the Framework, and carry out what it decides, unless another thread is at it: then that one does."""
        with self._lock:
            self._events.extend(events)
        self._run()

    def report(self, name: str) -> None:
        """Tell of what happened in a model's arena, in its order."""
        with self._lock:
            known = self._models.get(name)
            if known is None:
                return
            self._events.extend(changes(name, known.model.arena.take_journal()))
        self._run()

    def post_later(self, tell: Callable[[], None]) -> None:
        """Have it told by a thread that may be kept."""
        with self._clock_changed:
            self._later.append(tell)
            self._clock_changed.notify()

    def _run(self) -> None:
        while True:
            if not self._running.acquire(blocking=False):
                return
            try:
                self._carry_out_all()
            except BaseException:
                self._outside.fails()
                raise
            finally:
                self._running.release()
            with self._lock:
                if not self._events:
                    return

    def settle(self) -> None:
        """Until everything that was posted before is decided. Not for a thread that carries effects out."""
        try:
            with self._running:
                self._carry_out_all()
        except BaseException:
            self._outside.fails()
            raise
        self._run()  # for whoever posted meanwhile, and saw somebody at it

    def _carry_out_all(self) -> None:
        while True:
            with self._lock:
                if not self._events:
                    break
                event = self._events.popleft()
            with self._deciding:
                now = self._now()
                decisions = self._framework.handle(now, event)
                self._trace.append((next(self._handled), now, event, decisions))
            call = event.call if isinstance(event, ev.PressureRecall) else None
            for decision in decisions:  # first of all: bytes are chosen
                if isinstance(decision.effect, ef.AnswerRecall):
                    self._carry_out(decision.effect, call)
            for decision in decisions:
                if decision.effect is not None and not isinstance(decision.effect, ef.AnswerRecall):
                    self._carry_out(decision.effect, call)
        with self._deciding:
            due = self._framework.due()
        with self._clock_changed:
            if due != self._due:
                self._due = due
                self._clock_changed.notify()

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _watch_clock(self) -> None:
        told = 0.0
        while True:
            with self._clock_changed:
                while not self._later:
                    wait = None if self._due is None else max(self._due, told + TICK_S) - self._now()
                    if wait is not None and wait <= 0:
                        break
                    self._clock_changed.wait(wait)
                later = self._later.popleft() if self._later else None
            if later is not None:
                later()
            else:
                told = self._now()
                self.post(ev.Tick())

    # Effects

    def _carry_out(self, effect: ef.Effect, call: int | None) -> None:
        match effect:
            case ef.LoadRange(name, ranges, priority):
                self._in_order(name, lambda m: m.loader.extend(ranges, priority))
            case ef.StopLoading(name):
                self._in_order(name, lambda m: self._stop(name, m))
            case ef.Recall(name, ranges):
                self._on_memory(name, lambda m: self._recall(name, m, ranges, call))
            case ef.HandLazily(name, ranges):
                self._on_memory(name, lambda m: self._hand(m, ranges))
            case ef.Pin(name, ranges):
                self._on_memory(name, lambda m: self._pin(name, m, ranges))
            case ef.CloseModel(name):
                self._on_memory(name, lambda m: self._close(name, m))
            case ef.SaveSession(session, version):
                self._sessions.save(session, version)
            case ef.RestoreSession(session):
                self._sessions.restore(session)
            case ef.DropSession(session):
                self._memory.put(lambda: self._drop(session, call))
            case ef.ForgetSession(session):
                self._sessions.forget(session)
            case ef.StreamTail(name, nbytes):
                self._stream(name, nbytes)
            case ef.AnswerRecall(number, chosen, later):
                self._outside.answered(number, chosen, later)
            case ef.FinishRecall(number, freed):
                self._outside.finished(number, freed)
            case ef.AskOffer():
                pass  # the normal world looks every second, and sees it in `Budget.wanted_bytes`
            case _:
                self._carry_out_for(effect)

    def _carry_out_for(
        self,
        effect: ef.StartRequest
        | ef.ComputePrompt
        | ef.GrantKv
        | ef.SuspendRequest
        | ef.ResumeRequest
        | ef.Reject
        | ef.FinishCancelled,
    ) -> None:
        """Effects about one request."""
        with self._lock:
            run = self._runs.get(effect.request)
        if run is None:  # it ended by itself meanwhile
            return
        match effect:
            case ef.StartRequest(_, prefetched_bytes):
                run.start()
                run.prefetched_bytes = prefetched_bytes
                run.streamed_bytes = self._streamed.get(run.model, 0)
                self._outside.compute(run)
            case ef.ComputePrompt(_, session, source, reuse, kv_tokens):
                run.compute(Beginning(session, source, reuse), kv_tokens)
            case ef.GrantKv(_, kv_tokens):
                run.grant(kv_tokens)
            case ef.SuspendRequest():
                run.suspend()
            case ef.ResumeRequest(_, kv_tokens):
                if run.beginning is not None:
                    self._sessions.give_up(run.beginning.session)
                run.resume(kv_tokens)
            case ef.Reject(_, code, message, hint):
                self._end(run, by_code(code)(message, hint=hint))
            case ef.FinishCancelled():
                self._end(run, None)

    @property
    def _sessions(self) -> Saver:
        assert self.saver is not None
        return self.saver

    def _end(self, run: Run, error: FlexServeError | None) -> None:
        run.end(error)
        if not run.started:
            self.forget(run)
            self._outside.ended(run, error)

    def _stream(self, name: str, nbytes: int) -> None:
        self._streamed[name] = nbytes
        with self._lock:
            runs = [run for run in self._runs.values() if run.model == name and run.started]
        for run in runs:
            run.streamed_bytes = max(run.streamed_bytes, nbytes)

    # Memory

    def _in_order(self, name: str, work: Callable[[SecureModel], None]) -> None:
        """At once, unless the memory thread has something about this model."""
        with self._lock:
            known = self._models[name]
            behind = known.pending > 0
        if behind:
            self._on_memory(name, work)
        else:
            work(known.model)

    def _on_memory(self, name: str, work: Callable[[SecureModel], None]) -> None:
        with self._lock:
            known = self._models[name]
            known.pending += 1

        def do() -> None:
            with self._lock:
                if known.later or self._must_stay(known, name):
                    known.later.append(do)
                    return
            try:
                work(known.model)
            finally:
                with self._lock:
                    known.pending -= 1

        self._memory.put(do)

    def _must_stay(self, known: _Model, name: str) -> bool:
        """Without userfaultfd nothing could wait for a page that is gone: what answers is left alone."""
        if known.model.loader.on_demand:
            return False
        return any(run.model == name and run.started for run in self._runs.values())

    def _work_on_memory(self) -> None:
        while True:
            try:
                self._memory.get()()
            except BaseException:
                self._outside.fails()
                raise

    def _stop(self, name: str, model: SecureModel) -> None:
        with self._lock:
            model.loader.stop()
            journal = model.arena.take_journal()
            self._events.extend(changes(name, [c for c in journal if c.what != SegmentTrigger.STOPPED]))
            # In one piece, since it is the answer; also when it is empty. None of these was placed before.
            stopped = tuple(Range(c.first, c.count) for c in journal if c.what == SegmentTrigger.STOPPED)
            self._events.append(ev.SegmentsChanged(name, SegmentTrigger.STOPPED, stopped))
        self._run()

    def _recall(self, name: str, model: SecureModel, ranges: Iterable[Range], call: int | None) -> None:
        def given(_: int) -> None:
            nonlocal call
            if call is not None:
                self._outside.began(call)
                call = None

        for piece in pieces(ranges):
            model.arena.recall(piece, given)
            self.report(name)

    def _hand(self, model: SecureModel, ranges: Iterable[Range]) -> None:
        for one in ranges:
            model.arena.lazy(range(one.first, one.first + one.count))

    def _pin(self, name: str, model: SecureModel, ranges: Iterable[Range]) -> None:
        for piece in pieces(ranges):
            model.arena.pin(piece)
            self.report(name)

    def _close(self, name: str, model: SecureModel) -> None:
        with self._lock:
            del self._models[name]
            self._closing.add(name)
        self._streamed.pop(name, None)
        if model.sessions is not None:
            self._sessions.unname(model.sessions.made_by, name)
        model.close()
        self._outside.closed(name)
        self.post(ev.ModelClosed(name))
        with self._lock:
            self._closing.remove(name)
        self._sessions.find()

    def _drop(self, session: str, call: int | None) -> None:
        self._sessions.drop(session)
        if call is not None:
            self._outside.began(call)
        self.post(ev.SessionDropped(session))

    # Models

    def new_name(self, name: str) -> str:
        """The Framework's name for a model that is about to be registered: names are not used twice at a time."""
        with self._lock:
            taken = name in self._models or name in self._closing
            return f"{name}#{next(self._numbers)}" if taken else name

    def add(self, name: str, model: SecureModel) -> None:
        """A model is ready to answer."""
        with self._lock:
            self._models[name] = _Model(model)
        said = model.parts, model.kv_bytes_per_token, model.context_tokens, model.info.name
        self.post(ev.ModelRegistered(name, *said, fixed_bytes=model.adapter_bytes))
        self._sessions.find()

    def remove(self, name: str) -> None:
        """Close a model as soon as nothing of it is in use."""
        self.post(ev.ModelRemoved(name))

    def models(self) -> dict[str, SecureModel]:
        with self._lock:
            return {name: known.model for name, known in self._models.items()}

    # Requests

    def arrive(self, request: Request, model: str, accepted_at: float) -> bool:
        """Queue a request; False when there is one of that id."""
        run = Run(self, request, model, accepted_at)
        if request.session is not None:
            run.session = session_name(model, request.session)
        with self._lock:
            if run.name in self._runs:
                return False
            self._runs[run.name] = run
        client = "" if self.digests is None else self.digests.client(request.client)
        said = request.priority, client, request.next_model or ""
        self.post(ev.RequestArrived(run.name, model, run.session, *said))
        return True

    def cancel(self, name: str) -> Run | None:
        """The client of a request has gone."""
        with self._lock:
            run = self._runs.get(name)
        if run is not None:
            run.cancel()
            self.post(ev.RequestCancelled(name))
        return run

    def done(self, run: Run) -> None:
        """A request that computed has ended."""
        self.forget(run)
        with self._lock:
            known = self._models.get(run.model)
            later: list[Callable[[], None]] = []
            if known is not None:
                later, known.later = known.later, later
        for work in later:
            self._memory.put(work)
        if run.beginning is not None:
            self._sessions.give_up(run.beginning.session)
        self.post(ev.RequestFinished(run.name, run.tokens, run.tokens > 0))

    def forget(self, run: Run) -> None:
        with self._lock:
            self._runs.pop(run.name, None)

    def session_for(self, run: Run, match: Match | None) -> tuple[str, str | None]:
        """Which session gets a request's KV, and which one it goes on from."""
        if match is not None and match.id.rpartition("/")[0] != run.model:
            match = None  # of the same model under another name
        source = match.id if match is not None else None
        if run.session is not None:
            return run.session, source
        if match is not None and match.whole and not match.name:
            return match.id, source  # the next turn of a conversation without a name
        return self._new_session(run.model), source

    def _new_session(self, model: str) -> str:
        return f"{model}/s{next(self._numbers)}"

    def put_away(self, session: str, *, done: bool) -> None:
        """A suspended request's KV is in the store now, or could not be taken out of its context."""
        self._sessions.put_away(session, done=done)

    # Looking

    def is_open(self, session: str) -> bool:
        """Whether a request has this session's KV, in a context or put away."""
        with self._lock:
            return any(
                run.beginning is not None and run.beginning.session == session for run in self._runs.values()
            )

    def prefix_of(self, model: str, tokens: Sequence[int]) -> str:
        """The digest of how a prompt for this model (the Framework's name) begins."""
        with self._lock:
            known = self._models.get(model)
        if known is None or self.digests is None:
            return ""
        return self.digests.prefix(known.model.info.name, tokens)

    def ask(self, look: Callable[[Framework], T]) -> T:
        """What the Framework says between two events."""
        with self._deciding:
            return look(self._framework)

    def view(self) -> View:
        return self.ask(Framework.view)

    def budget(self) -> Budget:
        view = self.view()
        return Budget(view.budget, view.cap, view.floor, view.held, view.wanted)

    def trace(self, after: int) -> list[str]:
        """JSON lines of events above this number."""
        with self._deciding:
            kept = list(self._trace)
        wanted = (one for one in kept if one[0] > after)
        return [line for n, now, event, decisions in wanted for line in trace.lines(n, now, event, decisions)]

    def name_found(self, model: str, session: str, taken: Callable[[str], bool]) -> str:
        """The Framework's name for a session that was found in storage; `session`: the client's name of it, or none."""
        name = session_name(model, session)
        return self._new_session(model) if not session or taken(name) else name

"""A world without memory: executes the Framework's effects on counters, in any order a real one could.

It keeps the truth (what is resident, where each KV exists, which request computes), reports it by events,
and checks the design's rules at every step. Nothing happens by itself: `run` does the next piece of one queue.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flexserve.framework import effects as ef
from flexserve.framework import events as ev
from flexserve.framework.effects import Decision
from flexserve.framework.machine import Framework
from flexserve.framework.order import Range, join
from flexserve.framework.reclaim import may_stop
from flexserve.framework.settings import Settings
from flexserve.framework.tables import SegmentTrigger as Seg
from flexserve.framework.weights import Part

LOADERS = 2


@dataclass
class Image:
    """One model's memory."""

    parts: tuple[Part, ...]
    kv_bytes_per_token: int
    state: dict[int, str] = field(default_factory=dict)  # absent segments are not in here
    plan: dict[int, deque[int]] = field(default_factory=dict)  # by priority
    hands: list[int] = field(default_factory=list)  # what loaders have read and not placed
    chosen: set[int] = field(default_factory=set)  # recalls that are not carried out
    closed: bool = False
    fixed: int = 0

    def size(self, index: int) -> int:
        for part in self.parts:
            at = index - part.first
            if 0 <= at < part.count:
                return part.unit_bytes if at < part.count - 1 else part.nbytes - at * part.unit_bytes
        raise IndexError(index)

    def indices(self) -> list[int]:
        return [i for p in self.parts for i in range(p.first, p.first + p.count)]

    @property
    def resident(self) -> int:
        return sum(self.size(i) for i in self.state)


@dataclass
class Kv:
    """One session: what is in memory and what in storage. Contents are numbers; computing makes a new one."""

    model: str
    memory: int | None = None
    stored: int | None = None
    tokens: int = 0
    stored_tokens: int = 0
    nbytes: int = 0  # of memory
    corrupt: bool = False


@dataclass
class Answer:
    """One request as its client sees it."""

    model: str
    session: str
    prompt: int
    source: str | None = None
    matched: int = 0
    rows: tuple[Range, ...] = ()
    client: str = ""
    prefix: str = ""
    next_model: str = ""
    priority: int = 0
    state: str = "queued"
    tokens: int = 0
    granted: int = 0
    grown: bool = False  # asked for more KV, and stopped until it is granted
    ended: str = ""


class Executor:
    """Everything below the Framework. `now` is moved by the test."""

    def __init__(self, settings: Settings) -> None:
        self.framework = Framework(settings)
        self.now = 0.0
        self.images: dict[str, Image] = {}
        self.kvs: dict[str, Kv] = {}
        self.answers: dict[str, Answer] = {}
        self.queues: dict[str, deque[Callable[[], list[ev.Event]]]] = {}
        self.log: list[tuple[float, ev.Event, tuple[Decision, ...]]] = []
        self.contents = itertools.count(1)
        self.recalls: dict[int, int] = {}  # call -> chosen, until it is finished
        self.asked: list[int] = []
        self.failing = False  # saves fail
        self.started: list[str] = []  # requests, in the order of their start
        self.patience = 5_000  # steps until `drain` gives up

    # Events in, effects out

    def post(self, *events: ev.Event) -> None:
        """Tell the Framework; its effects are queued."""
        for event in events:
            running = {r.name for r in self.framework._records.active.values() if r.state.value == "running"}
            decisions = self.framework.handle(self.now, event)
            ended = {
                d.effect.request for d in decisions if isinstance(d.effect, ef.Reject | ef.FinishCancelled)
            }
            assert not ended & running, "what computes is never ended"
            self.log.append((self.now, event, decisions))
            for decision in decisions:
                if decision.effect is not None:
                    self._accept(decision.effect)

    def register(
        self, name: str, parts: tuple[Part, ...], kv: int = 100, context: int = 4096, fixed: int = 0
    ) -> None:
        self.images[name] = Image(parts, kv, fixed=fixed)
        self.post(ev.ModelRegistered(name, parts, kv, context, fixed_bytes=fixed))

    def _queue(self, key: str, job: Callable[[], list[ev.Event]]) -> None:
        self.queues.setdefault(key, deque()).append(job)

    def _queue_kv(self, request: str, job: Callable[[Answer], None]) -> None:
        """For the thread that computes this request; nothing to do when that has ended meanwhile."""
        answer = self.answers[request]

        def do() -> list[ev.Event]:
            if not answer.ended:
                job(answer)
            return []

        self._queue(f"kv {answer.session}", do)

    def run(self, key: str) -> None:
        """Do the next piece of one queue, and report it."""
        queue = self.queues[key]
        job = queue.popleft()
        if not queue:
            del self.queues[key]
        self.post(*job())

    def loading(self) -> list[str]:
        """Models whose loaders have something to do."""
        return [n for n, i in self.images.items() if i.hands or any(i.plan.values())]

    def drain(self) -> None:
        """Everything that can happen by itself, happens."""
        for _ in range(self.patience):
            if self.queues:
                self.run(next(iter(self.queues)))
            elif names := self.loading():
                self.load(names[0])
            else:
                return
        last = "\n".join(f"{now} {event} -> {decisions}" for now, event, decisions in self.log[-6:])
        raise AssertionError(f"the Framework never comes to rest:\n{last}")

    # Loaders

    def load(self, name: str) -> None:
        """One loader places what it has, or takes the next segment of the plan."""
        image = self.images[name]
        if len(image.hands) < LOADERS:
            for _, plan in sorted(image.plan.items()):
                while plan:
                    index = plan.popleft()
                    if index not in image.state and index not in image.hands:
                        image.hands.append(index)
                        return
        if image.hands:
            self.place(name, image.hands.pop(0))

    def place(self, name: str, index: int) -> None:
        image = self.images[name]
        image.state[index] = "resident"
        self.post(ev.SegmentsChanged(name, Seg.PLACED, (Range(index, 1),)))

    def touch(self, name: str, index: int) -> None:
        """Compute reads a segment; where it is not there, it waits until a loader has placed it."""
        image = self.images[name]
        if index in image.state:
            return
        self.post(ev.ComputeAt(name, index))
        if index in image.hands:
            image.hands.remove(index)
        if index not in image.state:  # a fault is served whatever the Framework thinks
            self.place(name, index)

    def lose(self, name: str, index: int) -> None:
        """The kernel takes a lazy segment."""
        image = self.images[name]
        if image.state.get(index) == "lazy":
            del image.state[index]
            self.post(ev.SegmentsChanged(name, Seg.LOST, (Range(index, 1),)))

    # Effects

    def _accept(self, effect: ef.Effect) -> None:
        match effect:
            case ef.LoadRange(model, ranges, priority):
                plan = self.images[model].plan.setdefault(priority, deque())
                plan.extend(i for r in ranges for i in range(r.first, r.first + r.count))
            case ef.StopLoading(model):
                self._queue(f"arena {model}", lambda: self._stop(model))
            case ef.Recall(model, ranges):
                self.images[model].chosen.update(_indices(ranges))
                self._queue(f"arena {model}", lambda: self._recall(model, _indices(ranges)))
            case ef.HandLazily(model, ranges):
                self._queue(f"arena {model}", lambda: self._hand(model, _indices(ranges)))
            case ef.Pin(model, ranges):
                self._queue(f"arena {model}", lambda: self._pin(model, _indices(ranges)))
            case ef.SaveSession(session, version):
                self._queue(f"kv {session}", lambda: self._save(session, version))
            case ef.RestoreSession(session):
                self._queue(f"kv {session}", lambda: self._restore(session))
            case ef.DropSession(session):
                self._queue(f"kv {session}", lambda: self._drop(session))
            case ef.ForgetSession(session):
                if session in self.kvs:
                    self.kvs[session].stored = None
            case ef.StartRequest(request):
                self.started.append(request)
                self._queue(f"request {request}", lambda: self._tokenize(request))
            case ef.ComputePrompt(request, session, source, reuse, kv_tokens):
                self._queue(
                    f"kv {session}", lambda: self._compute(request, session, source, reuse, kv_tokens)
                )
            case ef.GrantKv(request, kv_tokens):
                self._queue_kv(request, lambda answer: self._grant(answer, kv_tokens))
            case ef.SuspendRequest(request):
                self._queue_kv(request, self._suspend)
                self._queue(f"kv {self.answers[request].session}", lambda: [ev.RequestPaused(request)])
            case ef.ResumeRequest(request, kv_tokens):
                self._queue_kv(request, lambda answer: self._resume(answer, kv_tokens))
            case ef.Reject(request, code, message, hint):
                assert code and message and hint
                self._end(request, code)
            case ef.FinishCancelled(request):
                self._end(request, "cancelled")
            case ef.AnswerRecall(call, chosen, later):
                assert later <= chosen
                self.recalls[call] = chosen
            case ef.FinishRecall(call, freed):
                assert freed <= self.recalls.pop(call)
            case ef.AskOffer(nbytes):
                assert nbytes > 0
                self.asked.append(nbytes)
            case ef.CloseModel(model):
                self._queue(f"arena {model}", lambda: self._close(model))
            case ef.StreamTail():
                pass

    def _stop(self, model: str) -> list[ev.Event]:
        image = self.images[model]
        left = sorted({i for plan in image.plan.values() for i in plan} - set(image.hands))
        image.plan.clear()
        return [ev.SegmentsChanged(model, Seg.STOPPED, _ranges(image, left))]

    def _recall(self, model: str, indices: list[int]) -> list[ev.Event]:
        image = self.images[model]
        image.chosen.difference_update(indices)
        spared = [i for i in indices if i in image.hands and i not in image.state]
        for index in indices:
            image.state.pop(index, None)
        gone = [i for i in indices if i not in spared]
        events: list[ev.Event] = []
        if gone:
            events.append(ev.SegmentsChanged(model, Seg.RECALLED, _ranges(image, gone)))
        if spared:
            events.append(ev.SegmentsChanged(model, Seg.SPARED, _ranges(image, spared)))
        return events

    def _hand(self, model: str, indices: list[int]) -> list[ev.Event]:
        image = self.images[model]
        for index in indices:
            if index in image.state:
                image.state[index] = "lazy"
        return []

    def _pin(self, model: str, indices: list[int]) -> list[ev.Event]:
        image = self.images[model]
        firm = [i for i in indices if image.state.get(i) == "lazy"]
        for index in firm:
            image.state[index] = "resident"
        return [ev.SegmentsChanged(model, Seg.PINNED, _ranges(image, firm))] if firm else []

    # Sessions. Everything about one session, and the request that computes on it, is done in order; writing a
    # saved one takes longer, and is overtaken.

    def _save(self, session: str, version: int) -> list[ev.Event]:
        kv = self.kvs[session]
        assert kv.memory is not None, f"nothing to save of session {session}"
        content, tokens = kv.memory, kv.tokens
        self._queue(f"storage {session}", lambda: self._written(session, version, content, tokens))
        return []

    def _written(self, session: str, version: int, content: int, tokens: int) -> list[ev.Event]:
        if self.failing:
            return [ev.SessionSaveFailed(session, version)]
        kv = self.kvs[session]
        kv.stored, kv.stored_tokens = content, tokens
        return [ev.SessionSaved(session, version)]

    def _restore(self, session: str) -> list[ev.Event]:
        kv = self.kvs[session]
        if kv.stored is None or kv.corrupt:
            kv.corrupt = False
            return [ev.SessionRestoreFailed(session)]
        kv.memory, kv.tokens = kv.stored, kv.stored_tokens
        kv.nbytes = kv.tokens * self.images[kv.model].kv_bytes_per_token
        return [ev.SessionRestored(session)]

    def _drop(self, session: str) -> list[ev.Event]:
        kv = self.kvs.setdefault(session, Kv("?"))  # of a request that ended before it computed
        users = [
            a for a in self.answers.values() if a.session == session and a.state in ("computing", "suspended")
        ]
        assert not users or kv.stored == kv.memory, "KV of an open request is saved, never dropped"
        kv.memory, kv.nbytes = None, 0
        return [ev.SessionDropped(session)]

    def _grant(self, answer: Answer, kv_tokens: int) -> None:
        answer.granted, answer.grown = kv_tokens, False

    def _suspend(self, answer: Answer) -> None:
        assert answer.state == "computing"
        answer.state = "suspended"

    def _resume(self, answer: Answer, kv_tokens: int) -> None:
        assert answer.state == "suspended"
        assert self.kvs[answer.session].memory is not None, "resumed without its KV"
        answer.state, answer.granted, answer.grown = "computing", kv_tokens, False

    def _close(self, model: str) -> list[ev.Event]:
        image = self.images.pop(model)
        image.closed = True
        assert not any(kv.memory for kv in self.kvs.values() if kv.model == model)
        return [ev.ModelClosed(model)]

    # Requests

    def ask(self, name: str, answer: Answer, *, explicit: bool = False) -> None:
        self.answers[name] = answer
        session = answer.session if explicit else None
        said = answer.priority, answer.client, answer.next_model
        self.post(ev.RequestArrived(name, answer.model, session, *said))

    def _tokenize(self, request: str) -> list[ev.Event]:
        answer = self.answers[request]
        answer.state = "prepared"
        return [
            ev.PromptTokenized(
                request,
                answer.session,
                answer.prompt,
                answer.source,
                answer.matched,
                answer.rows,
                answer.prefix,
            )
        ]

    def _compute(
        self, request: str, session: str, source: str | None, reuse: int, kv_tokens: int
    ) -> list[ev.Event]:
        answer = self.answers[request]
        kv = self.kvs.setdefault(session, Kv(answer.model))
        if answer.ended:  # nothing is computed: the KV is empty
            kv.memory, kv.tokens, kv.nbytes = next(self.contents), 0, 0
            return []
        if reuse:
            assert source is not None
            assert self.kvs[source].memory is not None, "a source is in memory while it is read"
            assert reuse <= self.kvs[source].tokens
        assert answer.state == "prepared"
        answer.state = "computing"
        answer.tokens, answer.granted = answer.prompt, kv_tokens
        self._write(answer)
        return []

    def _write(self, answer: Answer) -> None:
        kv = self.kvs[answer.session]
        kv.memory, kv.tokens = next(self.contents), answer.tokens
        kv.nbytes = answer.tokens * self.images[kv.model].kv_bytes_per_token

    def step(self, request: str, tokens: int = 1) -> None:
        """A running request computes some tokens, or asks for the KV to do so."""
        answer = self.answers[request]
        if answer.state != "computing" or answer.grown or request_waits(self, request):
            return
        if answer.tokens == answer.prompt:
            self.post(ev.DecodeStarted(request))
        if answer.tokens + tokens > answer.granted:
            answer.grown = True
            self.post(ev.KvGrowing(request, answer.tokens + tokens))
        if not answer.grown and self.answers[request].state == "computing":
            answer.tokens += tokens
            self._write(answer)

    def finish(self, request: str, *, keep: bool = True) -> None:
        answer = self.answers[request]
        if answer.state in ("prepared", "computing") and not request_waits(self, request):
            tokens = answer.tokens
            self._end(request, "finished")
            self.post(ev.RequestFinished(request, tokens, keep))

    def _end(self, request: str, how: str) -> None:
        answer = self.answers[request]
        assert not answer.ended, f"request {request} ended twice: {answer.ended}, {how}"
        answer.ended, answer.state = how, "ended"

    # Rules

    def check(self) -> None:
        """The design's invariants 2, 4, 5 and 7, as far as they are the Framework's."""
        self.framework.check()
        records = self.framework._records
        held = 0
        for name, image in self.images.items():
            going = sum(image.size(i) for i in image.chosen if i in image.state)
            held += image.resident - going + image.fixed
            for index, state in image.state.items():
                known = records.models[name].weights
                there = known.state(known.position(index)).name
                if state == "resident":
                    assert there not in ("ABSENT",), f"{name} {index} is resident, and known as {there}"
        for name, kv in self.kvs.items():
            record = records.sessions.get(name)
            leaving = record is not None and (record.goes or record.state.value in ("dropping", "freeing"))
            stuck = record is not None and record.retry_at > records.now
            held += 0 if leaving or stuck or kv.memory is None else kv.nbytes
            if record is not None and record.state.value in ("saved", "dropping", "stored", "restoring"):
                content = kv.stored if kv.memory is None or record.state.value == "stored" else kv.memory
                assert kv.stored is not None, (
                    f"session {name} is marked {record.state}, and storage has nothing"
                )
                assert kv.stored == content, f"session {name} is marked {record.state}, but changed since"
            if f"kv {name}" in self.queues:
                continue  # it is about to be so
            if record is not None and record.state.value in ("open", "resident", "saving", "saved"):
                assert kv.memory is not None, f"session {name} is marked {record.state}, and not in memory"
        largest = max((p.unit_bytes for i in self.images.values() for p in i.parts), default=0)
        slack = LOADERS * largest * max(len(self.images), 1)
        for model in records.models.values():
            if records.computes(model):  # the batch that ends keeps what it needs
                slack += records.window(model)
        assert held <= records.budget + slack, f"{held} bytes held, budget {records.budget}"
        assert records.settings.floor_bytes <= records.budget <= records.settings.cap_bytes
        for request in records.active.values():
            if may_stop(records, request):
                window = records.window(records.models[request.model])
                assert records.in_use() + window <= records.budget, f"request {request.name} would crawl"
        for name, answer in self.answers.items():
            assert bool(answer.ended) != (name in records.requests), f"request {name} is lost"


def request_waits(executor: Executor, request: str) -> bool:
    """Whether something is queued for this request that comes first."""
    return (
        f"request {request}" in executor.queues
        or f"kv {executor.answers[request].session}" in executor.queues
    )


def _indices(ranges: Iterable[Range]) -> list[int]:
    return [i for r in ranges for i in range(r.first, r.first + r.count)]


def _ranges(image: Image, indices: Iterable[int]) -> tuple[Range, ...]:
    """Ranges that do not cross from one part into the next."""
    made: list[Range] = []
    wanted = sorted(indices)
    for part in image.parts:
        made += join(i for i in wanted if part.first <= i < part.first + part.count)
    return tuple(made)

"""Everything the Framework knows: a record for each model, session and request, the budget and the sums.

States change only here, through the tables, so that the sums are always right. Knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .caching import Distribution, ModelUse, SessionUse, rank
from .effects import Decision, Effect, Fact, Why
from .order import Range
from .pace import LoadPace, PromptPace, waiting_s
from .positions import Positions
from .settings import Settings
from .tables import (
    MODEL,
    REQUEST,
    SESSION,
    SESSION_HELD,
    SESSION_LEAVING,
    ModelState,
    ModelTrigger,
    RequestState,
    RequestTrigger,
    SegmentState,
    SegmentTrigger,
    SessionState,
    SessionTrigger,
    after,
)
from .usage import Usage, bucket
from .weights import Ledger, Weights
from .workflows import Prediction, WorkflowLog


@dataclass
class Prefetched:
    """What was loaded of one model for a request that has not come."""

    missing_bytes: int  # of its weights, before
    asked_bytes: int = 0
    session_bytes: int = 0


@dataclass
class Expected:
    """A request that has not come; `behind`: the request that it comes after."""

    prediction: Prediction
    why: Why
    behind: str
    until: float  # then it was a wrong guess


@dataclass
class ModelRecord:
    """One registered model."""

    name: str
    weights: Weights
    kv_bytes_per_token: int
    context_tokens: int
    label: str = ""  # what clients call it
    fixed_bytes: int = 0  # in memory from registering to closing: an adapter
    usage: Usage = field(default_factory=Usage)
    state: ModelState = ModelState.GONE
    active: int = 0  # requests that have started and not ended
    compute_at: int = 0  # position that compute was last seen at
    planned: bool = False  # `LoadRange` was sent since the last `StopLoading`
    stopping: bool = False  # `StopLoading` is out
    refilling: bool = False  # what is on its way was asked for in the background only
    streamed_bytes: int = 0  # as last told by `StreamTail`
    error: tuple[str, str] = ("", "")  # of a poisoned model: code, message
    pace: PromptPace = field(default_factory=PromptPace)
    prefetched: Prefetched | None = None  # since a request started


@dataclass
class SessionRecord:
    """One conversation's KV."""

    name: str
    model: str
    state: SessionState = SessionState.GONE
    tokens: int = 0
    nbytes: int = 0  # of memory, when it is in memory; otherwise what it would take
    version: int = 0  # a new one whenever the KV may have changed
    last_used: float = 0.0
    owner: str | None = None  # the request whose KV it is, from before it computes until it ends
    readers: int = 0  # requests that copy from it right now
    goes: bool = False  # to be dropped as soon as it is saved
    copied: bool = False  # storage has a copy, maybe of an older version
    retry_at: float = 0.0  # no save before


@dataclass
class RequestRecord:
    """One request that has not ended."""

    name: str
    model: str
    arrived: float
    asked_session: str | None
    state: RequestState = RequestState.GONE
    tokenized: bool = False
    session: str = ""
    source: str | None = None
    matched_tokens: int = 0
    prompt_tokens: int = 0
    rows: tuple[Range, ...] = ()
    kv_tokens: int = 0  # that its KV may grow to
    wanted_tokens: int = 0  # while it is suspended: what it needs to go on
    reads: str | None = None  # the session it holds as a reader
    since: float = 0.0  # when it began to wait for memory
    number: int = 0  # in the order of arrival
    priority: int = 0
    overtaken: int = 0  # by requests that arrived later, while it could start
    decoding: bool = False  # its first token is there
    stops: bool = False  # it is suspended, and its last batch is computed still
    client: str = ""  # a digest
    next_model: str = ""  # that its client named
    prefix: str = ""  # a digest of how its prompt begins
    expected: Expected | None = None  # it came true with this one, which has not started


@dataclass
class RecallRecord:
    """A recall that is not finished: done when `Ledger.freed` reaches the goal, and `freed_kv` its own: weights that
    compute brings back meanwhile are taken again, and would count for sessions that are still to be saved."""

    call: int
    started: int
    goal: int
    kv_goal: int


class Records:
    """All of them, and the decisions of the event that is being handled."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self.budget = settings.budget_bytes
        self.ledger = Ledger()
        self.models: dict[str, ModelRecord] = {}
        self.sessions: dict[str, SessionRecord] = {}
        self.in_memory: dict[str, SessionRecord] = {}  # those that cost memory
        self.requests: dict[str, RequestRecord] = {}  # in the order of arrival
        self.active: dict[str, RequestRecord] = {}  # of them, started; in the order of their start
        self.queue: dict[str, RequestRecord] = {}  # of them, those that have not started
        self.arrivals = 0
        self.pace = LoadPace()
        self.workflows = WorkflowLog()
        self.expected: dict[str, Expected] = {}  # by client
        self.reserved = 0  # bytes that requests need for KV before more weights may be loaded
        self.recalls: list[RecallRecord] = []
        self.deadline: float | None = None  # of the recalls
        self.pressed_at: float | None = None  # last recall or loss
        self.asked_bytes = 0  # by the last `AskOffer`
        self.stored_bytes = 0
        self.changes = 0  # of anything that ranks models
        self._ranked: tuple[tuple[int, int], list[str]] | None = None
        self.distribution: Distribution | None = None
        self.decisions: list[Decision] = []

    # Decisions

    def do(self, effect: Effect, why: Why, **facts: Fact) -> None:
        self.decisions.append(Decision(effect, why, facts))

    def note(self, why: Why, **facts: Fact) -> None:
        self.decisions.append(Decision(None, why, facts))

    # Sums

    @property
    def fixed_bytes(self) -> int:
        """What no recall can take."""
        return sum(model.fixed_bytes for model in self.models.values())

    @property
    def floor(self) -> int:
        """No recall pushes the budget below."""
        return max(self.settings.floor_bytes, min(self.fixed_bytes, self.settings.cap_bytes))

    @property
    def free(self) -> int:
        """What may be taken right now without exceeding the budget; negative when over it."""
        return self.budget - self.ledger.held

    @property
    def present(self) -> int:
        """Bytes that are in memory and stay so without another decision. What is fixed counts."""
        return self.ledger.held - self.ledger.loading - self.ledger.leaving

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def waiting_s(self, name: str, missing: int | None = None) -> float:
        """What a request of this model would wait for weights if it started now, or if so much were `missing`."""
        model = self.models.get(name)
        if model is None:
            return 0.0
        if missing is None:
            missing = model.weights.missing + model.weights.bytes_in[SegmentState.LOADING]
        return waiting_s(self.pace, model.pace, missing, model.usage.typical_prompt_tokens)

    def labelled(self, label: str) -> ModelRecord | None:
        """The model that clients call so, if it answers."""
        found = (m for m in self.models.values() if m.label == label and m.state == ModelState.READY)
        return next(found, None)

    def is_pinned(self, model: ModelRecord) -> bool:
        return model.label in self.settings.pinned

    def pinned_bytes(self) -> dict[str, int]:
        """What the background leaves alone, whatever it is worth."""
        return {m.name: m.weights.size for m in self.models.values() if self.is_pinned(m)}

    @property
    def loads_weights(self) -> bool:
        return any(m.weights.bytes_in[SegmentState.LOADING] for m in self.models.values())

    def kv_in_use(self) -> int:
        """KV that the requests which compute need in memory."""
        return sum(
            s.nbytes
            for s in self.in_memory.values()
            if s.readers or s.state in (SessionState.OPEN, SessionState.RESTORING)
        )

    def computes(self, model: ModelRecord) -> bool:
        """Whether a batch is computed with it, or may be still: who is told to stop ends its batch first."""
        return model.active > 0 and any(
            r.model == model.name and (r.state == RequestState.RUNNING or r.stops)
            for r in self.active.values()
        )

    def in_use(self) -> int:
        """What weights have to leave room for."""
        return self.kv_in_use() + self.fixed_bytes

    def in_memory_bytes(self, model: ModelRecord) -> int:
        return model.weights.size - model.weights.bytes_in[SegmentState.ABSENT]

    def ahead(self, model: ModelRecord) -> int:
        """Of a streamed tail, what is read ahead of compute: whole segments, so never less than one. Where only a part
        of one had room nothing would be read ahead, and each would come when a thread waits for it already."""
        return max(self.settings.stream_window_bytes, model.weights.largest)

    def window(self, model: ModelRecord) -> int:
        """The least memory for weights with which a model still answers."""
        return min(self.ahead(model), model.weights.fill_size)

    def least(self, model: ModelRecord, tokens: int = 0) -> int:
        """The smallest budget with which a model answers one request, alone, whose KV has room for so many tokens; for
        none: a short one."""
        kv = self.kv_bytes(model, tokens or self.rounded(model, 0))
        return self.fixed_bytes + self.window(model) + kv

    def rounded(self, model: ModelRecord, tokens: int) -> int:
        """What KV is granted for so many tokens, and the next."""
        chunk = self.settings.kv_chunk_tokens
        return max(tokens, min(-(-(tokens + 1) // chunk) * chunk, model.context_tokens))

    def kv_bytes(self, model: ModelRecord, tokens: int) -> int:
        return tokens * model.kv_bytes_per_token

    # Steps

    def move_model(self, model: ModelRecord, trigger: ModelTrigger) -> None:
        old, model.state = model.state, after(MODEL, model.state, trigger)
        self.changes += 1
        if old == ModelState.GONE:
            self.ledger.held += model.fixed_bytes
        if model.state == ModelState.GONE:
            model.weights.forget()
            self.ledger.held -= model.fixed_bytes
            self.ledger.freed += model.fixed_bytes
            del self.models[model.name]

    def move_segments(self, model: ModelRecord, trigger: SegmentTrigger, positions: Positions) -> int:
        return model.weights.apply(trigger, positions)

    def move_request(self, request: RequestRecord, trigger: RequestTrigger) -> None:
        request.state = after(REQUEST, request.state, trigger)
        self.queue.pop(request.name, None)
        if request.state == RequestState.QUEUED:
            self.requests[request.name] = self.queue[request.name] = request
        elif request.state == RequestState.PREPARING:
            self.active[request.name] = request
            self.models[request.model].active += 1
        elif request.state == RequestState.GONE:
            self.requests.pop(request.name, None)
            if self.active.pop(request.name, None) is not None:
                self.models[request.model].active -= 1
            self.stop_reading(request)

    def stop_reading(self, request: RequestRecord) -> None:
        if request.reads is not None:
            self.sessions[request.reads].readers -= 1
            request.reads = None

    def session(self, name: str, model: str) -> SessionRecord:
        """The record of that id, a new one where there is none."""
        return self.sessions.get(name) or SessionRecord(name, model)

    def move_session(
        self,
        session: SessionRecord,
        trigger: SessionTrigger,
        *,
        nbytes: int | None = None,
        goes: bool = False,
    ) -> None:
        """One step in the table; `nbytes`: its new size; `goes`: drop it as soon as it is saved."""
        self._count(session, -1)
        old, session.state = session.state, after(SESSION, session.state, trigger)
        if nbytes is not None:
            session.nbytes = nbytes
        session.goes = goes
        if session.state == SessionState.OPEN or trigger == SessionTrigger.CLOSE:
            session.version += 1  # a save under way is of an older one
            session.last_used = self.now
        self._count(session, +1)
        if session.state in SESSION_HELD:
            self.in_memory[session.name] = session
        else:
            self.in_memory.pop(session.name, None)
            if old in SESSION_LEAVING:
                self.ledger.freed += session.nbytes
                self.ledger.freed_kv += session.nbytes
        if session.state == SessionState.GONE:
            self.sessions.pop(session.name, None)
        else:
            self.sessions[session.name] = session

    def resize_session(self, session: SessionRecord, nbytes: int) -> None:
        """The KV grew, or what it did not use is free again."""
        self._count(session, -1)
        session.nbytes = nbytes
        self._count(session, +1)

    def let_go(self, session: SessionRecord) -> None:
        """A session that is being saved already shall be dropped when that is done."""
        self._count(session, -1)
        session.goes = True
        self._count(session, +1)

    def _count(self, session: SessionRecord, sign: int) -> None:
        state, amount = session.state, sign * session.nbytes
        if state in SESSION_HELD:
            self.ledger.held += amount
        if state == SessionState.RESTORING:
            self.ledger.loading += amount
        if state in SESSION_LEAVING or (state == SessionState.SAVING and session.goes):
            self.ledger.leaving += amount
            self.ledger.leaving_kv += amount
        if state == SessionState.STORED:
            self.stored_bytes += amount

    # What caching looks at

    def ranked(self) -> list[str]:
        """Names of the models that answer, most invoked first. Kept until an invocation comes or grows old."""
        key = (self.changes, bucket(self.now, self.settings))
        if self._ranked is None or self._ranked[0] != key:
            self._ranked = key, [use.model for use in rank(self.model_uses())]
        return self._ranked[1]

    def model_uses(self) -> list[ModelUse]:
        return [
            ModelUse(
                m.name,
                m.weights.fill_size,
                m.usage.recent(self.now, self.settings),
                m.usage.frequency(self.now, self.settings),
                m.usage.typical_prompt_tokens,
                m.usage.last_used,
            )
            for m in self.models.values()
            if m.state == ModelState.READY
        ]

    def session_uses(self) -> list[SessionUse]:
        idle = (SessionState.RESIDENT, SessionState.SAVING, SessionState.SAVED)
        return [
            SessionUse(s.name, s.model, s.nbytes, s.last_used)
            for s in self.in_memory.values()
            if s.state in idle and not s.goes
        ]

    def check(self) -> None:
        """Our own invariants: the sums are those of the records. Raises `AssertionError`."""
        held = loading = leaving = stored = 0
        for model in self.models.values():
            model.weights.check()
            by = model.weights.bytes_in
            held += model.weights.size - by[SegmentState.ABSENT] + model.fixed_bytes
            loading += by[SegmentState.LOADING]
            leaving += by[SegmentState.CLAIMED]
        for session in self.sessions.values():
            held += session.nbytes if session.state in SESSION_HELD else 0
            loading += session.nbytes if session.state == SessionState.RESTORING else 0
            goes = session.state in SESSION_LEAVING or (session.state == SessionState.SAVING and session.goes)
            leaving += session.nbytes if goes else 0
            stored += session.nbytes if session.state == SessionState.STORED else 0
            assert (session.name in self.in_memory) == (session.state in SESSION_HELD)
            assert session.owner is None or session.owner in self.requests
            readers = sum(r.reads == session.name for r in self.requests.values())
            assert session.readers == readers
        ledger = self.ledger
        assert (held, loading, leaving) == (ledger.held, ledger.loading, ledger.leaving)
        assert stored == self.stored_bytes
        queued = [r.name for r in self.requests.values() if r.state == RequestState.QUEUED]
        assert list(self.queue) == queued
        for model in self.models.values():
            assert model.active == sum(r.model == model.name for r in self.active.values())

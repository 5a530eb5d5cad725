"""The workflow log: which model each client's requests went to, and what comes next (paper, section 5).

A *step* is a model and a digest of how its prompt begins: agents repeat system prompt and tools. For each client the
log counts what came after the last two steps, after the last one, and after the last models whatever their prompts
were; the longest of these that was seen twice predicts. Newer observations count more, old ones fade, and the longest
unseen go.

    confidence = weight of what came / (weight of all that came + 1)

Pure. Knows names of models, digests, counts and times; no prompt, no memory, and not what is done about a prediction
(prefetch.py). `dump` is all of it as plain values, `load` the reverse.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .settings import Settings

MAX_CLIENTS = 256  # whose last steps are remembered
MAX_NEXT = 8  # different ones after the same steps
DECLARED_WEIGHT = 4.0  # of an observation that nobody made: a client declared it
LEAST_WEIGHT = 1.5  # of what followed some steps, before it says anything: more than one observation


class Step(NamedTuple):
    """One request, as the log knows it. `prefix` empty: any prompt."""

    model: str
    prefix: str = ""


END = Step("")  # nothing came
Context = tuple[str, tuple[Step, ...]]  # client; its last steps, the newest last


@dataclass
class Tally:
    """How often one step came after others, and what predicting it brought."""

    weight: float = 0.0  # of observations, older ones counting less
    seen: int = 0
    predictions: int = 0
    hits: int = 0
    nbytes: int = 0
    saved_s: float = 0.0
    declared: str = ""


@dataclass
class Followers:
    """What came after some steps. Weights are those at `last`."""

    last: float
    tallies: dict[Step, Tally] = field(default_factory=dict)


@dataclass
class Totals:
    """Of all predictions."""

    predictions: int = 0
    hits: int = 0
    nbytes: int = 0  # prefetched, for requests that came
    wasted: int = 0  # for those that did not
    saved_s: float = 0.0


@dataclass
class Recent:
    """What a client did last."""

    at: float
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The next step of a client; `after`: the model it comes after."""

    client: str
    after: str
    step: Step
    confidence: float


@dataclass(frozen=True)
class Entry:
    """One line of the log for people: after `steps` (models) comes `next_model`."""

    id: str
    client: str
    steps: tuple[str, ...]
    next_model: str
    seen: int
    confidence: float
    predictions: int
    hits: int
    nbytes: int
    saved_s: float
    age_s: float
    declared: str


class WorkflowLog:
    """One per Framework. Not thread-safe."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.changes = 0
        self._recent: OrderedDict[str, Recent] = OrderedDict()
        self._followers: OrderedDict[Context, Followers] = OrderedDict()
        self._sessions: OrderedDict[Step, str] = OrderedDict()

    # What happens

    def step(self, now: float, client: str, step: Step, settings: Settings) -> None:
        """A request of this client began to be answered."""
        recent = self._recent.get(client) or Recent(now)
        if recent.steps and now - recent.at > settings.workflow_gap_s:
            self._observe(now, client, recent.steps, END, settings)
            recent.steps = ()
        if recent.steps:
            self._observe(now, client, recent.steps, step, settings)
        recent.at, recent.steps = now, (*recent.steps, step)[-2:]
        self._recent[client] = recent
        self._recent.move_to_end(client)
        if len(self._recent) > MAX_CLIENTS:
            self._recent.popitem(last=False)

    def touch(self, now: float, client: str) -> None:
        """The client's answer ended now: the gap begins here."""
        if client in self._recent:
            self._recent[client].at = now

    def _observe(
        self, now: float, client: str, steps: tuple[Step, ...], step: Step, settings: Settings
    ) -> None:
        for context in _contexts(client, steps):
            tally = self._tally(now, context, step, settings, memory=settings.workflow_memory)
            tally.weight += 1.0
            tally.seen += 1

    def _tally(
        self, now: float, context: Context, step: Step, settings: Settings, *, memory: float = 1.0
    ) -> Tally:
        """The count of `step` behind `context`; `memory`: what the others count from now on."""
        self.changes += 1
        followers = self._followers.get(context) or Followers(now)
        faded = memory * _faded(now - followers.last, settings)
        for tally in followers.tallies.values():
            tally.weight *= faded
        followers.last = now
        self._followers[context] = followers
        self._followers.move_to_end(context)
        if len(self._followers) > settings.workflow_limit:
            self._followers.popitem(last=False)
        found = followers.tallies.get(step)
        if found is None:
            if len(followers.tallies) >= MAX_NEXT:
                del followers.tallies[min(followers.tallies, key=lambda s: (followers.tallies[s].weight, s))]
            found = followers.tallies[step] = Tally()
        return found

    def declare(self, now: float, client: str, name: str, models: Sequence[str], settings: Settings) -> None:
        """A client says which models it will ask, one after the other. Saying it again says it once."""
        steps = [Step(model) for model in models]
        for number, step in enumerate((*steps[1:], END), 1):
            for count in (1, 2):
                if count <= number:
                    tally = self._tally(now, (client, tuple(steps[number - count : number])), step, settings)
                    tally.weight, tally.declared = max(tally.weight, DECLARED_WEIGHT), name

    def keep_session(self, step: Step, session: str, settings: Settings) -> None:
        """The newest KV of prompts that begin like this is in that session."""
        if step.prefix:
            self._sessions[step] = session
            self._sessions.move_to_end(step)
            if len(self._sessions) > settings.session_limit:
                self._sessions.popitem(last=False)

    def session(self, step: Step) -> str | None:
        return self._sessions.get(step)

    # What comes next

    def predict(self, now: float, client: str, settings: Settings) -> Prediction | None:
        """The client's next step, where that is likely enough."""
        recent = self._recent.get(client)
        if recent is None or not recent.steps:
            return None
        for context in _contexts(client, recent.steps):
            followers = self._followers.get(context)
            if followers is None:
                continue
            weights = _by_model(followers, _faded(now - followers.last, settings))
            if sum(weights.values()) < LEAST_WEIGHT:
                continue
            model = max(weights, key=lambda name: (weights[name], name))
            confidence = weights[model] / (sum(weights.values()) + 1.0)
            if model and confidence >= settings.prefetch_confidence:
                return Prediction(client, recent.steps[-1].model, self._likely(followers, model), confidence)
            return None  # it is known that nobody knows
        return None

    def hinted(self, client: str, model: str) -> Prediction:
        """The client says itself which model is next."""
        recent = self._recent.get(client)
        steps = recent.steps if recent is not None else ()
        for context in _contexts(client, steps):
            followers = self._followers.get(context)
            if followers is not None and any(step.model == model for step in followers.tallies):
                return Prediction(client, steps[-1].model, self._likely(followers, model), 1.0)
        return Prediction(client, steps[-1].model if steps else "", Step(model), 1.0)

    def _likely(self, followers: Followers, model: str) -> Step:
        """How that model's prompt will begin; the session is known of the newest ones only."""
        found = {step: tally.weight for step, tally in followers.tallies.items() if step.model == model}
        return max(found, key=lambda step: (bool(step.prefix), found[step], step))

    def resolved(self, one: Prediction, *, hit: bool, nbytes: int = 0, saved_s: float = 0.0) -> None:
        """It came true, and so much was there because of it; or it did not."""
        followers = self._followers.get((one.client, (Step(one.after),)))
        sums: list[Tally | Totals] = [self.totals]
        if followers is not None and (tally := followers.tallies.get(one.step)) is not None:
            sums.append(tally)
        self.changes += 1
        for each in sums:
            each.predictions += 1
            each.hits += hit
            each.nbytes += nbytes
            each.saved_s += saved_s

    # For people

    def entries(self, now: float, settings: Settings) -> list[Entry]:
        """What came after each model, of each client; the newest first."""
        found = []
        for (client, steps), followers in self._followers.items():
            if len(steps) != 1 or steps[0].prefix:
                continue
            weights = _by_model(followers, _faded(now - followers.last, settings))
            for model in sorted(weights):
                tallies = [t for s, t in followers.tallies.items() if s.model == model]
                if not model:
                    continue
                found.append(
                    Entry(
                        id=entry_id(client, steps[0].model, model),
                        client=client,
                        steps=(steps[0].model,),
                        next_model=model,
                        seen=sum(t.seen for t in tallies),
                        confidence=weights[model] / (sum(weights.values()) + 1.0),
                        predictions=sum(t.predictions for t in tallies),
                        hits=sum(t.hits for t in tallies),
                        nbytes=sum(t.nbytes for t in tallies),
                        saved_s=sum(t.saved_s for t in tallies),
                        age_s=max(now - followers.last, 0.0),
                        declared=next((t.declared for t in tallies if t.declared), ""),
                    )
                )
        return sorted(found, key=lambda e: (e.age_s, e.id))

    def forget(self, client: str | None = None, entry: str | None = None) -> int:
        """Forget everything, one client's, or one line of `entries`; how many lines went."""
        self.changes += 1
        before = self._lines()
        for context in list(self._followers):
            owner, steps = context
            if client is not None and owner != client:
                continue
            if entry is None:
                del self._followers[context]
                continue
            tallies = self._followers[context].tallies
            for step in [s for s in tallies if entry_id(owner, steps[-1].model, s.model) == entry]:
                del tallies[step]
            if not tallies:
                del self._followers[context]
        if entry is None:
            for name in [c for c in self._recent if client in (None, c)]:
                del self._recent[name]
        if client is None and entry is None:
            self._sessions.clear()
            self.totals = Totals()
        return before - self._lines()

    def _lines(self) -> int:
        return sum(
            len({s.model for s in followers.tallies} - {""})
            for (_, steps), followers in self._followers.items()
            if len(steps) == 1 and not steps[0].prefix
        )

    # To storage and back: workflow_state.py gives these a form

    @property
    def followers(self) -> OrderedDict[Context, Followers]:
        return self._followers


def entry_id(client: str, model: str, next_model: str) -> str:
    """The id of a line: the same in every process."""
    return hashlib.sha256("\0".join((client, model, next_model)).encode()).hexdigest()[:8]


def _contexts(client: str, steps: tuple[Step, ...]) -> list[Context]:
    """What a next step is counted under: the longest first; then the models alone."""
    alone = tuple(Step(step.model) for step in steps)
    made = [steps[-2:], steps[-1:], alone[-2:], alone[-1:]] if steps else []
    return [(client, one) for one in dict.fromkeys(made)]


def _by_model(followers: Followers, faded: float) -> dict[str, float]:
    weights: dict[str, float] = {}
    for step, tally in followers.tallies.items():
        weights[step.model] = weights.get(step.model, 0.0) + tally.weight * faded
    return weights


def _faded(age_s: float, settings: Settings) -> float:
    return float(0.5 ** (max(age_s, 0.0) / settings.workflow_half_life_s))

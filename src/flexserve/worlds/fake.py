"""A world without secrets: the fake engine behind the whole `World` protocol, in this process.

A public test double, for our server and contract tests and for whoever writes a client: it queues, cancels,
crashes and accounts memory like a real world, and protects nothing. Its "sealed models" are small JSON files
(`write_fake_model`); a real sealed model is refused, so that nobody takes one for the other.

It knows nothing of HTTP, keys and sealed files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core import (
    Budget,
    Event,
    Finished,
    ModelInfo,
    ModelStatus,
    Request,
    Workflow,
    WorkflowReport,
    WorldStatus,
)
from ..engine.fake import FakeEngine
from ..errors import (
    Busy,
    EngineFailure,
    FlexServeError,
    InvalidRequest,
    LicenceMalformed,
    LicenceWrongDevice,
    LicenceWrongModel,
    ModelNotFound,
    ModelUnsupported,
    NotFound,
    SealedMalformed,
    SegmentNotAuthentic,
    VendorNotTrusted,
    WorldCrashed,
)
from ..framework import events as ev
from ..framework import trace
from ..framework.settings import Settings
from ..framework.workflows import Step, WorkflowLog
from .base import RECALL_DEADLINE_S, ModelSource, Recalled, check_workflow

DEVICE = "this device"
VENDOR = "trusted vendor"
TRACE_LINES = 1024
WORKFLOW_SETTINGS = Settings()
BUDGET = Budget(1 << 30, 2 << 30, 0, 0)
NO_LEAST: Mapping[str, int] = MappingProxyType({})


def write_fake_model(
    directory: Path,
    name: str,
    *,
    context_tokens: int = 4096,
    weight_bytes: int = 8 << 20,
    vendor: str = VENDOR,
    device: str = DEVICE,
    licensed_model: str | None = None,
) -> ModelSource:
    """Write NAME.flex and NAME.lic as `FakeWorld` reads them, and say where they are."""
    sealed, licence = directory / f"{name}.flex", directory / f"{name}.lic"
    model = {
        "fake": "model",
        "id": name,
        "version": 1,
        "vendor": vendor,
        "context_tokens": context_tokens,
        "weight_bytes": weight_bytes,
    }
    sealed.write_text(json.dumps(model))
    licence.write_text(json.dumps({"fake": "licence", "id": licensed_model or name, "device": device}))
    return ModelSource(name, sealed, licence)


@dataclasses.dataclass
class _Model:
    info: ModelInfo
    resident_bytes: int = 0
    poisoned: bool = False
    requests: int = 0
    last_used: float | None = None


class FakeGeneration:
    """One answer in progress (`worlds.base.Generation`)."""

    def __init__(self, request: Request, accepted_s: float) -> None:
        self.request = request
        self.accepted_s = accepted_s
        self.wake = threading.Event()  # set: stop computing
        self.ended = False  # the consumer's last item is in the queue
        self._items: queue.SimpleQueue[Event | FlexServeError] = queue.SimpleQueue()
        self._consumed = False

    def __iter__(self) -> FakeGeneration:
        return self

    def __next__(self) -> Event:
        if self._consumed:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, FlexServeError):
            self._consumed = True
            raise item
        if isinstance(item, Finished):
            self._consumed = True
        return item

    def cancel(self) -> None:
        self.wake.set()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to stop."""
        return self.wake.is_set()

    def push(self, item: Event | FlexServeError) -> None:
        if not self.ended:
            self.ended = not isinstance(item, Event) or isinstance(item, Finished)
            self._items.put(item)


@dataclasses.dataclass(frozen=True)
class FakeRecalling:
    """A recall (`worlds.base.Recalling`): what was chosen is back already."""

    asked_bytes: int
    chosen_bytes: int
    later_bytes: int = 0
    answered_s: float = 0.0

    def wait(self, timeout_s: float | None = None) -> Recalled:
        return Recalled(self.chosen_bytes, self.answered_s, self.answered_s)


class FakeWorld:
    """`worlds.base.World` over a `FakeEngine`. One answer is computed at a time, the others queue."""

    name = "fake"

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        max_waiting: int = 64,
        budget: Budget = BUDGET,
        least_bytes: Mapping[str, int] = NO_LEAST,
    ) -> None:
        """`least_bytes`: of models, what is said to be the smallest budget with which they answer."""
        self.engine = engine or FakeEngine()
        self.max_waiting = max_waiting
        self._clock = self.engine.clock
        self._models: dict[str, _Model] = {}
        self._changed = threading.Condition()
        self._waiting: deque[FakeGeneration] = deque()
        self._active: FakeGeneration | None = None
        self._restarts = 0
        self._started_s = 0.0
        self._worker: threading.Thread | None = None
        self._closed = False
        self._budget = budget  # what is held is counted when somebody asks
        self._least_bytes = least_bytes
        self._trace: deque[tuple[int, str]] = deque(maxlen=TRACE_LINES)
        self._events = 0
        self._workflows = WorkflowLog()

    def start(self) -> None:
        with self._changed:
            if self._worker is None and not self._closed:
                self._started_s = self._clock.now()
                self._worker = threading.Thread(target=self._work, name="fake-world", daemon=True)
                self._worker.start()

    def register(self, source: ModelSource) -> ModelInfo:
        self._check_running()
        if source.adapter is not None:
            raise ModelUnsupported("the fake world applies no adapter")
        model = _read_json(source.sealed, "model", SealedMalformed)
        if model["vendor"] != VENDOR:
            raise VendorNotTrusted(f"{source.sealed} is signed by {model['vendor']!r}")
        licence = _read_json(source.licence, "licence", LicenceMalformed)
        if licence["id"] != model["id"]:
            raise LicenceWrongModel(f"{source.licence} is for {licence['id']!r}, not {model['id']!r}")
        if licence["device"] != DEVICE:
            raise LicenceWrongDevice(f"{source.licence} is for {licence['device']!r}, not {DEVICE!r}")
        info = ModelInfo(
            name=source.name,
            model_id=model["id"],
            model_version=model["version"],
            architecture="fake",
            quantization="none",
            parameters=model["weight_bytes"],
            context_tokens=model["context_tokens"],
            weight_bytes=model["weight_bytes"],
            has_chat_template=True,
        )
        with self._changed:
            self._models[source.name] = _Model(info)
        return info

    def generate(self, request: Request) -> FakeGeneration:
        with self._changed:
            self._check_running()
            if request.model not in self._models:
                raise ModelNotFound(f"no model {request.model!r} is registered")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting already")
            generation = FakeGeneration(request, self._clock.now())
            self._workflows.step(
                self._clock.now(), request.client or "", Step(request.model), WORKFLOW_SETTINGS
            )
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    def recall(self, nbytes: int, *, deadline_s: float = RECALL_DEADLINE_S) -> FakeRecalling:
        _check_bytes(nbytes)
        with self._changed:
            self._check_running()
            began = self._clock.now()
            held = self._held()
            soft = max(self._budget.floor_bytes, min(self._budget.soft_bytes, held - nbytes))
            self._budget = dataclasses.replace(self._budget, soft_bytes=soft)
            self._note(ev.PressureRecall(self._events + 1, nbytes, deadline_s))
            given = self._shrink(min(nbytes, max(held - self._budget.floor_bytes, 0)))
            return FakeRecalling(nbytes, given, answered_s=self._clock.now() - began)

    def offer(self, nbytes: int) -> None:
        _check_bytes(nbytes)
        with self._changed:
            self._check_running()
            soft = min(self._budget.soft_bytes + nbytes, self._budget.hard_bytes)
            wanted = max(self._budget.wanted_bytes - nbytes, 0)
            self._budget = dataclasses.replace(self._budget, soft_bytes=soft, wanted_bytes=wanted)
            self._note(ev.Offer(nbytes))

    def budget(
        self, soft_bytes: int | None = None, hard_bytes: int | None = None, floor_bytes: int | None = None
    ) -> Budget:
        with self._changed:
            self._check_running()
            hard = self._budget.hard_bytes if hard_bytes is None else hard_bytes
            floor = self._budget.floor_bytes if floor_bytes is None else floor_bytes
            soft = self._budget.soft_bytes if soft_bytes is None else soft_bytes
            _check_bytes(min(hard, floor, soft))
            if floor > hard:
                raise InvalidRequest(f"the floor of {floor} bytes is above the hard cap of {hard} bytes")
            soft = max(floor, min(soft, hard))
            self._budget = Budget(soft, hard, floor, 0, self._budget.wanted_bytes)
            if (soft_bytes, hard_bytes, floor_bytes) != (None, None, None):
                self._note(ev.BudgetSet(soft_bytes, hard_bytes, floor_bytes))
            self._shrink(self._held() - soft)
            return dataclasses.replace(self._budget, held_bytes=self._held())

    def trace(self, after: int = 0) -> list[str]:
        with self._changed:
            self._check_running()
            return [line for number, line in self._trace if number > after]

    def workflows(self) -> WorkflowReport:
        """Learned as in every world; nothing is fetched here."""
        with self._changed:
            self._check_running()
            entries = self._workflows.entries(self._clock.now(), WORKFLOW_SETTINGS)
        return WorkflowReport(
            prefetch=False,
            workflows=tuple(
                Workflow(
                    e.id,
                    e.client,
                    e.steps,
                    e.next_model,
                    e.seen,
                    e.confidence,
                    0,
                    0,
                    0,
                    0.0,
                    e.age_s,
                    e.declared,
                )
                for e in entries
            ),
        )

    def declare_workflow(self, client: str | None, name: str, models: Sequence[str]) -> None:
        check_workflow(client, name, models)
        with self._changed:
            self._check_running()
            self._workflows.declare(self._clock.now(), client or "", name, models, WORKFLOW_SETTINGS)

    def forget_workflows(
        self, client: str | None = None, *, anonymous: bool = False, workflow: str | None = None
    ) -> int:
        with self._changed:
            self._check_running()
            gone = self._workflows.forget("" if anonymous else client, workflow)
        if workflow is not None and not gone:
            raise NotFound(f"no workflow has the id {workflow!r}", hint="`flexserve workflows` lists them")
        return gone

    def status(self) -> WorldStatus:
        with self._changed:
            self._check_running()
            now = self._clock.now()
            return WorldStatus(
                world=self.name,
                pid=os.getpid(),
                uptime_s=now - self._started_s,
                active_requests=int(self._active is not None),
                waiting_requests=len(self._waiting),
                restarts=self._restarts,
                flexmem="none: fake world",
                models=tuple(
                    ModelStatus(
                        info=m.info,
                        resident_bytes=m.resident_bytes,
                        lazy_bytes=0,
                        kv_bytes=0,
                        poisoned=m.poisoned,
                        requests=m.requests,
                        last_used_s_ago=None if m.last_used is None else now - m.last_used,
                        prefix_bytes=m.resident_bytes,
                        least_bytes=self._least_bytes.get(m.info.name, 0),
                    )
                    for m in self._models.values()
                ),
                budget=dataclasses.replace(self._budget, held_bytes=self._held()),
            )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._end_all("the world was closed")
            self._changed.notify_all()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    # What only a fake can do.

    def crash(self) -> None:
        """End as a secure world that died: answers in flight and waiting fail, models stay registered."""
        with self._changed:
            self._check_running()
            self._restarts += 1
            self._end_all("the secure world ended unexpectedly")
            for model in self._models.values():
                model.resident_bytes = 0

    def poison(self, name: str) -> None:
        """As if a segment of this model had failed authentication."""
        with self._changed:
            self._models[name].poisoned = True

    def in_flight(self) -> list[FakeGeneration]:
        """The answer being computed, then those waiting."""
        with self._changed:
            return ([self._active] if self._active else []) + list(self._waiting)

    # Inside.

    def _held(self) -> int:
        return sum(model.resident_bytes for model in self._models.values())

    def _shrink(self, nbytes: int) -> int:
        given = 0
        for model in self._models.values():
            taken = max(min(model.resident_bytes, nbytes - given), 0)
            model.resident_bytes -= taken
            given += taken
        return given

    def _note(self, event: ev.Event) -> None:
        self._events += 1
        for line in trace.lines(self._events, self._clock.now(), event, ()):
            self._trace.append((self._events, line))

    def _check_running(self) -> None:
        if self._closed:
            raise WorldCrashed("the world is closed", hint="")
        if self._worker is None:
            raise EngineFailure("the world was not started")

    def _end_all(self, why: str) -> None:
        for generation in ([self._active] if self._active else []) + list(self._waiting):
            generation.push(WorldCrashed(why))
            generation.wake.set()
        self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                generation = self._active = self._waiting.popleft()
                model = self._models[generation.request.model]
                missing = model.info.weight_bytes - model.resident_bytes
            try:
                self._answer(generation, model, missing)
            except FlexServeError as error:
                generation.push(error)
            except Exception as error:  # a bug of ours must not leave the client waiting
                generation.push(EngineFailure(f"the fake engine failed: {type(error).__name__}"))
            with self._changed:
                self._active = None

    def _answer(self, generation: FakeGeneration, model: _Model, missing: int) -> None:
        if model.poisoned:
            raise SegmentNotAuthentic(f"a segment of {model.info.name!r} failed authentication")
        with self._changed:
            room = self._budget.soft_bytes - self._held()
            model.resident_bytes += max(min(missing, room), 0)
        events = self.engine.answer(
            generation.request,
            context_tokens=model.info.context_tokens,
            wake=generation.wake,
            accepted_s=generation.accepted_s,
        )
        for event in events:
            if generation.ended:  # crashed meanwhile
                return
            if isinstance(event, Finished):
                with self._changed:
                    model.requests += 1
                    model.last_used = self._clock.now()
                event = dataclasses.replace(  # noqa: PLW2901
                    event, timings=dataclasses.replace(event.timings, load_bytes=missing)
                )
            generation.push(event)


def _check_bytes(nbytes: int) -> None:
    if nbytes < 0:
        raise InvalidRequest(f"a number of bytes must not be negative, and this one is {nbytes}")


def _read_json(path: Path, kind: str, malformed: type[FlexServeError]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("fake") != kind:
        raise malformed(f"{path} is not a fake {kind}, and the fake world knows no other")
    return data

"""What the normal side may ask about workflows, inside the secure process.

Between messages and the Framework's log: digests in, reports out. Knows no files; what the log is sealed with is in
workflow_seal.py.
"""

from __future__ import annotations

import time

from ...core import Workflow, WorkflowReport
from ...errors import FlexServeError, NotFound, SessionRefused
from ...framework import events as ev
from ...framework.workflows import Entry, Totals
from ...sealed.keys import DeviceKey
from .channel import (
    DeclareWorkflow,
    Failed,
    ForgetWorkflows,
    OfferWorkflows,
    SaveWorkflows,
    Workflows,
    WorkflowsForgotten,
    WorkflowsOffered,
    WorkflowsReported,
    WorkflowsSaved,
    failed,
)
from .runner import Runner
from .workflow_seal import Digests, open_log, seal_log

Message = OfferWorkflows | SaveWorkflows | Workflows | DeclareWorkflow | ForgetWorkflows
Answer = WorkflowsOffered | WorkflowsSaved | WorkflowsReported | WorkflowsForgotten | Failed


class WorkflowCalls:
    """Called on the main thread."""

    def __init__(self, runner: Runner, device: DeviceKey, digests: Digests) -> None:
        self._runner = runner
        self._device = device
        self._digests = digests
        self._note = ""
        self._saved: object = None  # as it was sealed last

    def answer(self, message: Message) -> Answer:
        """Act on a message."""
        try:
            match message:
                case OfferWorkflows(call, data):
                    return WorkflowsOffered(call, self._load(data))
                case SaveWorkflows(call):
                    return WorkflowsSaved(call, self._save())
                case Workflows(call):
                    return WorkflowsReported(call, self._report())
                case DeclareWorkflow(call, client, name, models):
                    event = ev.WorkflowDeclared(self._digests.client(client), name, tuple(models))
                    self._runner.post(event)
                    return WorkflowsForgotten(call, 0)
                case ForgetWorkflows(call):
                    return WorkflowsForgotten(call, self._forget(message))
        except FlexServeError as error:
            return failed(error, call=message.call)

    def _load(self, data: bytes) -> str:
        """Go on with a log; the reason why not, said once and then in every report."""
        try:
            log, age_s = open_log(data, self._device, time.time())
            try:
                self._runner.ask(lambda framework: framework.load_workflows(log, age_s))
            except ValueError as error:
                raise SessionRefused(str(error)) from None
        except SessionRefused as error:
            self._note = f"{error.message}: it begins empty"
        else:
            self._note = ""
            self._saved = self._runner.ask(lambda framework: framework.workflow_changes)
        return self._note

    def _save(self) -> bytes | None:
        """None: it is as it was."""
        count = self._runner.ask(lambda framework: framework.workflow_changes)
        if count == self._saved:
            return None
        data = seal_log(
            self._runner.ask(lambda framework: framework.dump_workflows()), self._device, time.time()
        )
        self._saved = count
        return data

    def _report(self) -> WorkflowReport:
        totals, entries = self._entries()
        return WorkflowReport(
            prefetch=self._runner.ask(lambda framework: framework.settings.prefetch),
            note=self._note,
            predictions=totals.predictions,
            hits=totals.hits,
            prefetched_bytes=totals.nbytes,
            wasted_bytes=totals.wasted,
            saved_s=totals.saved_s,
            workflows=tuple(map(_workflow, entries)),
        )

    def _entries(self) -> tuple[Totals, list[Entry]]:
        self._runner.settle()
        return self._runner.ask(lambda framework: framework.workflows())

    def _forget(self, message: ForgetWorkflows) -> int:
        client = None if message.client is None else self._digests.client(message.client)
        if message.anonymous:
            client = ""
        before = len(self._entries()[1])
        self._runner.post(ev.WorkflowsForgotten(client, message.id))
        gone = before - len(self._entries()[1])
        if message.id is not None and not gone:
            raise NotFound(f"no workflow has the id {message.id!r}", hint="`flexserve workflows` lists them")
        return gone


def _workflow(entry: Entry) -> Workflow:
    return Workflow(
        id=entry.id,
        client=entry.client,
        steps=entry.steps,
        next_model=entry.next_model,
        seen=entry.seen,
        confidence=entry.confidence,
        predictions=entry.predictions,
        hits=entry.hits,
        prefetched_bytes=entry.nbytes,
        saved_s=entry.saved_s,
        last_s_ago=entry.age_s,
        declared=entry.declared,
    )

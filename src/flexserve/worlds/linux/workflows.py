"""Workflows as the normal side knows them: calls to the secure process, and a file that only it can read.

Knows names that clients give and one opaque file; what a client does, the secure world knows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...core import WorkflowReport
from ..base import check_workflow
from .channel import (
    MAX_WORKFLOW_BYTES,
    DeclareWorkflow,
    ForgetWorkflows,
    OfferWorkflows,
    SaveWorkflows,
    Workflows,
    WorkflowsForgotten,
    WorkflowsOffered,
    WorkflowsReported,
    WorkflowsSaved,
)

FILE = "workflows.flexlog"
SAVE_PERIOD_S = 30.0

log = logging.getLogger("flexserve.workflows")


class WorkflowMethods:
    """The part of `worlds.base.World` about workflows, by calls."""

    _call: Callable[..., Any]

    def workflows(self) -> WorkflowReport:
        report: WorkflowReport = self._call(WorkflowsReported, Workflows).report
        return report

    def declare_workflow(self, client: str | None, name: str, models: Sequence[str]) -> None:
        check_workflow(client, name, models)
        self._call(WorkflowsForgotten, lambda call: DeclareWorkflow(call, client, name, list(models)))

    def forget_workflows(
        self, client: str | None = None, *, anonymous: bool = False, workflow: str | None = None
    ) -> int:
        answer = self._call(
            WorkflowsForgotten, lambda call: ForgetWorkflows(call, client, anonymous, workflow)
        )
        return int(answer.count)


class WorkflowKeeper:
    """Keeps the secure world's log from one process to the next."""

    def __init__(self, directory: Callable[[], Path], call: Callable[..., Any]) -> None:
        """`directory`: where it is now; it may become another user's. `call`: as for `SessionKeeper`."""
        self._directory = directory
        self._call = call
        self._saved_at = time.monotonic()

    def offer(self, process: object) -> None:
        """Tell a fresh process of the log. Raises `WorldCrashed`."""
        data = self._read()
        if data is None:
            return
        answer = self._call(WorkflowsOffered, lambda call: OfferWorkflows(call, data), (), process)
        if answer.why:
            log.warning("%s", answer.why)

    def save(self, *, now: bool) -> None:
        """Write it if it has changed, and not too often unless `now`. Raises `WorldCrashed`; what the disk has no room
        for is learned again."""
        if not now and time.monotonic() - self._saved_at < SAVE_PERIOD_S:
            return
        self._saved_at = time.monotonic()
        data = self._call(WorkflowsSaved, SaveWorkflows, ()).data
        if data is not None:
            self._write(data)

    def _read(self) -> bytes | None:
        try:
            fd = os.open(self._directory() / FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            try:
                return file.read(MAX_WORKFLOW_BYTES)
            except OSError:  # a directory
                return None

    def _write(self, data: bytes) -> None:
        path = self._directory() / FILE
        part = path.with_name(f".{FILE}.part")
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

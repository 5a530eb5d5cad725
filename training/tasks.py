"""The demo models, by name."""

from __future__ import annotations

from . import assistant, guard, rewriter, router
from .task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (assistant.TASK, router.TASK, rewriter.TASK, guard.TASK)
}

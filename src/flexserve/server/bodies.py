"""What crosses the admin socket about memory and workflows, for both of its ends. Knows no HTTP."""

from __future__ import annotations

import msgspec

from ..core import Budget
from ..worlds.base import RECALL_DEADLINE_S


class RecallBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/recall. `size_bytes` None: everything."""

    size_bytes: int | None = None
    deadline_s: float = RECALL_DEADLINE_S


class RecallAnswer(msgspec.Struct):
    """Seconds since the call. `asked_bytes` None: everything was asked for. `budget` afterwards; None: the
    world has none."""

    asked_bytes: int | None
    chosen_bytes: int
    later_bytes: int
    freed_bytes: int
    answered_s: float
    first_byte_s: float
    done_s: float
    budget: Budget | None


class BudgetBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/budget. What is None stays as it is."""

    soft_bytes: int | None = None
    hard_bytes: int | None = None
    floor_bytes: int | None = None


class Trace(msgspec.Struct):
    """GET /admin/trace. After another restart the numbers of events begin anew."""

    restarts: int
    lines: list[str]


class WorkflowBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /flexserve/v1/workflows. `steps`: models in the order in which they are asked."""

    name: str
    steps: list[str]
    client: str | None = None


class WorkflowDeclared(msgspec.Struct):
    """The answer: what was declared."""

    object: str
    name: str
    steps: list[str]
    client: str | None


class ForgetBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /admin/workflows/forget. Exactly one of them is given."""

    id: str | None = None
    client: str | None = None
    anonymous: bool = False
    all: bool = False


class Forgotten(msgspec.Struct):
    """The answer: how many workflows are forgotten."""

    forgotten: int

"""What the secure process says about memory when it is asked: limits, and everything that `flexserve ps` shows.

Knows the runner's view and the models' own counts; decides nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from ...core import Budget, WorldStatus
from ...errors import InvalidRequest
from ...framework import events as ev
from .channel import BudgetReported, Failed, SetBudget, failed
from .runner import Runner


def set_budget(runner: Runner, message: SetBudget) -> BudgetReported | Failed:
    """Set the limits that are given, and say what holds."""
    runner.settle()
    now = runner.budget()
    hard = now.hard_bytes if message.hard_bytes is None else message.hard_bytes
    floor = now.floor_bytes if message.floor_bytes is None else message.floor_bytes
    if min(hard, floor, message.soft_bytes or 0) < 0:
        return failed(InvalidRequest("a limit is below zero"), call=message.call)
    if floor > hard:
        error = InvalidRequest(
            f"the floor of {floor} bytes is above the hard cap of {hard} bytes",
            hint="lower the floor or raise the cap; both can be set in one call",
        )
        return failed(error, call=message.call)
    if (message.soft_bytes, message.hard_bytes, message.floor_bytes) != (None, None, None):
        runner.post(ev.BudgetSet(message.soft_bytes, message.hard_bytes, message.floor_bytes))
        runner.settle()
    return BudgetReported(message.call, runner.budget())


def status(runner: Runner, names: Iterable[str], *, uptime_s: float, flexmem: str) -> WorldStatus:
    """`names`: of the models, the Framework's."""
    runner.settle()
    view = runner.view()
    views = {one.model: one for one in view.models}
    models = []
    known = runner.models()
    for name in names:
        model = known.get(name)
        if model is None:
            continue
        one = model.status()
        if (seen := views.get(name)) is not None:
            one = dataclasses.replace(
                one,
                prefix_bytes=seen.prefix,
                budget_bytes=seen.budget,
                streamed_bytes=seen.streamed,
                least_bytes=seen.least,
                pinned=seen.pinned,
            )
        models.append(one)
    return WorldStatus(
        world="linux",
        pid=os.getpid(),
        uptime_s=uptime_s,
        active_requests=view.active,
        waiting_requests=view.queued,
        restarts=0,  # the supervisor knows
        flexmem=flexmem,
        models=tuple(models),
        budget=Budget(view.budget, view.cap, view.floor, view.held, view.wanted),
        prefetch=runner.ask(lambda framework: framework.settings.prefetch),
    )

"""What only the admin socket answers: `ps`, `list`, the verbs about memory and workflows.

The socket's permissions are its authentication.

Knows HTTP bodies and the gateway; the memory itself is the world's.
"""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from ..core import MAX_CLIENT_CHARS, Budget, WorldStatus
from ..errors import InvalidRequest
from .bodies import BudgetBody, ForgetBody, Forgotten, RecallAnswer, RecallBody, Trace
from .gateway import Gateway
from .posted import Posted, json_response

MAX_BYTES = 1 << 60  # more than any machine has: "all"
MAX_DEADLINE_S = 600.0


def admin_routes(gateway: Gateway) -> list[Route]:
    """Beside the API's own."""

    async def ps(_: HttpRequest) -> Response:
        return json_response(await gateway.status())

    async def list_models(_: HttpRequest) -> Response:
        return json_response({"models": [info for info, _ in gateway.models.values()]})

    async def trace(request: HttpRequest) -> Response:
        after = request.query_params.get("after", "0")
        if not after.isdigit() or len(after) > 18:
            raise InvalidRequest("after must be the number of an event")
        restarts = (await gateway.status()).restarts
        return json_response(Trace(restarts, await gateway.trace(int(after))))

    async def recall(wanted: RecallBody) -> RecallAnswer:
        size = MAX_BYTES if wanted.size_bytes is None else wanted.size_bytes
        _check_size("size_bytes", size)
        if not 0 < wanted.deadline_s <= MAX_DEADLINE_S:
            raise InvalidRequest(f"deadline_s must be above 0 and at most {MAX_DEADLINE_S:.0f}")
        recalling, recalled = await gateway.recall(size, wanted.deadline_s)
        return RecallAnswer(
            asked_bytes=wanted.size_bytes,
            chosen_bytes=recalling.chosen_bytes,
            later_bytes=recalling.later_bytes,
            freed_bytes=recalled.freed_bytes,
            answered_s=recalling.answered_s,
            first_byte_s=recalled.first_byte_s,
            done_s=recalled.done_s,
            budget=(await gateway.status()).budget,
        )

    async def budget(wanted: BudgetBody) -> Budget:
        for name in wanted.__struct_fields__:
            if (size := getattr(wanted, name)) is not None:
                _check_size(name, size)
        if (wanted.soft_bytes, wanted.hard_bytes) != (None, None):
            check_answers(wanted, await gateway.status())
        return await gateway.budget(wanted.soft_bytes, wanted.hard_bytes, wanted.floor_bytes)

    async def workflows(_: HttpRequest) -> Response:
        return json_response(await gateway.workflows())

    async def forget(wanted: ForgetBody) -> Forgotten:
        given = (wanted.id is not None, wanted.client is not None, wanted.anonymous, wanted.all)
        if sum(given) != 1:
            raise InvalidRequest("exactly one of id, client, anonymous and all must be given")
        for name in ("id", "client"):
            value = getattr(wanted, name)
            if value is not None and not 1 <= len(value) <= MAX_CLIENT_CHARS:
                raise InvalidRequest(f"{name} must be 1 to {MAX_CLIENT_CHARS} characters")
        return Forgotten(
            await gateway.forget_workflows(wanted.client, anonymous=wanted.anonymous, workflow=wanted.id)
        )

    return [
        Route("/admin/ps", ps, methods=["GET"]),
        Route("/admin/list", list_models, methods=["GET"]),
        Route("/admin/trace", trace, methods=["GET"]),
        Route("/admin/workflows", workflows, methods=["GET"]),
        Route("/admin/workflows/forget", Posted(ForgetBody, forget), methods=["POST"]),
        Route("/admin/recall", Posted(RecallBody, recall), methods=["POST"]),
        Route("/admin/budget", Posted(BudgetBody, budget), methods=["POST"]),
    ]


def check_answers(wanted: BudgetBody, status: WorldStatus) -> None:
    """A budget with which no model answers is a mistake: every request would wait in vain. A recall takes as much, and
    the memory manager gives it back to whoever asks. Raises `InvalidRequest`."""
    answering = [model for model in status.models if not model.poisoned]
    if not answering:
        return
    easiest = min(answering, key=lambda model: model.least_bytes)
    floor = wanted.floor_bytes
    if floor is None:
        floor = status.budget.floor_bytes if status.budget is not None else 0
    size = max(floor, min(size for size in (wanted.soft_bytes, wanted.hard_bytes) if size is not None))
    if size < easiest.least_bytes:
        raise InvalidRequest(
            f"with a budget of {size} bytes no model answers: {easiest.info.name!r} needs the least, "
            f"{easiest.least_bytes} bytes (keys and values, and a window of its weights)",
            hint="set at least that; `flexserve recall all` takes memory back for now",
        )


def _check_size(name: str, value: int) -> None:
    if not 0 <= value <= MAX_BYTES:
        raise InvalidRequest(f"{name} must be 0 to {MAX_BYTES}")

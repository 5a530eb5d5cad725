"""Hints and declared workflows over HTTP: honoured, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexserve.engine.fake import FakeEngine
from flexserve.server.bodies import ForgetBody, WorkflowBody
from flexserve.server.client import ServerClient
from flexserve.worlds.fake import FakeWorld, write_fake_model

from ..schemas import validate
from .conftest import Post
from .running import SCRIPTS, Running, serving

DECLARE = "/flexserve/v1/workflows"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A server of its own with two models."""
    with serving(tmp_path, FakeWorld(FakeEngine(SCRIPTS))) as made:
        made.gateway.register(write_fake_model(tmp_path, "other"))
        yield made


def ask(client: httpx.Client, model: str, **more: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "greet", **more})


def workflows(running: Running) -> list[dict[str, Any]]:
    with running.admin_client() as admin:
        answer = admin.get("/admin/workflows").json()
    validate("workflows", answer)
    found: list[dict[str, Any]] = answer["workflows"]
    return found


def test_what_a_client_asks_in_a_row_is_listed_under_its_name(running: Running) -> None:
    with running.client() as client:
        for _ in range(3):
            for model in ("demo", "other"):
                answer = ask(
                    client, model, flexserve={"client": "planner", "next_model": "other", "priority": 1}
                )
                assert answer.status_code == 200, answer.text
    seen = {(w["client"], *w["steps"], w["next_model"]): w["seen"] for w in workflows(running)}
    assert seen == {("planner", "demo", "other"): 3, ("planner", "other", "demo"): 2}


def test_openais_user_tells_clients_apart_too_and_is_never_wrong(running: Running) -> None:
    with running.client() as client:
        for user in ("ann", "ann", 7, {"a": 1}, "x" * 500, "line\nbreak", None):
            assert ask(client, "demo", user=user).status_code == 200
        assert ask(client, "other", user="ann", flexserve={"client": "bob"}).status_code == 200
    listed = {(w["client"], w["next_model"]): w["seen"] for w in workflows(running)}
    assert listed == {("ann", "demo"): 1, ("", "demo"): 4}


@pytest.mark.parametrize(
    ("hints", "says"),
    [
        ({"client": ""}, "client must be 1 to 128 printable characters"),
        ({"client": "a\nb"}, "client must be 1 to 128 printable characters"),
        ({"client": "x" * 129}, "client must be 1 to 128 printable characters"),
        ({"client": 7}, "flexserve.client"),
        ({"next_model": ""}, "next_model must be 1 to 128 characters"),
        ({"priority": 3}, "priority must be -2 to 2"),
        ({"priority": 1 << 70}, "priority must be -2 to 2"),
        ({"priority": "high"}, "flexserve.priority"),
        ({"nxt_model": "demo"}, "nxt_model"),
        ([], "flexserve"),
        ("demo", "flexserve"),
    ],
)
def test_a_hint_that_is_none_is_refused_by_name(complete: Post, chat: Post, hints: Any, says: str) -> None:
    for answer in (complete(flexserve=hints), chat(flexserve=hints)):
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
        validate("error", answer.json())


def test_a_next_model_that_nobody_answers_is_said_at_once(complete: Post) -> None:
    answer = complete(flexserve={"next_model": "absent"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert complete(flexserve=None).status_code == 200


def test_a_declared_workflow_is_listed_before_it_happened(running: Running) -> None:
    body = {"name": "trip", "steps": ["demo", "other"], "client": "planner"}
    with running.client() as client:
        answer = client.post(DECLARE, json=body)
        assert answer.status_code == 200
        assert answer.json() == {"object": "flexserve.workflow", **body}
    (listed,) = workflows(running)
    assert (listed["declared"], listed["steps"], listed["next_model"]) == ("trip", ["demo"], "other")
    assert listed["seen"] == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ([], 400),
        ({"name": "w", "steps": ["demo"]}, 400),
        ({"name": "w", "steps": ["demo"] * 17}, 400),
        ({"name": "", "steps": ["demo", "demo"]}, 400),
        ({"name": "w\x00", "steps": ["demo", "demo"]}, 400),
        ({"name": "what I asked", "steps": ["demo", "demo"]}, 400),
        ({"name": "w", "steps": ["demo", 7]}, 400),
        ({"name": "w", "steps": ["demo", "demo"], "more": 1}, 400),
        ({"name": "w", "steps": ["demo", "demo"], "client": "\t"}, 400),
        ({"name": "w", "steps": ["demo", "absent"]}, 404),
        ({"name": "w", "steps": ["demo", "x" * 20_000]}, 413),
    ],
)
def test_a_workflow_that_is_none_is_refused(client: httpx.Client, body: Any, status: int) -> None:
    answer = client.post(DECLARE, json=body)
    assert answer.status_code == status
    validate("error", answer.json())
    assert client.get(DECLARE).status_code == 405


def test_forgetting_needs_exactly_one_thing_to_forget(running: Running) -> None:
    with running.client() as client:
        for model in ("demo", "other", "demo"):
            ask(client, model)
            ask(client, model, flexserve={"client": "planner"})
    server = ServerClient(running.admin)
    assert len(server.workflows().workflows) == 4
    with running.admin_client() as admin:
        for body in (
            {},
            {"id": "x", "all": True},
            {"client": "a", "anonymous": True},
            {"client": ""},
            {"more": 1},
        ):
            assert admin.post("/admin/workflows/forget", json=body).status_code == 400
        assert admin.post("/admin/workflows/forget", json={"id": "absent"}).status_code == 404
    assert server.forget_workflows(ForgetBody(client="planner")) == 2
    assert server.forget_workflows(ForgetBody(id=server.workflows().workflows[0].id)) == 1
    assert server.forget_workflows(ForgetBody(anonymous=True)) == 1
    assert server.declare_workflow(WorkflowBody("w", ["demo", "other"])).client is None
    assert server.forget_workflows(ForgetBody(all=True)) == 1
    assert server.workflows().workflows == ()


def test_workflows_are_listed_and_forgotten_on_the_admin_socket_only(client: httpx.Client) -> None:
    assert client.get("/admin/workflows").status_code == 404
    assert client.post("/admin/workflows/forget", json={"all": True}).status_code == 404

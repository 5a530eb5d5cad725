"""What the server sends follows docs/schemas, and the schemas follow core.py."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator, ValidationError

from flexserve.core import (
    FinishReason,
    ModelInfo,
    ModelStatus,
    Timings,
    Workflow,
    WorkflowReport,
    WorldStatus,
)

from ..schemas import SCHEMAS, schema, validate
from .conftest import Post
from .running import Running

ANSWERS = ["completion", "completion-chunk", "chat-completion", "chat-completion-chunk"]
MEMORY = ["recall", "budget", "trace", "workflows"]
OURS = ["run", "embed", "embeddings", "list", "ps", *MEMORY, "health", "models", "error", *ANSWERS]
UNITS = ("_s", "_s_ago", "_bytes", "_tokens", "_tokens_per_s")
UNITLESS = {
    # Counts, names of OpenAI's, and versions: the key says what is counted.
    "requests active_requests waiting_requests restarts faults parameters pid model_version created index",
    "sessions saved_sessions",
    "seen confidence predictions hits",
    "n t",  # of the trace: framework/trace.py
}


def numbers(node: Any) -> set[str]:
    """The names of all properties that are numbers."""
    found: set[str] = set()
    if isinstance(node, dict):
        for name, value in node.get("properties", {}).items():
            kinds = value.get("type", [])
            if {"integer", "number"} & {*([kinds] if isinstance(kinds, str) else kinds)}:
                found.add(name)
        for value in node.values():
            found |= numbers(value)
    elif isinstance(node, list):
        for value in node:
            found |= numbers(value)
    return found


@pytest.mark.parametrize("name", OURS)
def test_a_schema_is_valid_and_its_keys_have_units(name: str) -> None:
    Draft202012Validator.check_schema(schema(name))
    unitless = {word for words in UNITLESS for word in words.split()}
    assert not {n for n in numbers(schema(name)) if not n.endswith(UNITS)} - unitless


def test_no_schema_is_without_a_test() -> None:
    others = {"inspect", "verify"}  # tests/cli
    assert {*OURS} | others <= {path.stem for path in SCHEMAS.glob("*.json")}


def test_the_schemas_share_their_definitions_with_core() -> None:
    found: dict[str, Any] = {}
    for name in OURS:
        for key, definition in schema(name).get("$defs", {}).items():
            assert found.setdefault(key, definition) == definition, f"{key} differs in {name}"
    for key, cls in (("timings", Timings), ("model", ModelInfo)):
        assert [*found[key]["properties"]] == [f.name for f in dataclasses.fields(cls)]
    assert found["finish_reason"]["enum"] == [*FinishReason]
    ps = schema("ps")["properties"]
    assert [*ps] == [f.name for f in dataclasses.fields(WorldStatus)]
    workflows = schema("workflows")
    assert [*workflows["properties"]] == [f.name for f in dataclasses.fields(WorkflowReport)]
    assert [*workflows["$defs"]["workflow"]["properties"]] == [f.name for f in dataclasses.fields(Workflow)]
    assert [*ps["models"]["items"]["properties"]] == [f.name for f in dataclasses.fields(ModelStatus)]


def test_what_the_server_sends_follows_the_schemas(client: httpx.Client, chat: Post, complete: Post) -> None:
    chat()
    validate("health", client.get("/health").json())
    validate("models", client.get("/v1/models").json())
    validate("chat-completion", chat().json())
    validate("completion", complete().json())
    for name, post in (("chat-completion-chunk", chat), ("completion-chunk", complete)):
        for options in ({}, {"stream_options": {"include_usage": True}}):
            events = post(stream=True, **options).text.removesuffix("\n\n").split("\n\n")
            assert len(events) > 20
            for event in events[:-1]:
                validate(name, json.loads(event.removeprefix("data: ")))
    for response in (client.get("/nowhere"), chat(n=2), chat("fail early"), client.get("/v1/models/absent")):
        assert response.status_code >= 400
        validate("error", response.json())
    *_, failed = chat("fail late", stream=True).text.removesuffix("\n\n").split("\n\n")
    validate("error", json.loads(failed.removeprefix("data: ")))


def test_what_the_admin_socket_sends_follows_the_schemas(shared: Running) -> None:
    with shared.admin_client() as client:
        validate("list", client.get("/admin/list").json())
        status = client.get("/admin/ps").json()
        validate("ps", status)
        with pytest.raises(ValidationError):
            validate("ps", {**status, "uptime_s": "long"})
        with pytest.raises(ValidationError):
            validate("ps", {**status, "more": 1})

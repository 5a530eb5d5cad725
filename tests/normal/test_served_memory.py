"""Memory of a served model, taken and given through the admin socket: the linux world as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexserve.server.bodies import BudgetBody, RecallBody
from flexserve.server.client import ServerClient

from ..sealed_fixtures import SMALL
from ..served import Served, served
from ..world_fixtures import make_device


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a model of random weights of 2 MB, and no floor below which a recall would leave it alone."""
    directory = tmp_path_factory.mktemp("served")
    device = make_device(directory / "device")
    source, _ = device.add_kit("m", SMALL)
    with served(device, source, _made(directory / "run")) as running:
        ServerClient(running.admin).budget(BudgetBody(floor_bytes=0))
        yield running


def test_a_recall_gives_back_everything_and_the_next_answer_is_the_same(server: Served) -> None:
    client = ServerClient(server.admin)
    before = server.complete("hello").json()["choices"]
    held = client.ps().models[0].resident_bytes
    assert held > 0
    done = client.recall(RecallBody())
    assert done.freed_bytes == done.chosen_bytes >= held
    assert done.answered_s <= done.done_s
    assert done.first_byte_s <= done.done_s
    assert client.ps().models[0].resident_bytes == 0
    # With no budget at all nothing could be computed: the budget is what gives it back.
    client.budget(BudgetBody(soft_bytes=1 << 30))
    assert server.complete("hello").json()["choices"] == before


def test_a_budget_below_the_model_still_answers_and_says_what_it_costs(server: Served) -> None:
    client = ServerClient(server.admin)
    client.budget(BudgetBody(soft_bytes=1 << 30))
    before = server.complete("hello").json()["choices"]
    size = client.ps().models[0].info.weight_bytes
    budget = client.budget(BudgetBody(soft_bytes=size // 2 + (2 << 20)))
    assert budget.soft_bytes < budget.hard_bytes
    assert server.complete("hello").json()["choices"] == before
    assert client.budget(BudgetBody()).held_bytes <= budget.soft_bytes + (3 << 20)


def test_every_decision_is_in_the_trace_with_its_reason(server: Served) -> None:
    client = ServerClient(server.admin)
    client.recall(RecallBody(1 << 20))
    rows = [json.loads(line) for line in client.trace().lines]
    types = {row.get("do", row.get("event", {})).get("type") for row in rows}
    assert {"PressureRecall", "AnswerRecall", "BudgetSet"} <= types
    assert all("why" in row for row in rows if "do" in row)
    newest = rows[-1]["n"]
    assert client.trace(newest).lines == []

"""A process of a running server is killed: what its clients, the other process and the files see of it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from flexserve.server.client import ServerClient
from flexserve.worlds.base import ModelSource

from ..attacker import children
from ..sealed_fixtures import SMALL
from ..served import Served, served
from ..world_fixtures import Device, make_device


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, ModelSource]:
    device = make_device(tmp_path_factory.mktemp("d"))
    return device, device.add_kit("m", SMALL)[0]


@pytest.fixture
def server(model: tuple[Device, ModelSource], tmp_path: Path) -> Iterator[Served]:
    with served(*model, tmp_path) as running:
        yield running


def in_flight(server: Served, count: int) -> None:
    """Wait until so many requests are computed or queued."""
    client = ServerClient(server.admin)
    while True:
        status = client.ps()
        if status.active_requests + status.waiting_requests >= count:
            return


def long_answer(server: Served) -> httpx.Response:
    return server.complete("hello", max_tokens=1900)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_of_the_secure_world_gives_clients_in_flight_one_clear_error(
    server: Served, number: int
) -> None:
    before = server.complete("hello").json()["choices"][0]["text"]
    pid = server.secure_pid
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(long_answer, server) for _ in range(2)]
        in_flight(server, 2)
        os.kill(pid, number)
    for answer in (a.result() for a in answers):
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "world_crashed"
        assert error["hint"] == "send the request again"
        assert answer.headers["retry-after"] == "1"
    after = server.complete("hello")
    assert after.status_code == 200
    assert after.json()["choices"][0]["text"] == before
    status = ServerClient(server.admin).ps()
    assert status.pid != pid
    assert status.restarts == 1
    assert sorted(p.name for p in (server.directory / "work").iterdir()) == ["stderr.txt"]


def test_a_killed_gateway_leaves_no_secure_process_behind(server: Served) -> None:
    assert server.complete("hello").status_code == 200
    ends_with_the_gateway(server)


def test_a_killed_gateway_ends_an_answer_that_is_computed(server: Served) -> None:
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(long_answer, server)
        in_flight(server, 1)
        ends_with_the_gateway(server)
        assert isinstance(answer.exception(), httpx.TransportError)


def ends_with_the_gateway(server: Served) -> None:
    """Kill the gateway and wait for the secure process and the template process to end."""
    pids = [server.secure_pid, *children(server.secure_pid)]
    assert len(pids) >= 2
    descriptors = [os.pidfd_open(pid) for pid in pids]
    server.process.kill()
    for fd in descriptors:
        with closing(os.fdopen(fd)):
            assert select.select([fd], [], [], 30)[0], "it still runs 30 s later"

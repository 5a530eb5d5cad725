"""Clients that go away, crashes, too many at once, and stopping: on real sockets."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from flexserve.engine.fake import FakeEngine, SystemClock
from flexserve.worlds.fake import FakeGeneration, FakeWorld

from .running import Running, serving


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll: the other side of a socket has no event to wait for."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def send(running: Running, *, stream: bool) -> socket.socket:
    """Send a request for a long answer and return the open connection."""
    body = json.dumps({"model": "demo", "prompt": "x", "ignore_eos": True, "stream": stream}).encode()
    sock = socket.create_connection(("127.0.0.1", running.port))
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    sock.sendall(head.encode() + body)
    return sock


def receive(sock: socket.socket, what: bytes) -> None:
    """Read until `what` has come."""
    seen = b""
    while what not in seen:
        more = sock.recv(65536)
        assert more, f"the connection ended after {seen!r}"
        seen += more


def started(running: Running) -> FakeGeneration:
    until(lambda: bool(running.world.in_flight()), "the answer never started")
    return running.world.in_flight()[0]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_stops_its_answer(slow: Running, stream: bool) -> None:
    with send(slow, stream=stream):
        generation = started(slow)
        assert not generation.cancelled
    until(lambda: generation.cancelled, "the answer went on without its client")
    until(lambda: not slow.world.in_flight(), "the world went on computing")


def test_a_client_that_goes_away_while_waiting_frees_its_place(slow: Running) -> None:
    with send(slow, stream=True):
        started(slow)
        with send(slow, stream=True):
            until(lambda: len(slow.world.in_flight()) == 2, "the second request never came")
            second = slow.world.in_flight()[1]
        until(lambda: second.cancelled, "the waiting request was kept")
        assert not slow.world.in_flight()[0].cancelled, "the other client's answer goes on"


def test_a_crash_is_one_clear_error_and_the_next_request_works(slow: Running) -> None:
    body = {"model": "demo", "prompt": "hello", "ignore_eos": True, "max_tokens": 2000}
    with slow.client() as client:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            slow.world.crash()
            *_, last = (line for line in lines if line)
        assert json.loads(last[6:])["error"]["code"] == "world_crashed"
        assert client.post("/v1/completions", json={**body, "max_tokens": 3}).status_code == 200


def test_a_crash_before_the_first_token_is_a_503(tmp_path: Path) -> None:
    world = FakeWorld(FakeEngine(clock=SystemClock(), prefill_s=20))
    with serving(tmp_path, world) as running, running.client() as client:

        def crash_it() -> None:
            started(running)
            world.crash()

        crash = threading.Thread(target=crash_it)
        crash.start()
        response = client.post("/v1/completions", json={"model": "demo", "prompt": "x"})
        crash.join()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "world_crashed"


def test_more_requests_than_the_server_takes_are_told_it_is_busy(tmp_path: Path) -> None:
    world = FakeWorld(FakeEngine(clock=SystemClock(), token_s=0.01))
    with serving(tmp_path, world, max_in_flight=2) as running, running.client() as client:
        with send(running, stream=True), send(running, stream=False):
            until(lambda: len(world.in_flight()) == 2, "the requests never came")
            response = client.post("/v1/completions", json={"model": "demo", "prompt": "x"})
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "busy"
        until(lambda: not world.in_flight(), "the places were not freed")
        assert client.post("/v1/completions", json={"model": "demo", "prompt": "x"}).status_code == 200


def test_a_world_that_is_full_says_busy_through_the_server(tmp_path: Path) -> None:
    world = FakeWorld(FakeEngine(clock=SystemClock(), token_s=0.01), max_waiting=1)
    with serving(tmp_path, world) as running, running.client() as client, send(running, stream=True):
        until(lambda: world.status().active_requests == 1, "the first request never came")
        with send(running, stream=True):
            until(lambda: world.status().waiting_requests == 1, "the second request never came")
            response = client.post("/v1/completions", json={"model": "demo", "prompt": "x"})
    assert response.json()["error"]["code"] == "busy"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_stopping_gives_every_client_in_flight_one_clear_error(slow: Running, stream: bool) -> None:
    with send(slow, stream=stream) as sock:
        generation = started(slow)
        if stream:
            receive(sock, b"data: ")  # the headers may come in a packet of their own
        slow.stop()
        rest = b"".join(iter(lambda: sock.recv(65536), b""))
    assert rest.count(b'"shutting_down"') == 1
    assert b"[DONE]" not in rest
    assert stream or rest.startswith(b"HTTP/1.1 503 ")
    assert generation.cancelled


def test_stopping_closes_every_socket(slow: Running) -> None:
    assert slow.admin.exists()
    with slow.client() as kept_alive:
        assert kept_alive.get("/health").status_code == 200
        slow.stop()
    assert not slow.admin.exists()
    with pytest.raises(httpx.ConnectError), slow.client() as client:
        client.get("/health")


def test_slow_readers_do_not_delay_others(slow: Running) -> None:
    with send(slow, stream=True), slow.client() as client:
        started(slow)  # its client never reads
        begun = time.monotonic()
        for _ in range(20):
            assert client.get("/health").json()["active_requests"] == 1
        assert time.monotonic() - begun < 15  # the slow answer takes 20 s


def test_the_event_loop_costs_little_per_token(tmp_path: Path) -> None:
    """Processor time of the loop's thread, with tokens 1 ms apart, so that each is a wake-up and a send."""
    world = FakeWorld(FakeEngine(clock=SystemClock(), token_s=0.001))
    body = {"model": "demo", "prompt": "x", "ignore_eos": True, "max_tokens": 500, "stream": True}
    with serving(tmp_path, world) as running, running.client() as client:
        assert running.thread.ident is not None
        clock = time.pthread_getcpuclockid(running.thread.ident)
        costs = []
        for _ in range(3):
            before = time.clock_gettime(clock)
            with client.stream("POST", "/v1/completions", json=body) as response:
                data = b"".join(response.iter_raw())
            costs.append((time.clock_gettime(clock) - before) / 500)
            assert data.count(b"data: ") == 502, "one event per token, the end and [DONE]"
    print(f"{min(costs) * 1e6:.0f} microseconds per token")
    assert min(costs) < 0.0002


def test_nothing_a_client_says_reaches_a_log(
    slow: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(0)
    canary = f"canary-{os.getpid()}"
    with slow.client() as client:
        for body in (
            {"model": "demo", "prompt": canary},
            {"model": "demo", "prompt": canary, "stream": True},
            {"model": "demo", "prompt": canary * 1000},
            {"model": "demo", "prompt": [canary, canary]},
            {"model": "demo", "prompt": canary, "max_tokens": canary},
        ):
            client.post("/v1/completions", json=body)
        client.post(
            "/v1/completions", content=f'{{"prompt": "{canary}', headers={"content-type": "application/json"}
        )
    server_side = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    out, err = capfd.readouterr()
    assert canary not in "".join(server_side) + out + err


def test_an_unexpected_failure_of_the_world_is_logged_without_its_message(
    slow: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(request: object) -> FakeGeneration:
        raise RuntimeError(f"quoting {request}")

    monkeypatch.setattr(slow.world, "generate", broken)
    with slow.client() as client:
        response = client.post("/v1/completions", json={"model": "demo", "prompt": "canary"})
    assert response.status_code == 500
    assert "canary" not in response.text
    ours = [r for r in caplog.records if r.name == "flexserve.server"]
    assert [r.levelname for r in ours] == ["ERROR"]
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text

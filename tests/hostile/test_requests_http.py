"""Attack: HTTP itself made to exhaust or confuse the server, over raw sockets."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import pytest

from flexserve.server.gate import MAX_BODY_BYTES
from flexserve.worlds.fake import FakeWorld

from ..server.running import Running, serving

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GOOD = b'{"model": "demo", "prompt": "hi"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("hostile"), FakeWorld()) as running:
        yield running
        assert (
            exchange(running, HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(GOOD) + GOOD)[0]
            == 200
        )


def exchange(running: Running, *pieces: bytes) -> tuple[int, bytes]:
    """Send until the server has enough; its status and everything it said. It must end the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had enough
        answer = b""
        try:
            while data := sock.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert match, answer[:100]
    return int(match[1]), answer


def test_a_body_declared_too_large_is_refused_unread(server: Running) -> None:
    status, answer = exchange(server, HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1))
    assert status == 413
    assert b"request_too_large" in answer


def test_a_chunked_body_is_refused_at_the_limit(server: Running) -> None:
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    status, answer = exchange(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)
    assert status == 413
    assert b"request_too_large" in answer


def test_a_body_of_exactly_the_limit_is_read(server: Running) -> None:
    body = GOOD[:-1] + b" " * (MAX_BODY_BYTES - len(GOOD)) + b"}"
    status, _ = exchange(server, HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body), body)
    assert status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -1\r\n",
        b"Content-Length: 1e3\r\n",
        b"Content-Length: 99999999999999999999999999\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: gzip\r\n",
        b"Host: localhost\r\n",
        b"X: a\r\n b: c\x00\r\n",
        b"X: " + b"y" * 200_000 + b"\r\n",
        b": no name\r\n",
        b"Bad name: x\r\n",
    ],
    ids=[
        "negative",
        "float",
        "huge",
        "two lengths",
        "encoding",
        "two hosts",
        "zero byte",
        "large",
        "nameless",
        "space",
    ],
)
def test_a_broken_head_is_refused(server: Running, head: bytes) -> None:
    status, _ = exchange(server, HEAD + head + b"\r\n")
    assert 400 <= status < 500 or status == 501


def test_a_length_and_chunks_at_once_do_not_smuggle_a_second_request(server: Running) -> None:
    second = b"GET /admin/ps HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = HEAD + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" % (
        5 + len(second)
    )
    _, answer = exchange(server, head + b"0\r\n\r\n" + second)
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "host", [b"evil.example", b"127.0.0.1.evil.example", b"", b"a" * 5000, b"localhost, evil"]
)
def test_a_page_that_rebinds_its_name_to_loopback_is_refused(server: Running, host: bytes) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    status, answer = exchange(server, request)
    assert status in (400, 403)
    assert b"demo" not in answer


def test_a_request_without_a_host_is_refused(server: Running) -> None:
    assert exchange(server, b"GET /v1/models HTTP/1.0\r\n\r\n")[0] == 403
    assert exchange(server, b"GET /v1/models HTTP/1.1\r\n\r\n")[0] == 400


def test_a_connection_that_is_not_http_is_refused(server: Running) -> None:
    assert exchange(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")[0] == 400


def test_an_upgrade_is_not_taken(server: Running) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    status, answer = exchange(server, head + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n")
    assert status != 101
    assert b"101 Switching" not in answer


def test_a_client_that_hangs_up_in_its_body_leaves_nothing_behind(server: Running) -> None:
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"model"')
    with server.client() as client:
        assert client.get("/health").json()["active_requests"] == 0


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    one = b"GET /v1/models/demo HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    _, answer = exchange(server, one + two)
    bodies = re.findall(rb"\r\n\r\n(\{.*?\})(?=HTTP|$)", answer, re.S)
    assert [b"owned_by" in bodies[0], json.loads(bodies[1])["status"]] == [True, "ok"]

"""What every request passes before and after the endpoint: hosts, keys, sizes, methods, errors."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flexserve import __version__
from flexserve.errors import HostRefused
from flexserve.server import gate
from flexserve.server.gate import HostRule
from flexserve.worlds.fake import FakeWorld

from .running import Running, serving

KEY = b"0123456789abcdef0123456789abcdef"


def error(response: httpx.Response, status: int, code: str) -> dict[str, str]:
    """The error object, after checking that it is one."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    found: dict[str, str] = response.json()["error"]
    assert found.keys() == {"message", "type", "code", "hint"}
    assert found["code"] == code
    return found


def test_health_says_what_runs(client: httpx.Client) -> None:
    body = client.get("/health").json()
    assert body["status"] == "ok"
    assert body["version"] == __version__
    assert body["world"] == "fake"
    assert body["models"] == ["demo"]


def test_health_reports_a_world_that_is_gone(tmp_path: Path) -> None:
    world = FakeWorld()
    with serving(tmp_path, world) as running, running.client() as client:
        world.close()
        error(client.get("/health"), 503, "world_crashed")


def test_models_are_listed_and_found_by_name(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("demo", "model", "flexserve")
    assert model["flexserve"]["context_tokens"] == 4096
    assert client.get("/v1/models/demo").json() == model
    error(client.get("/v1/models/absent"), 404, "model_not_found")


def test_a_client_reads_our_errors_like_openais(client: httpx.Client) -> None:
    assert error(client.get("/nowhere"), 404, "not_found")["type"] == "invalid_request_error"
    assert "/health" not in error(client.post("/health"), 405, "method_not_allowed")["message"]
    assert client.post("/health").headers["allow"] == "GET, HEAD"
    error(client.get("/v1/chat/completions"), 405, "method_not_allowed")


def test_a_body_is_json_whatever_it_is_called(client: httpx.Client) -> None:
    """`curl -d` calls it a form."""
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        body = b'{"model": "demo", "prompt": "x"}'
        response = client.post("/v1/completions", content=body, headers={"content-type": kind})
        assert response.status_code == 200


FOREIGN_ORIGINS = """
    http://evil.example  https://evil.example  null  file://  http://localhost.evil.example
    http://127.0.0.1.evil.example:8080  chrome-extension://abc  http://  evil  //localhost  http:/localhost
"""


@pytest.mark.parametrize("origin", ["", *FOREIGN_ORIGINS.split()])
def test_a_web_page_of_another_site_cannot_make_it_compute(shared: Running, origin: str) -> None:
    requests = shared.world.status().models[0].requests
    body = {"model": "demo", "prompt": "x"}
    with shared.client(headers={"origin": origin}) as client:
        error(client.post("/v1/completions", json=body), 403, "origin_refused")
    assert shared.world.status().models[0].requests == requests


@pytest.mark.parametrize("origin", ["http://localhost", "http://localhost:3000", "https://127.0.0.1:8080"])
def test_a_web_page_of_this_machine_may(client: httpx.Client, origin: str) -> None:
    body = {"model": "demo", "prompt": "x"}
    assert client.post("/v1/completions", json=body, headers={"origin": origin}).status_code == 200


def test_no_other_origin_may_read_answers(client: httpx.Client) -> None:
    for origin in ("http://evil.example", "http://localhost:3000"):
        for method in ("GET", "OPTIONS"):
            response = client.request(method, "/v1/models", headers={"origin": origin})
            assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8080", "127.8.9.1", "localhost", "LOCALHOST:1", "[::1]", "[::1]:8080"]
)
def test_a_loopback_server_answers_to_loopback_names(host: str) -> None:
    HostRule(loopback=True).check(host.encode())


FOREIGN = """
    evil.example  evil.example:8080  localhost.evil.example  127.0.0.1.evil.example  192.168.1.9
    [  [::1  [fe80::1]  0.0.0.0  127.0.0.1@evil  ::1  2130706433  \xff  localhost,evil.example
"""


@pytest.mark.parametrize("host", ["", *FOREIGN.split()])
def test_a_loopback_server_answers_to_no_other(host: str) -> None:
    with pytest.raises(HostRefused):
        HostRule(loopback=True).check(host.encode("latin-1"))


def test_an_open_server_answers_to_addresses_and_to_names_it_was_given() -> None:
    rule = HostRule(loopback=False, names=["Box.lan"])
    for host in ("192.168.1.9:8080", "[fe80::1]:80", "box.lan", "localhost:8080", socket.gethostname()):
        rule.check(host.encode())
    for host in ("evil.example", "", "sub.box.lan"):
        with pytest.raises(HostRefused):
            rule.check(host.encode())


def test_a_foreign_host_is_refused_before_anything_else(client: httpx.Client) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        error(client.get(path, headers={"host": "evil.example"}), 403, "host_refused")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("keyed"), FakeWorld(), api_key=KEY) as running:
        yield running


def test_with_an_api_key_only_health_is_open(keyed: Running) -> None:
    with keyed.client() as client:
        assert client.get("/health").status_code == 200
        for header in ({}, {"authorization": "Bearer " + "x" * 32}, {"authorization": KEY.decode()}):
            response = client.get("/v1/models", headers=header)
            error(response, 401, "api_key_wrong")
            assert response.headers["www-authenticate"] == "Bearer"
        good = {"authorization": f"Bearer {KEY.decode()}"}
        assert client.get("/v1/models", headers=good).status_code == 200


def test_the_admin_socket_needs_no_key_and_serves_ps_list_and_the_api(keyed: Running) -> None:
    with keyed.admin_client() as client:
        status = client.get("/admin/ps").json()
        assert status["world"] == "fake"
        assert [m["info"]["name"] for m in status["models"]] == ["demo"]
        (model,) = client.get("/admin/list").json()["models"]
        assert model["name"] == "demo"
        answer = client.post("/v1/completions", json={"model": "demo", "prompt": "hi"})
        assert answer.json()["choices"][0]["text"] == "hi"


def test_admin_verbs_are_not_on_the_network(client: httpx.Client) -> None:
    for path in ("/admin/ps", "/admin/list"):
        error(client.get(path), 404, "not_found")


def test_answers_are_not_cached_and_name_no_software(client: httpx.Client) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        headers = client.get(path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_a_body_that_comes_too_slowly_is_given_up(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.read_json, "__kwdefaults__", {"limit": 100, "timeout_s": 0.05})
    with socket.create_connection(("127.0.0.1", shared.port)) as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(head + b"Content-Length: 50\r\n\r\n{")
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_too_slow" in answer

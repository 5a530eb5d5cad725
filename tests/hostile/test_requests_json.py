"""Attack: request bodies made to break, exhaust or confuse the server.

Each is refused with an error object, quickly, and the server goes on answering.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.core import Request
from flexserve.errors import FlexServeError, InvalidRequest
from flexserve.server.wire import decode_chat, decode_completion
from flexserve.worlds.fake import FakeWorld

from ..server.running import Running, serving

JSON = {"content-type": "application/json"}
DEEP = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("hostile"), FakeWorld()) as running:
        yield running
        with running.client() as client:
            answer = client.post("/v1/completions", json={"model": "demo", "prompt": "still here"})
            assert answer.json()["choices"][0]["text"] == "still here"


BODIES = {
    "empty": b"",
    "not JSON": b"model=demo&prompt=x",
    "cut": b'{"model": "demo", "prompt": "x',
    "trailing": b'{"model": "demo", "prompt": "x"} {}',
    "comment": b'{"model": "demo", /* */ "prompt": "x"}',
    "a list": b"[]",
    "a string": b'"demo"',
    "null": b"null",
    "no model": b'{"prompt": "x"}',
    "no prompt": b'{"model": "demo"}',
    "model null": b'{"model": null, "prompt": "x"}',
    "model empty": b'{"model": "", "prompt": "x"}',
    "model huge": b'{"model": "' + b"m" * 100_000 + b'", "prompt": "x"}',
    "prompt object": b'{"model": "demo", "prompt": {"a": 1}}',
    "prompt mixed": b'{"model": "demo", "prompt": ["a", 1]}',
    "prompt empty list": b'{"model": "demo", "prompt": []}',
    "token negative": b'{"model": "demo", "prompt": [-1]}',
    "token huge": b'{"model": "demo", "prompt": [99999999999999999999999999]}',
    "token beyond the vocabulary": b'{"model": "demo", "prompt": [2147483647]}',
    "token true": b'{"model": "demo", "prompt": [true]}',
    "NaN": b'{"model": "demo", "prompt": "x", "temperature": NaN}',
    "Infinity": b'{"model": "demo", "prompt": "x", "temperature": Infinity}',
    "beyond a float": b'{"model": "demo", "prompt": "x", "temperature": 1e999}',
    "huge int": b'{"model": "demo", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    "int too large": b'{"model": "demo", "prompt": "x", "seed": 18446744073709551616}',
    "float for int": b'{"model": "demo", "prompt": "x", "max_tokens": 1.5}',
    "string for int": b'{"model": "demo", "prompt": "x", "max_tokens": "5"}',
    "bool for int": b'{"model": "demo", "prompt": "x", "max_tokens": true}',
    "stop of numbers": b'{"model": "demo", "prompt": "x", "stop": [1]}',
    "stop too long": b'{"model": "demo", "prompt": "x", "stop": "' + b"s" * 257 + b'"}',
    "raw control": b'{"model": "demo", "prompt": "a\x00b"}',
    "not UTF-8": b'{"model": "demo", "prompt": "\xff\xfe"}',
    "half a surrogate": b'{"model": "demo", "prompt": "\\ud800"}',
    "overlong UTF-8": b'{"model": "demo", "prompt": "\xc0\xaf"}',
    "byte order mark": b'\xef\xbb\xbf{"model": "demo", "prompt": "x"}',
    "UTF-16": '{"model": "demo", "prompt": "x"}'.encode("utf-16"),
    "deep lists": b'{"model": "demo", "prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep unknown field": b'{"model": "demo", "prompt": "x", "metadata": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"model": "demo", "prompt": "x", "tools": '
    + b'{"a":' * DEEP
    + b"1"
    + b"}" * DEEP
    + b"}",
    "deep and open": b"[" * (4 * DEEP),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body_is_refused_with_an_error_object(server: Running, what: str) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", content=BODIES[what], headers=JSON)
    assert response.status_code == 400, response.text[:500]
    error = response.json()["error"]
    assert error["code"] == "invalid_request"
    assert len(error["message"]) < 300


MESSAGES: dict[str, object] = {
    "none": [],
    "not a list": "hello",
    "a string": ["hello"],
    "no role": [{"content": "x"}],
    "unknown role": [{"role": "root", "content": "x"}],
    "no content": [{"role": "user"}],
    "null content": [{"role": "user", "content": None}],
    "number content": [{"role": "user", "content": 5}],
    "part without text": [{"role": "user", "content": [{"type": "text"}]}],
    "part without type": [{"role": "user", "content": [{"text": "x"}]}],
    "file part": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "x"}}]}],
    "tool calls": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    "too many": [{"role": "user", "content": ""}] * 4097,
}


@pytest.mark.parametrize("what", MESSAGES)
def test_bad_messages_are_refused_with_an_error_object(server: Running, what: str) -> None:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json={"model": "demo", "messages": MESSAGES[what]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_request"


def test_an_error_never_repeats_what_the_client_sent() -> None:
    canary = "canary-9152"
    for field, value in [
        ("prompt", [canary, canary]),
        ("prompt", {canary: canary}),
        ("temperature", canary),
        ("stop", [canary * 100]),
        ("stop", {canary: 1}),
        ("max_tokens", canary),
        ("n", canary),
        ("response_format", {"type": canary}),
        ("stream_options", {"include_usage": canary}),
    ]:
        body = {"model": "demo", "prompt": "x", field: value}
        with pytest.raises(InvalidRequest) as caught:
            decode_completion(json.dumps(body).encode())
        assert canary not in caught.value.message + caught.value.hint, field
    message = {"role": canary, "content": [{"type": canary, "text": canary}]}
    with pytest.raises(InvalidRequest) as caught:
        decode_chat(json.dumps({"model": "demo", "messages": [message]}).encode())
    assert canary not in caught.value.message + caught.value.hint


def test_a_body_cannot_carry_a_line_into_a_header(server: Running) -> None:
    with server.client() as client:
        for model in ("demo\r\nset-cookie: a=b", "demo\n", "\x00demo", "demo\u2028x"):
            response = client.post("/v1/completions", json={"model": model, "prompt": "x"})
            assert response.status_code == 404
            assert "set-cookie" not in response.headers
            assert response.json()["error"]["code"] == "model_not_found"
        answer = client.get("/v1/models/demo%0d%0aset-cookie:%20a=b")
        assert answer.status_code == 404
        assert "set-cookie" not in answer.headers


def test_an_event_stream_cannot_be_forged_from_inside_the_text(server: Running) -> None:
    prompt = 'x"}]}\n\ndata: [DONE]\n\ndata: {"error": {}}\r\n\r\n'
    with server.client() as client:
        response = client.post("/v1/completions", json={"model": "demo", "prompt": prompt, "stream": True})
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks) == prompt


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "model",
    "prompt",
    "messages",
    "stream",
    "stream_options",
    "max_tokens",
    "temperature",
    "top_k",
    "stop",
]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "tools", "n", "logit_bias", "other"]), values, max_size=8))
def test_any_json_is_a_request_or_one_clear_error(body: dict[str, object]) -> None:
    for decode in (decode_chat, decode_completion):
        try:
            wanted = decode(json.dumps({"model": "demo", "prompt": "x"} | body).encode())
        except FlexServeError as error:
            assert isinstance(error, InvalidRequest)
        else:
            assert isinstance(wanted.request, Request)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_one_clear_error(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_chat(body)


def test_httpx_is_not_hiding_anything(server: Running) -> None:
    """The control: the same road, with a good body."""
    with server.client() as client:
        response = client.post(
            "/v1/completions", content=b'{"model": "demo", "prompt": "a\\u0000b"}', headers=JSON
        )
    assert isinstance(response, httpx.Response)
    assert response.json()["choices"][0]["text"] == "a\0b"

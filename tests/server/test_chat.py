from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from .conftest import Post
from .running import Running

GREETING = "Guten Morgen, Zoë! 🌅"


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, `[DONE]` as that string."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == "", "the last event is complete"
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
    return [b[6:] if b == "data: [DONE]" else json.loads(b[6:]) for b in blocks]


def code(response: httpx.Response) -> str:
    value: str = response.json()["error"]["code"]
    return value


def test_a_whole_answer_has_openais_fields_and_our_timings(chat: Post) -> None:
    response = chat()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "demo"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": GREETING, "refusal": None}
    assert choice["finish_reason"] == "stop"
    size = len(GREETING.encode())
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": size,
        "total_tokens": 7 + size,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert bytes(body["flexserve"]["token_ids"]).decode() == GREETING
    assert body["flexserve"]["timings"]["output_tokens"] == size


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", 7])
def test_a_session_is_a_short_name(chat: Post, name: object) -> None:
    assert chat(session="my talk").status_code == 200
    refused = chat(session=name)
    assert refused.status_code == 400
    assert code(refused) == "invalid_request"
    assert "session" in refused.json()["error"]["message"]


def test_a_stream_begins_with_the_role_and_ends_with_done(chat: Post) -> None:
    response = chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *pieces, last, done = events(response)
    assert done == "[DONE]"
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == GREETING
    assert all(p["choices"][0]["finish_reason"] is None for p in pieces)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"] == {}
    assert bytes(last["flexserve"]["token_ids"]).decode() == GREETING
    assert len({c["id"] for c in [first, *pieces, last]}) == 1
    assert "usage" not in first


def test_a_stream_never_cuts_a_character(chat: Post) -> None:
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events(chat(stream=True))[:-1]]
    assert "🌅" in pieces
    assert not any("\ufffd" in p for p in pieces)


def test_usage_comes_in_a_last_chunk_when_asked_for(chat: Post) -> None:
    *chunks, usage, _done = events(chat(stream=True, stream_options={"include_usage": True}))
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(GREETING.encode())
    assert all(c["usage"] is None for c in chunks)


def test_a_completion_takes_a_prompt_as_it_is(complete: Post) -> None:
    body = complete("abcdef", max_tokens=4).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "abcd"
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_completion_streams_text(complete: Post) -> None:
    *pieces, last, done = events(complete(stream=True))
    assert done == "[DONE]"
    assert "".join(p["choices"][0]["text"] for p in pieces) == GREETING
    assert last["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}


@pytest.mark.parametrize("prompt", [["hello"], [104, 101, 108, 108, 111], [[104, 101, 108, 108, 111]]])
def test_a_completion_takes_one_prompt_in_openais_other_forms(complete: Post, prompt: object) -> None:
    assert complete(prompt).json()["choices"][0]["text"] == "hello"


def test_several_prompts_in_one_request_are_refused(complete: Post) -> None:
    response = complete(["one", "two"])
    assert response.status_code == 400
    assert "prompt" in response.json()["error"]["message"]


def test_content_may_be_a_list_of_text_parts(chat: Post) -> None:
    response = chat([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])
    assert response.json()["choices"][0]["message"]["content"] == "one\ntwo"


def test_an_image_part_is_refused_by_its_place(chat: Post) -> None:
    response = chat([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:"}}])
    assert code(response) == "invalid_request"
    assert "messages[0].content[1]" in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_limit_the_answer(chat: Post, field: str) -> None:
    choice = chat(**{field: 6}).json()["choices"][0]
    assert choice["message"]["content"] == "Guten "
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stop", ["Morgen", ["x", "Morgen"]])
def test_a_stop_string_ends_the_answer_before_it(chat: Post, stop: object) -> None:
    choice = chat(stop=stop).json()["choices"][0]
    assert choice["message"]["content"] == "Guten "
    assert choice["finish_reason"] == "stop"


def test_text_held_back_for_a_stop_string_that_never_comes_is_still_sent(chat: Post) -> None:
    response = chat("say Morg", stop="Morgen", stream=True)
    chunks = [e for e in events(response) if e != "[DONE]"]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "say Morg"


def test_sampling_fields_reach_the_request(slow: Running) -> None:
    fields = {"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.5, "seed": 9}
    with slow.client() as client:
        body = {"model": "demo", "prompt": "x" * 900, "stream": True, "ignore_eos": True, **fields}
        with client.stream("POST", "/v1/completions", json=body) as response:
            chunks = response.iter_bytes()  # kept: dropping it would close the connection
            next(chunks)
            (generation,) = slow.world.in_flight()
    sampling = generation.request.sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert generation.request.ignore_eos


def test_null_means_the_default(chat: Post) -> None:
    names = ("temperature", "top_p", "seed", "stop", "max_tokens", "stream", "n", "tools", "logit_bias")
    assert chat(**dict.fromkeys(names)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": -100}),
        ("response_format", {"type": "json_object"}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("modalities", ["text", "audio"]),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    chat: Post, field: str, value: object
) -> None:
    response = chat(**{field: value})
    assert response.status_code == 400
    assert code(response) == "invalid_request"
    assert response.json()["error"]["message"].startswith(f"{field} ")
    assert response.json()["error"]["hint"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("tools", []),
        ("tool_choice", "auto"),
        ("logprobs", False),
        ("response_format", {"type": "text"}),
        ("frequency_penalty", 0.0),
        ("user", "somebody"),
        ("metadata", {"a": 1}),
        ("store", True),
        ("service_tier", "auto"),
    ],
)
def test_a_field_that_changes_nothing_is_ignored(chat: Post, field: str, value: object) -> None:
    assert chat(**{field: value}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", 101),
        ("top_p", 0),
        ("top_k", -1),
        ("min_p", 2),
        ("seed", -5),
        ("max_tokens", 0),
        ("stop", ""),
        ("stop", ["s"] * 17),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(chat: Post, field: str, value: object) -> None:
    response = chat(**{field: value})
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]


def test_stream_options_without_a_stream_and_two_limits_are_refused(chat: Post) -> None:
    assert "stream_options" in chat(stream_options={"include_usage": True}).json()["error"]["message"]
    assert "must agree" in chat(max_tokens=3, max_completion_tokens=4).json()["error"]["message"]


def test_an_error_before_the_first_token_has_its_own_status(chat: Post) -> None:
    for stream in (False, True):
        response = chat("fail early", stream=stream)
        assert response.status_code == 500
        assert response.json()["error"] == {
            "code": "engine_failed",
            "message": "the engine did not start",
            "hint": "",
            "type": "server_error",
        }


def test_an_error_after_the_first_token_ends_the_stream_with_it(chat: Post) -> None:
    response = chat("fail late", stream=True)
    assert response.status_code == 200
    *pieces, error = events(response)
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == "Half an ans"
    assert error["error"]["code"] == "engine_failed"
    assert chat("fail late").status_code == 500


def test_a_prompt_beyond_the_context_is_refused(complete: Post) -> None:
    response = complete("x" * 5000)
    assert response.status_code == 400
    assert code(response) == "context_overflow"
    assert "5000" in response.json()["error"]["message"]
    assert "4096" in response.json()["error"]["message"]


def test_an_unknown_model_is_not_found(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert response.status_code == 404
    assert code(response) == "model_not_found"
    assert "'other'" in response.json()["error"]["message"]

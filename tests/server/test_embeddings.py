"""POST /v1/embeddings: OpenAI's form in both encodings, for one text, several, and token ids."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import pytest

from flexserve.engine.fake import fake_embedding
from flexserve.server.embeddings import MAX_INPUTS

from ..schemas import validate
from .running import Running


def post(client: httpx.Client, given: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "demo", "input": given, **fields})


def vector(text: str) -> list[float]:
    return list(struct.unpack("<8f", fake_embedding(text)))


def test_one_text_gives_one_vector(client: httpx.Client) -> None:
    answer = post(client, "hello").json()
    validate("embeddings", answer)
    assert [entry["embedding"] for entry in answer["data"]] == [vector("hello")]
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert answer["model"] == "demo"


def test_several_texts_give_as_many_vectors_in_their_order(client: httpx.Client) -> None:
    texts = ["b", "a", "b", "ccc"]
    answer = post(client, texts).json()
    validate("embeddings", answer)
    assert [(e["index"], e["embedding"]) for e in answer["data"]] == [
        (i, vector(t)) for i, t in enumerate(texts)
    ]
    assert answer["usage"]["total_tokens"] == 6
    assert len(answer["flexserve"]["timings"]) == 4


@pytest.mark.parametrize(("given", "texts"), [([104, 105], ["hi"]), ([[104, 105], [97]], ["hi", "a"])])
def test_token_ids_are_taken_as_they_are(client: httpx.Client, given: Any, texts: list[str]) -> None:
    assert [e["embedding"] for e in post(client, given).json()["data"]] == [vector(t) for t in texts]


def test_base64_is_the_same_numbers(client: httpx.Client) -> None:
    answer = post(client, ["hello"], encoding_format="base64", user="u").json()
    validate("embeddings", answer)
    assert base64.b64decode(answer["data"][0]["embedding"]) == fake_embedding("hello")
    assert post(client, "hello", encoding_format="float").json()["data"][0]["embedding"] == vector("hello")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "model"),
        ({"model": "demo"}, "input"),
        ({"model": "demo", "input": []}, "input"),
        ({"model": "demo", "input": ""}, "input"),
        ({"model": "demo", "input": ["a", ""]}, "input"),
        ({"model": "demo", "input": ["a", 1]}, "input"),
        ({"model": "demo", "input": [[]]}, "input"),
        ({"model": "demo", "input": [["a"]]}, "input"),
        ({"model": "demo", "input": 7}, "input"),
        ({"model": "demo", "input": ["x"] * (MAX_INPUTS + 1)}, "input"),
        ({"model": "demo", "input": [-1]}, "token_ids"),
        ({"model": "demo", "input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"model": "demo", "input": "x", "dimensions": 3}, "dimensions"),
    ],
)
def test_bad_bodies_are_refused_by_the_field_and_without_their_content(
    client: httpx.Client, body: dict[str, Any], named: str
) -> None:
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    validate("error", response.json())
    assert named in response.json()["error"]["message"]


def test_errors_keep_their_status(client: httpx.Client) -> None:
    assert post(client, "fail early").status_code == 500
    assert post(client, ["fine", "fail early"]).status_code == 500
    assert client.post("/v1/embeddings", json={"model": "absent", "input": "x"}).status_code == 404
    assert client.post("/v1/embeddings", content=b"{").status_code == 400
    assert client.get("/v1/embeddings").status_code == 405


def test_the_server_is_idle_afterwards(shared: Running, client: httpx.Client) -> None:
    post(client, ["a", "b"])
    assert client.get("/health").json()["active_requests"] == 0
    assert not shared.gateway._streams

"""Whoever gets the device's files and logs looks for what was asked and answered.

Rule: prompts and answers are written nowhere: not by the gateway, not by the secure process, not in errors, not
when either crashes. The gateway's memory is not part of this: a plain HTTP client's prompt passes through it
(docs/threat-model.md).
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..attacker import as_same_user, files_with
from ..sealed_fixtures import SMALL
from ..served import Served, served
from ..world_fixtures import Device, make_device

WINDOW = 12  # characters of an answer that no file has by chance


@dataclass
class Asked:
    """Everything a server was asked and has answered."""

    running: Served
    device: Device
    canaries: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def canary(self) -> str:
        self.canaries.append(f"canary-{secrets.token_hex(12)}")
        return self.canaries[-1]

    def post(self, path: str, **request: Any) -> httpx.Response:
        return httpx.post(f"{self.running.url}{path}", timeout=60, **request)

    def refused(self, path: str, **request: Any) -> None:
        answer = self.post(path, **request)
        assert answer.status_code >= 400
        self.refusals.append(answer.text)

    def needles(self) -> list[bytes]:
        """The canaries, and each answer from several places."""
        pieces = [
            text[at : at + WINDOW] for text in self.answers for at in range(0, len(text) - WINDOW, WINDOW)
        ]
        pieces = [piece for piece in pieces if len(set(piece)) > WINDOW // 2]
        assert len(pieces) >= len(self.answers)
        return [n.encode() for n in (*self.canaries, *pieces)]


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], **more}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A server that was asked in every way, crashed, and has ended."""
    device = make_device(tmp_path_factory.mktemp("d"))
    source, _ = device.add_kit("m", SMALL)
    with served(device, source, tmp_path_factory.mktemp("s")) as running:
        asked = Asked(running, device)
        answered(asked)
        refused(asked)
        gone(asked)
        crashed(asked)
        running.stop()
        yield asked


def answered(asked: Asked) -> None:
    for seed in range(4):
        answer = asked.running.complete(asked.canary(), temperature=1, seed=seed)
        asked.answers.append(answer.json()["choices"][0]["text"])
        answer = asked.post("/v1/chat/completions", json=chat(asked.canary(), seed=seed, max_tokens=24))
        asked.answers.append(answer.json()["choices"][0]["message"]["content"])
    streamed = asked.running.complete(asked.canary(), stream=True)
    assert streamed.text.endswith("data: [DONE]\n\n")


def refused(asked: Asked) -> None:
    asked.refused("/v1/completions", json={"model": "m", "prompt": f"{asked.canary()} " * 2000})
    asked.refused("/v1/chat/completions", json=chat(asked.canary(), temperature=-1))
    asked.refused("/v1/chat/completions", json=chat(asked.canary(), model="absent"))
    asked.refused("/v1/chat/completions", json={"model": "m", "messages": asked.canary()})
    asked.refused("/v1/chat/completions", json={"model": "m", "messages": [{"role": asked.canary()}]})
    asked.refused("/v1/completions", content=f'{{"prompt": "{asked.canary()}"'.encode())
    asked.refused(f"/v1/{asked.canary()}", json={})
    asked.refused("/v1/completions", json=chat("x"), headers={"origin": f"http://{asked.canary()}"})


def gone(asked: Asked) -> None:
    """A client that leaves in the middle."""
    body = {"model": "m", "prompt": asked.canary(), "max_tokens": 1000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{asked.running.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())


def crashed(asked: Asked) -> None:
    """The secure process dies with a prompt in its hands."""
    body = {"model": "m", "prompt": asked.canary(), "max_tokens": 1000, "stream": True, "ignore_eos": True}
    pid = asked.running.secure_pid
    with httpx.stream("POST", f"{asked.running.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        as_same_user(lambda: os.kill(pid, signal.SIGSEGV))
        assert any('"world_crashed"' in line for line in lines)


def test_no_file_has_a_prompt_or_an_answer(asked: Asked) -> None:
    for directory in (asked.running.directory, asked.device.directory):
        assert files_with(directory, asked.needles()) == []


def test_the_logs_were_among_the_files(asked: Asked) -> None:
    work = asked.running.directory / "work"
    assert sorted(p.name for p in work.iterdir()) == ["stderr.txt", "stdout.txt"]
    assert "registered in" in (work / "stderr.txt").read_text()


def test_control_a_note_of_the_prompt_would_be_found(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i, needle in enumerate((asked.needles()[0], asked.needles()[-1])):
        (tmp_path / "deep" / f"{i}.log").write_bytes(b"prompt: " + needle)
    assert len(files_with(tmp_path, asked.needles())) == 2


def test_no_error_repeats_what_was_asked(asked: Asked) -> None:
    assert len(asked.refusals) == 8
    for refusal in asked.refusals:
        assert "canary" not in refusal

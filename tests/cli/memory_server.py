"""A server over the fake world, in this process, for the verbs about memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexserve.engine.fake import FakeEngine
from flexserve.worlds.fake import FakeWorld

from ..server.running import SCRIPTS, Running, serving
from .conftest import Shell


@dataclass(frozen=True)
class Server:
    """A running server that the shell's verbs find."""

    shell: Shell
    running: Running

    @property
    def url(self) -> str:
        return self.running.url

    def complete(self, prompt: str) -> str:
        with self.running.client() as client:
            answer = client.post(
                "/v1/completions", json={"model": "demo", "prompt": prompt, "temperature": 0}
            )
        text: str = answer.json()["choices"][0]["text"]
        return text

    def admin(self, method: str, path: str, body: str = "") -> httpx.Response:
        with self.running.admin_client() as client:
            return client.request(method, path, content=body)


@contextlib.contextmanager
def serving_shell(
    shell: Shell, directory: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[Server]:
    """Started, with no weight resident. `options`: of the world."""
    with serving(directory, FakeWorld(FakeEngine(SCRIPTS), **options)) as running:
        monkeypatch.setenv("FLEXSERVE_ADMIN_SOCKET", str(running.admin))
        yield Server(shell, running)

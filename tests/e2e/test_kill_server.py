"""Kill -9 of the gateway and of the secure process at random moments: the next start works, and saved conversations are
intact or cleanly discarded.

FLEXSERVE_KILLS says how many gateways the slow test kills, and as many secure processes; 10 without it.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from flexserve.errors import FlexServeError
from flexserve.server.bodies import BudgetBody, RecallBody
from flexserve.server.client import ServerClient
from flexserve.worlds.base import ModelSource

from ..attacker import children
from ..sealed_fixtures import SMALL
from ..served import Served, served
from ..world_fixtures import Device, make_device

FIRST = "The quick brown fox jumps over the lazy dog, again and again and again."
ERRORS = (503,)  # the secure world has crashed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Device, ModelSource]:
    device = make_device(tmp_path_factory.mktemp("d"))
    return device, device.add_kit("m", SMALL)[0]


class Deaths:
    """Servers one after the other over one directory of saved conversations, each of which is killed."""

    def __init__(self, model: tuple[Device, ModelSource], directory: Path, seed: int) -> None:
        self._model, self._directory = model, directory
        self._sessions = directory / "sessions"
        self._chance = random.Random(seed)
        self._pause = threading.Event()
        self._rights: set[str] = (
            set()
        )  # answers to the second turn: from its beginning, or from the saved first
        self.restored = self.recomputed = self.unfinished_files = 0
        self._learn()

    def _learn(self) -> None:
        with self._served(self._directory / "fresh") as server:
            first = self._say(server, "c", FIRST)
            self._rights.add(self._say(server, "c", self._second(first)))
        self._first = first
        with self._served(self._directory / "other") as server:
            self._rights.add(self._say(server, "c", self._second(first)))

    def _served(self, sessions: Path):  # type: ignore[no-untyped-def]  # a context manager
        return served(*self._model, self._directory, more=("--session-dir", str(sessions)))

    @staticmethod
    def _second(first: str) -> str:
        return f"{FIRST}{first} And then?"

    @staticmethod
    def _say(server: Served, session: str, prompt: str) -> str:
        answer = server.complete(prompt, session=session)
        if answer.status_code in ERRORS:  # it may still meet the dead process, once
            answer = server.complete(prompt, session=session)
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["text"]
        assert isinstance(text, str)
        return text

    def one(self, number: int) -> None:
        """A server starts over what the last one left, loses its secure process, and is killed itself."""
        before = {path.name for path in self._sessions.iterdir()} if self._sessions.exists() else set()
        self.unfinished_files += sum(name.endswith(".part") for name in before)
        with self._served(self._sessions) as server:
            ServerClient(server.admin).budget(BudgetBody(floor_bytes=0))  # so that a recall has all saved
            left = {path.name for path in self._sessions.iterdir()}
            assert not any(name.endswith(".part") for name in left), "what is not whole is removed"
            answer = server.complete(self._second(self._first), session=f"c{number - 1}")
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] in self._rights
            kept = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            self.restored += kept
            self.recomputed += not kept
            self._disturb(server, number, lambda: os.kill(server.secure_pid, signal.SIGKILL))
            assert self._say(server, "again", FIRST) == self._first, "it serves after its secure process died"
            everybody = [server.secure_pid, *children(server.secure_pid)]
            self._disturb(server, number, server.process.kill)
            server.process.wait(60)
        for pid in everybody:
            self._wait_for_the_end_of(pid)

    def _disturb(self, server: Served, number: int, kill: Callable[[], None]) -> None:
        """Ask, have everything saved, and kill meanwhile."""
        admin = ServerClient(server.admin)

        def ask() -> None:
            with suppress(httpx.TransportError):
                answer = server.complete(FIRST, session=f"c{number}")
                assert answer.status_code in (200, *ERRORS), answer.text
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["text"] == self._first

        def save() -> None:
            with suppress(FlexServeError):
                admin.recall(RecallBody())

        with ThreadPoolExecutor(2) as both:
            work = [both.submit(ask)]
            if self._chance.random() < 0.7:
                work[0].result()  # its conversation is there to be saved
            work.append(both.submit(save))
            self._pause.wait(self._chance.choice((0.0, 0.003, 0.01, 0.03, 0.1)) * self._chance.random())
            with suppress(FlexServeError, ProcessLookupError):
                kill()
            for one in work:
                one.result()

    def _wait_for_the_end_of(self, pid: int) -> None:
        for _ in range(6000):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            state = Path(f"/proc/{pid}/stat")
            with suppress(OSError):
                if state.read_text().rpartition(")")[2].split()[0] == "Z":
                    return
            self._pause.wait(0.01)
        raise AssertionError(f"process {pid} outlives its server")


def deaths(model: tuple[Device, ModelSource], directory: Path, kills: int, seed: int) -> Deaths:
    run = Deaths(model, directory, seed)
    for number in range(kills):
        run.one(number)
        print(f"{number + 1}: {run.restored} restored, {run.recomputed} recomputed", flush=True)
    assert run.restored + run.recomputed == kills
    return run


@pytest.mark.slow
def test_servers_killed_at_random_moments_lose_no_whole_file_and_believe_no_other(
    model: tuple[Device, ModelSource], tmp_path: Path
) -> None:
    kills = int(os.environ.get("FLEXSERVE_KILLS", "10"))
    run = deaths(model, tmp_path, kills, seed=2)
    print(
        f"{kills} gateways and {kills} secure processes: {run.restored} conversations went on from a saved state, "
    )
    print(f"{run.recomputed} were computed again, {run.unfinished_files} unfinished files were removed")
    assert run.restored > 0

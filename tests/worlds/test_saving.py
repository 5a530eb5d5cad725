"""Saving sessions: what is written is what the Framework means, whatever older version lies in the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from flexserve.engine.sessions import SessionStore
from flexserve.framework import events as ev
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.session_file import MadeBy
from flexserve.worlds.linux.runner import Runner
from flexserve.worlds.linux.saving import Saver

from ..engine.session_blobs import blob, tokens_of

HERE = MadeBy(b"m" * 32, "engine", "context")
DEVICE = DeviceKey.generate()
SESSION = "model/s1"
OLD, NEW = tokens_of(range(40), [40]), tokens_of(range(60), [40, 20])


class OpenRequest:
    """A runner with one request, which computes on `SESSION`."""

    def __init__(self) -> None:
        self.posted: list[ev.Event] = []

    def is_open(self, session: str) -> bool:
        return session == SESSION

    def post(self, *events: ev.Event) -> None:
        self.posted += events


def empty_file(directory: Path) -> int:
    return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


@pytest.mark.parametrize("old_is_saved", [False, True])
def test_kv_of_an_open_request_is_saved_and_not_what_it_went_on_from(
    tmp_path: Path, old_is_saved: bool
) -> None:
    store, runner = SessionStore(None), OpenRequest()
    saver = Saver(store, DEVICE, cast(Runner, runner), saves=True, tell=lambda: None)
    store.keep(HERE, OLD, blob(1 << 16), SESSION)
    if old_is_saved:
        held = store.hold(SESSION)
        assert held is not None
        store.save(held, DEVICE, empty_file(tmp_path))
    # The request stops: the Framework wants its KV saved, while it still is in the request's context.
    saver.save(SESSION, 2)
    assert saver.save_next(empty_file(tmp_path), everything=False) is None
    assert runner.posted == []
    # Now it is in the store.
    store.keep(HERE, NEW, blob(1 << 16), SESSION)
    saver.put_away(SESSION, done=True)
    assert saver.save_next(empty_file(tmp_path), everything=False) is not None
    assert runner.posted == [ev.SessionSaved(SESSION, 2)]
    store.drop(SESSION)
    kept = store.of_id(SESSION)
    assert kept is not None
    assert kept.tokens.ids == NEW.ids
    assert store.state(kept).size == 1 << 16
    store.close()


def test_an_open_request_that_goes_on_is_not_saved_as_it_was_before(tmp_path: Path) -> None:
    store, runner = SessionStore(None), OpenRequest()
    saver = Saver(store, DEVICE, cast(Runner, runner), saves=True, tell=lambda: None)
    store.keep(HERE, OLD, blob(1 << 16), SESSION)
    saver.put_away(SESSION, done=True)
    saver.give_up(SESSION)
    saver.save(SESSION, 3)
    assert saver.save_next(empty_file(tmp_path), everything=False) is None
    assert runner.posted == []
    store.close()

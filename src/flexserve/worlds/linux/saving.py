"""Sessions on their way to storage and back: what the Framework asks for, when the normal world brings files.

The secure process opens no file. What is to be saved waits here; the normal world is told, and comes with an empty file
for each. Encrypting, writing and reading happen on one thread. Knows ids and versions; decides nothing.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from ...engine.sessions import Session, SessionStore
from ...errors import FlexServeError, SessionRefused
from ...framework import events as ev
from ...sealed.session_file import MadeBy
from .runner import Runner


class Saver:
    """Thread-safe."""

    def __init__(
        self, store: SessionStore, device: Any, runner: Runner, *, saves: bool, tell: Callable[[], None]
    ) -> None:
        """`saves`: there is a storage. `tell`: the normal world is to come for what `save_next` has, and for files that
        are not needed any more."""
        self.store = store
        self._device = device
        self._runner = runner
        self._saves = saves
        self._tell = tell
        self._lock = threading.Lock()
        self._wanted: dict[str, int] = {}  # session -> version, in the order in which they were asked for
        self._stays: set[str] = set()  # KV that could not be taken out of its context
        self._away: set[str] = set()  # KV of suspended requests that is in the store
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="storage", daemon=True).start()

    def do(self, work: Callable[[], None]) -> None:
        """Have something done on the storage thread."""
        self._work.put(work)

    def _run(self) -> None:
        while True:
            self._work.get()()

    # Effects

    def save(self, session: str, version: int) -> None:
        """Save it as soon as its KV is in the store and there is a file for it."""
        known = self.store.of_id(session)
        there = known is not None and known.memory is not None and not self._in_context(session)
        with self._lock:
            impossible = not self._saves or session in self._stays
            if there or not impossible:
                self._wanted[session] = version
        if there and known is not None and known.saved is not None:
            self._take(session)
            self._runner.post(ev.SessionSaved(session, version))
        elif impossible or not (there or self._runner.is_open(session)):
            self._take(session)
            self._runner.post(ev.SessionSaveFailed(session, version))
        elif there:
            self._tell()

    def put_away(self, session: str, *, done: bool) -> None:
        """The KV of a suspended request is in the store now, or stays in its context."""
        if done:
            with self._lock:
                self._away.add(session)
                wanted = session in self._wanted
            if wanted:
                self._tell()
            return
        with self._lock:
            self._stays.add(session)
        self._fail(session)

    def give_up(self, session: str) -> None:
        """Its request goes on, or has ended: what was to be saved is an older version."""
        with self._lock:
            self._stays.discard(session)
            self._away.discard(session)
        self._fail(session)

    def cannot(self) -> None:
        """The normal world has no file."""
        with self._lock:
            wanted = list(self._wanted)
        for session in wanted:
            self._fail(session)

    def _in_context(self, session: str) -> bool:
        """Whether a request computes on it: what the store has under this id is an older version, or nothing."""
        with self._lock:
            away = session in self._away
        return not away and self._runner.is_open(session)

    def _fail(self, session: str) -> None:
        version = self._take(session)
        if version is not None:
            self._runner.post(ev.SessionSaveFailed(session, version))

    def _take(self, session: str) -> int | None:
        with self._lock:
            return self._wanted.pop(session, None)

    def restore(self, session: str) -> None:
        """Read it into memory."""
        self.do(lambda: self._restore(session))

    def _restore(self, session: str) -> None:
        known = self.store.of_id(session)
        try:
            if known is None:
                raise SessionRefused(f"session {session} is not in storage")
            self.store.state(known)
        except (FlexServeError, OSError, MemoryError):  # it costs a recompute
            self._runner.post(ev.SessionRestoreFailed(session))
        else:
            self._runner.post(ev.SessionRestored(session))

    def drop(self, session: str) -> None:
        """Zero its memory and give it back."""
        self.store.drop(session)

    def forget(self, session: str) -> None:
        """Its file is not needed any more."""
        self.store.forget_id(session)
        if self._saves:
            self._tell()

    # On the storage thread

    def save_next(self, fd: int, *, everything: bool) -> bytes | None:
        """Write the next session into an empty file, which is taken over; its id, None when there is none.

        `everything`: also those that nobody has asked for. Raises `StorageFailure`.
        """
        with self._lock:
            candidates = dict(self._wanted)
        if everything:
            candidates |= dict.fromkeys((s for s in self.store.in_memory() if s not in candidates), -1)
        for session, version in candidates.items():
            if version >= 0 and self._in_context(session):
                continue
            held = self.store.hold(session)
            if held is None:
                continue
            if held.saved is not None:
                self.store.release(held)
                continue
            self._take(session)
            try:
                salt = self.store.save(held, self._device, fd)
            except BaseException:
                if version >= 0:
                    self._runner.post(ev.SessionSaveFailed(session, version))
                raise
            if version >= 0:
                self._runner.post(ev.SessionSaved(session, version))
            return salt
        os.close(fd)
        return None

    def believe(self, fd: int) -> bool:
        """Know of a saved session, if it is this device's."""
        try:
            self.store.add_saved(self._device, fd)
        except SessionRefused:
            return False
        self.find()
        return True

    def find(self) -> None:
        """Tell of sessions in storage that belong to a registered model, and were not told of."""
        for name, model in self._runner.models().items():
            if model.sessions is None:
                continue

            def give(session: Session, model_name: str = name) -> str:
                return self._runner.name_found(model_name, session.tokens.name, self.store.has)

            for session in self.store.name_saved(model.sessions.made_by, give):
                tokens = session.tokens.ids
                prefix = self._runner.prefix_of(name, tokens)
                self._runner.post(ev.SessionFound(session.id, name, len(tokens), prefix))

    def unname(self, made_by: MadeBy, model: str) -> None:
        """A model is closed: its saved sessions are nobody's until it is registered again."""
        self.store.unname(made_by, f"{model}/")

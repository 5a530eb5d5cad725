"""One model's view of the sessions: from a prompt to a context that has part of it, and back.

Knows contexts and the store; does not know who decides what is kept (sessions.py).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SessionRefused
from ..sealed.session_file import MadeBy, Tokens
from .sessions import MIN_REUSE_TOKENS, SessionStore, StateMemory, Sums


@dataclass(frozen=True)
class Match:
    """A session that a prompt may go on from."""

    id: str
    cut: int  # so many tokens of it
    name: str  # the client's, of the conversation
    whole: bool  # the prompt has all of its tokens


class ModelSessions:
    """One model's view of the store: from a prompt to a context that has part of it, and back."""

    def __init__(self, store: SessionStore, made_by: MadeBy, *, whole_only: bool) -> None:
        """`whole_only`: of models that keep a running state and not every token's keys and values."""
        self._store = store
        self._made_by = made_by
        self._whole_only = whole_only

    def resume(self, context: Any, prompt: Sequence[int]) -> tuple[int, float]:
        """Put the KV of as many of the prompt's tokens as are kept into an empty context; how many, and the seconds it
        took. A session that cannot be used is forgotten, and the next best one tried: it costs time only."""
        started = time.perf_counter()
        while found := self._store.find(self._made_by, prompt, whole_only=self._whole_only):
            session = found.session
            try:
                memory = self._store.state(session)
                if context.set_state(memory.address, memory.size, session.tokens, found.cut):
                    return found.cut, time.perf_counter() - started
            except SessionRefused:
                pass
            except (OSError, MemoryError):  # no memory for it now: it may be of use later
                break
            finally:
                self._store.release(session)
            self._store.forget(session)
        context.clear()
        return 0, 0.0

    def parts(self, prompt: Sequence[int], cut: int) -> list[list[int]]:
        """What is still to compute, in pieces that end where a batch should."""
        branch = 0 if self._whole_only else self._store.branch(self._made_by, prompt, cut)
        rest = [prompt[cut:branch], prompt[branch:]] if branch else [prompt[cut:]]
        return [list(part) for part in rest]

    def keep(self, context: Any, name: str, key: str = "", *, least: int = MIN_REUSE_TOKENS) -> bool:
        """Keep what the context has, as the newest state of the conversation, if it can be kept at all; whether it
        was."""
        tokens = Tokens(array("i", context.tokens), array("i", context.batches), name)
        size = context.state_bytes() if len(tokens.ids) >= least and context.is_whole() else 0
        if not self._store.fits(size):
            return False
        self._store.make_room(size)
        try:
            memory = StateMemory(size)
        except OSError:
            return False
        if not context.get_state(memory.address, size):
            memory.close()
            return False
        self._store.keep(self._made_by, tokens, memory, key, owner=self)
        return True

    # For the Framework

    def match(self, prompt: Sequence[int]) -> Match | None:
        """The session that has most of the prompt's tokens; None where none has enough of them."""
        found = self._store.find(self._made_by, prompt, whole_only=self._whole_only)
        if found is None:
            return None
        session = found.session
        self._store.release(session)
        common = session.common(np.asarray(prompt, np.int32))
        return Match(session.id, found.cut, session.tokens.name, whole=common == len(session.tokens.ids))

    def go_on(self, context: Any, key: str, cut: int) -> bool:
        """Put the first `cut` tokens of a session that is in memory into an empty context."""
        session = self._store.hold(key)
        if session is None:
            return False
        try:
            assert session.memory is not None
            memory = session.memory
            return bool(context.set_state(memory.address, memory.size, session.tokens, cut))
        finally:
            self._store.release(session)

    def put_away(self, context: Any, name: str, key: str) -> bool:
        """Take all that the context has out of it; False, and then it is still there, where that cannot be."""
        if not self.keep(context, name, key, least=1):
            return False
        context.clear()
        return True

    def bring_back(self, context: Any, key: str) -> bool:
        """Undo `put_away`; the session is the context's again."""
        session = self._store.of_id(key)
        if session is None or not self.go_on(context, key, len(session.tokens.ids)):
            return False
        self._store.drop(key)
        return True

    def drop(self, key: str) -> None:
        """A session's memory is not needed: a context has its tokens, or will have others."""
        self._store.drop(key)

    @property
    def store(self) -> SessionStore:
        return self._store

    @property
    def made_by(self) -> MadeBy:
        return self._made_by

    def sums(self) -> Sums:
        return self._store.sums(self._made_by, self)

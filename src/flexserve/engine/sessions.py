"""Sessions: the KV of conversations between their turns, each in memory of its own.

Knows token ids, batch boundaries, blobs that llama.cpp made, and which blob a prompt can go on from. Does not know
what is in a blob, nor how files get their descriptors. A blob is llama.cpp's own form of one sequence's state, so a
session that goes gives its pages back to the kernel at once; the KV that llama.cpp computes on is another memory.

*Batch boundaries.* A token's KV depends, in its last bits, on how many tokens were computed with it. So a prompt goes
on from a session only at a boundary between two of its batches: then the answer is bit for bit what llama.cpp
computes from the same batches.

*Who decides.* With a limit, the order of use does. Without one (`limit_bytes=None`) the Framework decides what is kept,
saved, dropped and restored, by the sessions' ids; then nothing goes here by itself.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import SessionRefused
from ..sealed.session_file import MadeBy, SavedSession, Tokens, open_session, write

MIN_REUSE_TOKENS = 16  # fewer are not worth another batch boundary
# So many in common with another conversation: the next one shall find a boundary there. Agents repeat system prompts of
# 64 tokens and more.
MIN_BRANCH_TOKENS = 48
DEFAULT_LIMIT_BYTES = 512 << 20
MAX_SESSIONS = 256  # each saved one keeps a descriptor open


class StateMemory:
    """Secure memory for one blob: in no dump and in no child; zeroed and given back when it is closed."""

    def __init__(self, size: int) -> None:
        """Raises `OSError` when there is none."""
        self.size = size
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):
            with suppress(OSError):  # a kernel without huge pages
                self._map.madvise(advice)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @contextmanager
    def view(self) -> Iterator[memoryview]:
        """The bytes, for the block only."""
        with memoryview(self._map) as view:
            yield view

    def close(self) -> None:
        """Zero it, then unmap it. May be called twice."""
        if not self._map.closed:
            ctypes.memset(self.address, 0, self.size)
            self._map.close()


@dataclass(eq=False)
class Session:
    """One conversation's KV. In memory, saved, or both."""

    made_by: MadeBy
    tokens: Tokens
    memory: StateMemory | None
    saved: SavedSession | None = None
    fd: int = -1  # of `saved`
    last_used: int = 0
    readers: int = 0  # somebody copies or saves its memory: it stays
    id: str = ""  # of the Framework's
    owner: object = (
        None  # whose model's it is, of those that could use it; None: not known since it was saved
    )
    leaves: bool = False  # its memory goes as soon as nobody reads it
    ends: Any = field(init=False)  # after how many tokens a batch ends

    def __post_init__(self) -> None:
        self.ends = np.cumsum(np.asarray(self.tokens.batches, np.int64))

    def common(self, prompt: Any) -> int:
        """How many tokens it begins with are those of the prompt (an int32 array)."""
        ids = np.frombuffer(self.tokens.ids, np.int32)[: len(prompt)]
        differ = np.flatnonzero(ids != prompt[: len(ids)])
        return int(differ[0]) if len(differ) else len(ids)

    def cut(self, common: int, prompt_tokens: int, *, whole_only: bool) -> int:
        """Where the prompt can go on: the last boundary within what they have in common, with a token left to
        compute. `whole_only`: a state that cannot be shortened."""
        most = min(common, prompt_tokens - 1)
        at = int(np.searchsorted(self.ends, most, "right"))
        if at == 0 or (whole_only and at < len(self.ends)):
            return 0
        return int(self.ends[at - 1])


@dataclass(frozen=True)
class Found:
    """A session to go on from, held until `SessionStore.release`."""

    session: Session
    cut: int  # so many tokens of it


@dataclass(frozen=True)
class Sums:
    """What one model's sessions are, for `ps`."""

    sessions: int = 0
    memory_bytes: int = 0
    saved: int = 0


class SessionStore:
    """All sessions of a secure world. Thread-safe; one thread at a time finds, keeps, saves and restores."""

    def __init__(self, limit_bytes: int | None = DEFAULT_LIMIT_BYTES) -> None:
        """`limit_bytes`: of memory for blobs. 0 keeps nothing; None: the Framework decides."""
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self._uses = itertools.count(1)
        self._gone: list[bytes] = []  # salts of files that nobody needs any more

    # Finding

    def find(self, made_by: MadeBy, prompt: Sequence[int], *, whole_only: bool = False) -> Found | None:
        """The session with most of the prompt's tokens, held; None where none has enough of them."""
        wanted = np.asarray(prompt, np.int32)
        with self._lock:
            best: Found | None = None
            for session in self._of(made_by):
                cut = session.cut(session.common(wanted), len(prompt), whole_only=whole_only)
                better = best is None or (cut, session.memory is not None) > (
                    best.cut,
                    best.session.memory is not None,
                )
                if cut >= MIN_REUSE_TOKENS and better:
                    best = Found(session, cut)
            if best is not None:
                best.session.readers += 1
                best.session.last_used = next(self._uses)
            return best

    def branch(self, made_by: MadeBy, prompt: Sequence[int], cut: int) -> int:
        """Where this prompt leaves what an earlier one began with too (a system prompt), if that is far enough behind
        `cut`: a batch should end there, so that the next prompt can go on from there. 0: nowhere."""
        wanted = np.asarray(prompt, np.int32)
        with self._lock:
            commons = [s.common(wanted) for s in self._of(made_by)]
        at = max((c for c in commons if c < len(prompt)), default=0)
        return at if at - cut >= MIN_BRANCH_TOKENS else 0

    def release(self, session: Session) -> None:
        with self._lock:
            session.readers -= 1
            if session.leaves and not session.readers:
                self._leave(session)

    def state(self, session: Session) -> StateMemory:
        """A held session's blob; from its file if it is not in memory. Raises `SessionRefused`, `OSError`."""
        if session.memory is None:
            assert session.saved is not None
            self.make_room(session.saved.state_bytes)
            memory = StateMemory(session.saved.state_bytes)
            try:
                with memory.view() as view:
                    session.saved.read_state(session.fd, view)
            except BaseException:
                memory.close()
                raise
            with self._lock:
                session.memory = memory
        return session.memory

    def has(self, key: str) -> bool:
        """Whether there is a session of this id; for `name_saved`, which has the lock."""
        return self._by_id(key) is not None

    def unname(self, made_by: MadeBy, prefix: str) -> None:
        """Sessions of a model whose ids begin like this have none any more."""
        with self._lock:
            for session in self._of(made_by):
                if session.id.startswith(prefix):
                    session.id = ""

    # Keeping

    def keep(
        self, made_by: MadeBy, tokens: Tokens, memory: StateMemory, key: str = "", *, owner: object = None
    ) -> Session:
        """Take over a blob. It replaces the session it went on from, and the one of the same name; with a `key`, the
        one of that id only."""
        session = Session(made_by, tokens, memory, last_used=next(self._uses), id=key, owner=owner)
        ids = np.frombuffer(tokens.ids, np.int32)
        with self._lock:
            if key:
                self._forget_id(key)
                self._sessions.append(session)
                return session
            for old in self._of(made_by):
                same = bool(tokens.name) and old.tokens.name == tokens.name
                longer = len(old.tokens.ids) <= len(ids) and old.common(ids) == len(old.tokens.ids)
                if (same or (longer and not old.tokens.name)) and not old.readers:
                    self._forget(old)
            self._sessions.append(session)
            while len(self._sessions) > MAX_SESSIONS and (rest := self._idle(self._sessions)):
                self._forget(rest[0])
        self.make_room(0)
        return session

    def make_room(self, nbytes: int) -> None:
        """Drop sessions from memory, least recently used first, until `nbytes` more fit the limit."""
        if self.limit_bytes is None:
            return
        with self._lock:
            over = self._memory_bytes() + nbytes - self.limit_bytes
            if over > 0:
                self._drop(over, lambda _: True)

    def fits(self, nbytes: int) -> bool:
        """Whether one session of this size may be kept at all."""
        return nbytes > 0 and (self.limit_bytes is None or nbytes <= self.limit_bytes)

    # By id, for the Framework

    def of_id(self, key: str) -> Session | None:
        """The session of this id."""
        with self._lock:
            return self._by_id(key)

    def hold(self, key: str) -> Session | None:
        """The session of this id, held until `release`; None when it is not in memory."""
        with self._lock:
            session = self._by_id(key)
            if session is None or session.memory is None or session.leaves:
                return None
            session.readers += 1
            return session

    def drop(self, key: str) -> None:
        """Zero its memory and give it back, as soon as nobody reads it; without a file it is forgotten."""
        with self._lock:
            session = self._by_id(key)
            if session is None:
                return
            if session.readers:
                session.leaves = True
            else:
                self._leave(session)

    def forget_id(self, key: str) -> None:
        """Know nothing of it any more, nor of its file."""
        with self._lock:
            self._forget_id(key)

    def in_memory(self) -> list[str]:
        """Ids of the sessions in memory that are not saved, least recently used first."""
        with self._lock:
            return [s.id for s in self._by_use(self._sessions) if s.saved is None and s.memory]

    def name_saved(self, made_by: MadeBy, give: Callable[[Session], str]) -> list[Session]:
        """Sessions of a model that have no id yet get one from `give`; which these are."""
        with self._lock:
            new = [s for s in self._of(made_by) if not s.id]
            for session in new:
                session.id = give(session)
            return new

    # Giving memory back

    def recall(self, nbytes: int, *, saved: bool) -> int:
        """Zero and give back `nbytes` or a little more, least recently used first: of sessions that are `saved`
        already, or of those that are not, which are lost. Never of one that is being read. Returns the bytes given
        back."""
        with self._lock:
            return self._drop(nbytes, lambda s: (s.saved is not None) == saved) if nbytes > 0 else 0

    def forget(self, session: Session) -> None:
        """Drop it from memory and know of no file any more."""
        with self._lock:
            if session in self._sessions:
                self._forget(session)

    def close(self) -> None:
        """Zero everything. Nothing may be held."""
        with self._lock:
            for session in list(self._sessions):
                self._forget(session)

    # Saving

    def save_one(self, device: Any, fd: int) -> bytes | None:
        """Write the least recently used session that is not saved yet into an empty file; its id, or None when all are.

        Takes the descriptor over (closes it when nothing was written). Raises `StorageFailure`.
        """
        with self._lock:
            session = next(
                iter(s for s in self._by_use(self._sessions) if s.saved is None and s.memory), None
            )
            if session is None:
                os.close(fd)
                return None
            session.readers += 1
        return self.save(session, device, fd)

    def save(self, session: Session, device: Any, fd: int) -> bytes:
        """Write a held session into an empty file, and release it; the file's id.

        Takes the descriptor over (closes it when nothing was written). Raises `StorageFailure`.
        """
        try:
            assert session.memory is not None
            with session.memory.view() as view:
                write(fd, session.tokens, view, session.made_by, device)
            saved = open_session(fd, device)
        except BaseException:
            os.close(fd)
            self.release(session)
            raise
        with self._lock:
            if session in self._sessions:
                session.saved, session.fd = saved, fd
            else:  # it was replaced meanwhile
                os.close(fd)
                self._gone.append(saved.salt)
        self.release(session)
        return saved.salt

    def add_saved(self, device: Any, fd: int) -> SavedSession:
        """Believe a file, or not. Takes the descriptor over. Raises `SessionRefused`."""
        try:
            saved = open_session(fd, device)
            with self._lock:
                known = any(s.saved is not None and s.saved.salt == saved.salt for s in self._sessions)
                if known or len(self._sessions) >= MAX_SESSIONS:
                    raise SessionRefused("the saved session is known already, or there are too many")
                self._sessions.append(Session(saved.made_by, saved.tokens, None, saved, fd))
        except BaseException:
            os.close(fd)
            raise
        return saved

    def gone(self) -> list[bytes]:
        """Ids of files that may be deleted; each is said once."""
        with self._lock:
            gone, self._gone = self._gone, []
        return gone

    # Looking

    @property
    def memory_bytes(self) -> int:
        with self._lock:
            return self._memory_bytes()

    def sums(self, made_by: MadeBy, owner: object) -> Sums:
        """Of the sessions that this owner kept, not those another name of the same model did."""
        with self._lock:
            mine = [s for s in self._of(made_by) if s.owner is owner or s.owner is None]
            return Sums(
                len(mine),
                sum(s.memory.size for s in mine if s.memory),
                sum(s.saved is not None for s in mine),
            )

    def _memory_bytes(self) -> int:
        return sum(s.memory.size for s in self._sessions if s.memory)

    def _of(self, made_by: MadeBy) -> list[Session]:
        return [s for s in self._sessions if s.made_by == made_by]

    def _by_use(self, sessions: list[Session]) -> list[Session]:
        return sorted(sessions, key=lambda s: s.last_used)

    def _idle(self, sessions: list[Session]) -> list[Session]:
        return [s for s in self._by_use(sessions) if not s.readers]

    def _drop(self, nbytes: int, which: Callable[[Session], bool]) -> int:
        freed = 0
        for session in self._idle(self._sessions):
            if freed >= nbytes:
                break
            if session.memory is None or not which(session):
                continue
            freed += session.memory.size
            if session.saved is None:
                self._forget(session)
            else:
                session.memory.close()
                session.memory = None
        return freed

    def _by_id(self, key: str) -> Session | None:
        return next((s for s in self._sessions if s.id == key), None)

    def _leave(self, session: Session) -> None:
        session.leaves = False
        if session.memory is not None:
            session.memory.close()
            session.memory = None
        if session.saved is None and session in self._sessions:
            self._sessions.remove(session)

    def _forget_id(self, key: str) -> None:
        session = self._by_id(key)
        if session is not None:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        self._sessions.remove(session)
        if session.readers:
            session.leaves = True
        elif session.memory is not None:
            session.memory.close()
            session.memory = None
        if session.saved is not None:
            os.close(session.fd)
            self._gone.append(session.saved.salt)
            session.saved = None

"""The Framework's state machines: what may follow what, in one place.

Theory of operation
===================

Four machines, each with many instances:

1. a *segment* of a model's weights,
2. a *session*: one conversation's KV,
3. a *request*,
4. a *model*.

Each table says (state, trigger) -> state. A pair that is not in a table cannot happen: `after` raises
`Impossible`, which is a mistake of ours and never of a client. Triggers come from two sides:

a) *our decisions*: the Framework takes the step and sends out an effect in the same breath (`load` sends
   `LoadRange`, `claim` sends `Recall`, `save` sends `SaveSession` ...);
b) *reports*: an event says what became of an effect, or what happened without one (compute touched an
   absent page, the kernel took a lazy one).

Reports about one model's segments arrive in the order in which they happened in its arena; nothing else is
ordered. So every pair that a race can produce is in the tables, often as a step that stays where it is.

The machines are coupled by memory only. What a state costs is fixed here too: `HELD` states count against
the budget, `LEAVING` ones will stop doing so without another decision. After each event the rest of the
Framework looks at these sums, and decides until it has nothing more to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum, StrEnum
from typing import TypeVar


class Impossible(AssertionError):
    """A pair of state and trigger that no table has: the executor reported what cannot have happened."""


class SegmentState(IntEnum):
    """One segment as the Framework knows it. The arena's LOADING, RESIDENT and LAZY, and what is under way."""

    ABSENT = 0  # no page
    LOADING = 1  # asked for, or found on its way: its room is taken
    RESIDENT = 2  # firm
    LAZY = 3  # valid, but the kernel may take it
    CLAIMED = 4  # chosen for reclaim, not yet scrubbed


class SegmentTrigger(StrEnum):
    """The first four are decisions, the others reports."""

    LOAD = "load"
    CLAIM = "claim"
    HAND = "hand"
    PLACED = "placed"
    STOPPED = "stopped"  # will not be loaded: the plan was cleared
    RECALLED = "recalled"  # zeroed and given back
    SPARED = "spared"  # a recall passed it over, because it was on its way
    PINNED = "pinned"  # firm again
    LOST = "lost"  # the kernel took pages while it was lazy


class SessionState(StrEnum):
    """Where a session's KV exists."""

    GONE = "gone"  # nowhere
    OPEN = "open"  # in memory, and a request computes on it
    RESIDENT = "resident"  # in memory only, idle
    SAVING = "saving"  # in memory, and being encrypted and written
    SAVED = "saved"  # in memory, and the same in storage: as cheap to take as weights
    DROPPING = "dropping"  # in storage; its memory is being zeroed and given back
    STORED = "stored"  # in storage only
    RESTORING = "restoring"  # in storage, and being read into memory
    FREEING = "freeing"  # its memory is being given back, and no storage has it


class SessionTrigger(StrEnum):
    """`open` to `forget` are decisions, the others reports."""

    OPEN = "open"
    CLOSE = "close"  # its request has finished, or is suspended
    SAVE = "save"
    DROP = "drop"
    RESTORE = "restore"
    DISCARD = "discard"
    FORGET = "forget"
    FOUND = "found"  # in storage, when the server started
    SAVED = "saved"
    SAVE_FAILED = "save_failed"
    RESTORED = "restored"
    RESTORE_FAILED = "restore_failed"
    DROPPED = "dropped"


class RequestState(StrEnum):
    """One request, from its arrival to its end."""

    GONE = "gone"  # not arrived, or ended
    QUEUED = "queued"
    PREPARING = "preparing"  # template and tokeniser run, weights are being loaded
    WAITING = "waiting"  # for its session to be restored, or for memory for its KV
    RUNNING = "running"
    SUSPENDED = "suspended"  # between two tokens, for want of memory for its KV


class RequestTrigger(StrEnum):
    """`finish` and `cancel` are reports, the others decisions."""

    ARRIVE = "arrive"
    START = "start"
    WAIT = "wait"
    COMPUTE = "compute"
    SUSPEND = "suspend"
    RESUME = "resume"
    REFUSE = "refuse"
    FINISH = "finish"
    CANCEL = "cancel"


class ModelState(StrEnum):
    """One registered model."""

    GONE = "gone"
    READY = "ready"
    POISONED = "poisoned"  # a segment was not authentic: no request is accepted
    LEAVING = "leaving"  # unregistered: what runs ends, sessions are saved
    CLOSING = "closing"  # its memory is being given back


class ModelTrigger(StrEnum):
    REGISTER = "register"
    POISON = "poison"
    REMOVE = "remove"
    CLOSE = "close"
    CLOSED = "closed"


_S, _ST = SegmentState, SegmentTrigger
SEGMENT: Mapping[tuple[SegmentState, SegmentTrigger], SegmentState] = {
    (_S.ABSENT, _ST.LOAD): _S.LOADING,
    (_S.ABSENT, _ST.PLACED): _S.RESIDENT,  # compute touched it, and the loader served the fault
    (_S.ABSENT, _ST.LOST): _S.ABSENT,
    (_S.ABSENT, _ST.STOPPED): _S.ABSENT,
    (_S.LOADING, _ST.PLACED): _S.RESIDENT,
    (_S.LOADING, _ST.STOPPED): _S.ABSENT,
    (_S.LOADING, _ST.LOST): _S.LOADING,
    (_S.RESIDENT, _ST.CLAIM): _S.CLAIMED,
    (_S.RESIDENT, _ST.HAND): _S.LAZY,
    (_S.RESIDENT, _ST.PLACED): _S.RESIDENT,
    (_S.RESIDENT, _ST.PINNED): _S.RESIDENT,
    (_S.RESIDENT, _ST.STOPPED): _S.RESIDENT,  # a fault was served before the plan came to it
    (_S.RESIDENT, _ST.LOST): _S.ABSENT,
    (_S.LAZY, _ST.CLAIM): _S.CLAIMED,
    (_S.LAZY, _ST.PINNED): _S.RESIDENT,
    (_S.LAZY, _ST.PLACED): _S.RESIDENT,  # the kernel took it, compute touched it
    (_S.LAZY, _ST.LOST): _S.ABSENT,
    (_S.LAZY, _ST.STOPPED): _S.LAZY,
    (_S.CLAIMED, _ST.RECALLED): _S.ABSENT,
    (_S.CLAIMED, _ST.SPARED): _S.LOADING,
    (_S.CLAIMED, _ST.PLACED): _S.CLAIMED,  # the recall comes after it
    (_S.CLAIMED, _ST.PINNED): _S.CLAIMED,
    (_S.CLAIMED, _ST.STOPPED): _S.CLAIMED,
    (_S.CLAIMED, _ST.LOST): _S.CLAIMED,  # the recall finds nothing, and says so
}

_K, _KT = SessionState, SessionTrigger
SESSION: Mapping[tuple[SessionState, SessionTrigger], SessionState] = {
    (_K.GONE, _KT.OPEN): _K.OPEN,
    (_K.GONE, _KT.FOUND): _K.STORED,
    (_K.OPEN, _KT.CLOSE): _K.RESIDENT,
    (_K.RESIDENT, _KT.OPEN): _K.OPEN,
    (_K.RESIDENT, _KT.SAVE): _K.SAVING,
    (_K.RESIDENT, _KT.DISCARD): _K.FREEING,
    (_K.SAVING, _KT.SAVED): _K.SAVED,
    (_K.SAVING, _KT.SAVE_FAILED): _K.RESIDENT,
    (_K.SAVING, _KT.OPEN): _K.OPEN,  # what is being saved is an older version
    (_K.SAVING, _KT.CLOSE): _K.RESIDENT,  # its suspended request finished after all: KV changed
    (_K.SAVING, _KT.DISCARD): _K.FREEING,  # the recall's deadline is over
    (_K.SAVED, _KT.OPEN): _K.OPEN,
    (_K.SAVED, _KT.CLOSE): _K.RESIDENT,
    (_K.SAVED, _KT.DROP): _K.DROPPING,
    (_K.DROPPING, _KT.DROPPED): _K.STORED,
    (_K.STORED, _KT.RESTORE): _K.RESTORING,
    (_K.STORED, _KT.OPEN): _K.OPEN,  # overwritten: the prompt does not continue it
    (_K.STORED, _KT.FORGET): _K.GONE,
    (_K.RESTORING, _KT.RESTORED): _K.SAVED,
    (_K.RESTORING, _KT.RESTORE_FAILED): _K.GONE,
    (_K.FREEING, _KT.SAVED): _K.DROPPING,  # the save was faster than the drop
    (_K.FREEING, _KT.SAVE_FAILED): _K.FREEING,
    (_K.FREEING, _KT.DROPPED): _K.GONE,
    (_K.RESIDENT, _KT.CLOSE): _K.RESIDENT,
}

_R, _RT = RequestState, RequestTrigger
REQUEST: Mapping[tuple[RequestState, RequestTrigger], RequestState] = {
    (_R.GONE, _RT.ARRIVE): _R.QUEUED,
    (_R.QUEUED, _RT.START): _R.PREPARING,
    (_R.QUEUED, _RT.REFUSE): _R.GONE,
    (_R.QUEUED, _RT.CANCEL): _R.GONE,
    (_R.PREPARING, _RT.COMPUTE): _R.RUNNING,
    (_R.PREPARING, _RT.WAIT): _R.WAITING,
    (_R.PREPARING, _RT.REFUSE): _R.GONE,
    (_R.PREPARING, _RT.FINISH): _R.GONE,  # the template failed, or the client went away
    (_R.WAITING, _RT.COMPUTE): _R.RUNNING,
    (_R.WAITING, _RT.REFUSE): _R.GONE,
    (_R.WAITING, _RT.CANCEL): _R.GONE,
    (_R.WAITING, _RT.FINISH): _R.GONE,  # the client went away while it was being prepared
    (_R.RUNNING, _RT.SUSPEND): _R.SUSPENDED,
    (_R.RUNNING, _RT.FINISH): _R.GONE,
    (_R.SUSPENDED, _RT.RESUME): _R.RUNNING,
    (_R.SUSPENDED, _RT.FINISH): _R.GONE,  # it ended before it could be stopped
    (_R.SUSPENDED, _RT.REFUSE): _R.GONE,
    (_R.SUSPENDED, _RT.CANCEL): _R.GONE,
}

_M, _MT = ModelState, ModelTrigger
MODEL: Mapping[tuple[ModelState, ModelTrigger], ModelState] = {
    (_M.GONE, _MT.REGISTER): _M.READY,
    (_M.READY, _MT.POISON): _M.POISONED,
    (_M.READY, _MT.REMOVE): _M.LEAVING,
    (_M.POISONED, _MT.POISON): _M.POISONED,
    (_M.POISONED, _MT.REMOVE): _M.LEAVING,
    (_M.LEAVING, _MT.POISON): _M.LEAVING,
    (_M.LEAVING, _MT.REMOVE): _M.LEAVING,
    (_M.LEAVING, _MT.CLOSE): _M.CLOSING,
    (_M.CLOSING, _MT.CLOSED): _M.GONE,
}

# What a state costs.
SEGMENT_HELD = frozenset({_S.LOADING, _S.RESIDENT, _S.LAZY, _S.CLAIMED})
SESSION_HELD = frozenset({_K.OPEN, _K.RESIDENT, _K.SAVING, _K.SAVED, _K.DROPPING, _K.RESTORING, _K.FREEING})
SESSION_LEAVING = frozenset({_K.DROPPING, _K.FREEING})
SESSION_STORED = frozenset({_K.SAVED, _K.DROPPING, _K.STORED, _K.RESTORING})

S = TypeVar("S", bound=Enum)
T = TypeVar("T", bound=Enum)


def after(table: Mapping[tuple[S, T], S], state: S, trigger: T) -> S:
    """The state that follows. Raises `Impossible`."""
    try:
        return table[state, trigger]
    except KeyError:
        raise Impossible(f"{type(state).__name__} {state.name}: {trigger.name} cannot happen here") from None

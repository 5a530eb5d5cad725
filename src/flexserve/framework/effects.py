"""What the Framework asks for, and why. A world executes effects; the Framework hears of the outcome by events.

Effects of one call are executed in their order. Those of one session, and of one model, stay in order across
calls too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from .order import Range, Ranges


class Priority(IntEnum):
    """What a loader does first."""

    ROWS = 0  # embedding rows of the prompt: compute begins with them
    REQUEST = 1  # weights of a request that computes
    PREFETCH = 2  # the next model of a workflow
    REFILL = 3  # the background: stage 2


@dataclass(frozen=True)
class LoadRange:
    """Load these segments, in this order, behind what was asked for with the same priority.

    Reported as PLACED. Faults are served without being asked."""

    model: str
    ranges: Ranges | tuple[Range, ...]
    priority: Priority


@dataclass(frozen=True)
class StopLoading:
    """Forget what has not begun; report it as STOPPED (also when that is nothing)."""

    model: str


@dataclass(frozen=True)
class Recall:
    """Zero these segments and give them back, now. Each is reported as RECALLED or SPARED."""

    model: str
    ranges: Ranges | tuple[Range, ...]


@dataclass(frozen=True)
class HandLazily:
    """Let the kernel take these segments when it wants to. What it took is reported as LOST."""

    model: str
    ranges: Ranges | tuple[Range, ...]


@dataclass(frozen=True)
class Pin:
    """Make lazy segments firm; each is reported as PINNED or LOST."""

    model: str
    ranges: Ranges | tuple[Range, ...]


@dataclass(frozen=True)
class SaveSession:
    """Encrypt and write; report `SessionSaved` or `SessionSaveFailed` with this version."""

    session: str
    version: int


@dataclass(frozen=True)
class RestoreSession:
    """Read, authenticate, decrypt, set; report `SessionRestored` or `SessionRestoreFailed`."""

    session: str


@dataclass(frozen=True)
class DropSession:
    """Zero its KV and give the memory back; report `SessionDropped`."""

    session: str


@dataclass(frozen=True)
class ForgetSession:
    """Delete the stored copy. Not reported."""

    session: str


@dataclass(frozen=True)
class StartRequest:
    """Run template and tokeniser, then report `PromptTokenized` (or `RequestFinished`). `prefetched_bytes`: of weights
    and KV are there because the request was expected."""

    request: str
    prefetched_bytes: int = 0


@dataclass(frozen=True)
class ComputePrompt:
    """Compute, beginning behind the first `reuse_tokens` of `source`; KV may grow to `kv_tokens` tokens."""

    request: str
    session: str
    source: str | None
    reuse_tokens: int
    kv_tokens: int


@dataclass(frozen=True)
class GrantKv:
    """The KV may grow to `kv_tokens`."""

    request: str
    kv_tokens: int


@dataclass(frozen=True)
class SuspendRequest:
    """Stop between two tokens, and keep the KV as it is."""

    request: str


@dataclass(frozen=True)
class ResumeRequest:
    """Go on; the KV is in memory and may grow to `kv_tokens`."""

    request: str
    kv_tokens: int


@dataclass(frozen=True)
class Reject:
    """End the request with this error. Nothing more is reported of it."""

    request: str
    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class FinishCancelled:
    """End a request that does not compute, as its client wished. Nothing more is reported of it."""

    request: str


@dataclass(frozen=True)
class StreamTail:
    """The model does not fit the budget: this much of it is streamed for every token (0: no more)."""

    model: str
    nbytes: int


@dataclass(frozen=True)
class AnswerRecall:
    """`rsmem_reclaim` may return: bytes are chosen. `later_bytes` of them have to be saved first."""

    call: int
    chosen_bytes: int
    later_bytes: int


@dataclass(frozen=True)
class FinishRecall:
    """Everything that this recall chose is back."""

    call: int
    freed_bytes: int


@dataclass(frozen=True)
class AskOffer:
    """`rsmem_alloc`: a request could use this much more. The normal world offers it, or not."""

    nbytes: int


@dataclass(frozen=True)
class CloseModel:
    """Give all its memory back, and report `ModelClosed`."""

    model: str


Effect = (
    LoadRange
    | StopLoading
    | Recall
    | HandLazily
    | Pin
    | SaveSession
    | RestoreSession
    | DropSession
    | ForgetSession
    | StartRequest
    | ComputePrompt
    | GrantKv
    | SuspendRequest
    | ResumeRequest
    | Reject
    | FinishCancelled
    | StreamTail
    | AnswerRecall
    | FinishRecall
    | AskOffer
    | CloseModel
)


class Why(StrEnum):
    """The reason of a decision, as the trace has it; `MEANING` in words."""

    ALREADY_SAVED = "already_saved"
    LEAST_INVOKED = "least_invoked"
    PASSED_BY = "passed_by"
    TAIL_IN_USE = "tail_in_use"
    UNSAVED = "unsaved"
    OPEN_KV = "open_kv"
    DEADLINE = "deadline"
    OVER_BUDGET = "over_budget"
    MODEL_IN_USE = "model_in_use"
    MAKE_ROOM = "make_room"
    STREAMED = "streamed"
    NOT_ENOUGH = "not_enough"
    ENOUGH = "enough"
    PROMPT_ROWS = "prompt_rows"
    BEST_DISTRIBUTION = "best_distribution"
    SAVE_EARLY = "save_early"
    NOBODY_USES_IT = "nobody_uses_it"
    STORAGE_FULL = "storage_full"
    TURN = "turn"
    READY = "ready"
    CONTINUES_SESSION = "continues_session"
    KV_GROWS = "kv_grows"
    KV_FAILED = "kv_failed"
    NO_MEMORY = "no_memory"
    QUEUE_FULL = "queue_full"
    UNKNOWN_MODEL = "unknown_model"
    MODEL_POISONED = "model_poisoned"
    MODEL_LEAVES = "model_leaves"
    CLIENT_LEFT = "client_left"
    CHOSEN = "chosen"
    GIVEN_BACK = "given_back"
    BUDGET_MOVED = "budget_moved"
    STALE = "stale"
    LATE = "late"
    REQUEST_ENDED = "request_ended"
    QUEUED_NEXT = "queued_next"
    HINTED = "hinted"
    PREDICTED = "predicted"
    CAME_TRUE = "came_true"
    WRONG_GUESS = "wrong_guess"
    DECLARED = "declared"
    FORGOTTEN = "forgotten"


MEANING: Mapping[Why, str] = {
    Why.ALREADY_SAVED: "stage 1: a saved session's memory costs a read to get back",
    Why.LEAST_INVOKED: "stage 1: weights of the least invoked model, from its tail",
    Why.PASSED_BY: "stage 1: of a streamed tail, what compute has passed",
    Why.TAIL_IN_USE: "stage 1: weights of a model that computes, those it needs last",
    Why.UNSAVED: "stage 1, last: KV that has to be saved before it can go",
    Why.OPEN_KV: "nothing else is left: the request stops, its KV is saved",
    Why.DEADLINE: "the recall's deadline is over before the save was",
    Why.OVER_BUDGET: "what is on its way does not fit any more",
    Why.MODEL_IN_USE: "a request computes on this model",
    Why.MAKE_ROOM: "background loads give way to a request",
    Why.STREAMED: "the next part of a tail that does not fit the budget",
    Why.NOT_ENOUGH: "the budget is below what the request wants",
    Why.ENOUGH: "the model fits the budget again",
    Why.PROMPT_ROWS: "compute begins with the embedding rows of the prompt",
    Why.BEST_DISTRIBUTION: "stage 2: back to the best distribution",
    Why.SAVE_EARLY: "idle KV is saved early: its memory is as cheap as weights then",
    Why.NOBODY_USES_IT: "idle weights: the kernel may take them without a call",
    Why.STORAGE_FULL: "the oldest saved session makes room in storage",
    Why.TURN: "the request's turn",
    Why.READY: "memory and session are there",
    Why.CONTINUES_SESSION: "the prompt continues a saved session",
    Why.KV_GROWS: "the answer needs more KV",
    Why.KV_FAILED: "the KV could not be saved, so it stays",
    Why.NO_MEMORY: "no memory for the request's KV",
    Why.QUEUE_FULL: "too many requests wait",
    Why.UNKNOWN_MODEL: "no model of that name",
    Why.MODEL_POISONED: "a segment of the model was not authentic",
    Why.MODEL_LEAVES: "the model is unregistered",
    Why.CLIENT_LEFT: "the client went away",
    Why.CHOSEN: "enough is chosen, as far as the floor allows",
    Why.GIVEN_BACK: "what was chosen is back",
    Why.BUDGET_MOVED: "a recall, an offer or the operator moved the budget",
    Why.STALE: "a save of KV that has changed since: it does not count",
    Why.LATE: "a report about something that is over",
    Why.REQUEST_ENDED: "the request ended and its KV cannot be used again",
    Why.QUEUED_NEXT: "prefetch: a request that waits needs this",
    Why.HINTED: "prefetch: the client said which model is next",
    Why.PREDICTED: "prefetch: after this step the client's workflow goes on so",
    Why.CAME_TRUE: "the request that was expected came",
    Why.WRONG_GUESS: "another request came than the one expected, or none",
    Why.DECLARED: "a client declared a workflow",
    Why.FORGOTTEN: "workflows are to be forgotten",
}

Fact = int | float | str | bool


@dataclass(frozen=True)
class Decision:
    """One effect, or None where something was only noticed; the reason; and the numbers behind it."""

    effect: Effect | None
    why: Why
    facts: Mapping[str, Fact] = field(default_factory=dict)

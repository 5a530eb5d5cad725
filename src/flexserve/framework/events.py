"""What the Framework is told. Each event arrives with the time; nothing in here is a decision.

Segments are named by their index in the sealed file, sessions and requests by their ids. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from .order import Range
from .tables import SegmentTrigger
from .weights import Part


@dataclass(frozen=True)
class ModelRegistered:
    """A model is ready to answer; nothing of it is resident. `parts`: in execution order. `label`: what clients call
    it; empty: `model`. `fixed_bytes`: what it has in memory until it is closed, besides weights and KV (an adapter):
    it counts, and no recall takes it."""

    model: str
    parts: tuple[Part, ...]
    kv_bytes_per_token: int
    context_tokens: int
    label: str = ""
    fixed_bytes: int = 0


@dataclass(frozen=True)
class ModelPoisoned:
    """A segment was not authentic. Requests that compute on it end by themselves, with `RequestFinished`."""

    model: str
    code: str
    message: str


@dataclass(frozen=True)
class ModelRemoved:
    """Unregister: no new request; answered by `CloseModel` when nothing of it is in use."""

    model: str


@dataclass(frozen=True)
class ModelClosed:
    """`CloseModel` is done: its memory is back."""

    model: str


@dataclass(frozen=True)
class SegmentsChanged:
    """A report about segments of one model, in the order of its arena."""

    model: str
    what: SegmentTrigger
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class ComputeAt:
    """Compute touched this segment and had to wait, whether it was absent or on its way."""

    model: str
    segment: int


@dataclass(frozen=True)
class RequestArrived:
    """`session`: the id that the client gave, if it gave one. `priority`: higher goes first, within the bound on
    waiting. `client`: a digest of whose request it is. `next_model`: of that client's next request, as clients call
    it; empty: not said."""

    request: str
    model: str
    session: str | None = None
    priority: int = 0
    client: str = ""
    next_model: str = ""


@dataclass(frozen=True)
class PromptTokenized:
    """After `StartRequest`: what the prompt needs. `session` gets the KV of this request; the first
    `matched_tokens` of `source` (it may be the same session) are those of the prompt. `rows`: segments of
    the prompt's embedding rows."""

    request: str
    session: str
    prompt_tokens: int
    source: str | None = None
    matched_tokens: int = 0
    rows: tuple[Range, ...] = ()
    prefix: str = ""  # a digest of how the prompt begins; empty: it is too short to have one


@dataclass(frozen=True)
class DecodeStarted:
    """The first token is there; the source session is no longer read."""

    request: str


@dataclass(frozen=True)
class KvGrowing:
    """The KV is about to hold more than `kv_tokens` that were granted; `tokens`: how many it needs."""

    request: str
    tokens: int


@dataclass(frozen=True)
class RequestPaused:
    """A request that was told to stop has stopped: from now on it touches no weights until it is resumed."""

    request: str


@dataclass(frozen=True)
class RequestFinished:
    """The answer ended, well or not. `tokens` are in its session now; `keep`: the KV may be used again."""

    request: str
    tokens: int
    keep: bool = True


@dataclass(frozen=True)
class RequestCancelled:
    """The client went away. One that computes is stopped by the executor, and reported as finished."""

    request: str


@dataclass(frozen=True)
class SessionFound:
    """A saved session was found in storage at the start. `prefix`: a digest of how its tokens begin."""

    session: str
    model: str
    tokens: int
    prefix: str = ""


@dataclass(frozen=True)
class SessionSaved:
    session: str
    version: int


@dataclass(frozen=True)
class SessionSaveFailed:
    session: str
    version: int


@dataclass(frozen=True)
class SessionRestored:
    session: str


@dataclass(frozen=True)
class SessionRestoreFailed:
    """Not authentic, or not readable: it costs a recompute."""

    session: str


@dataclass(frozen=True)
class SessionDropped:
    """Its memory is zeroed and back."""

    session: str


@dataclass(frozen=True)
class PressureRecall:
    """The normal world takes memory back (`rsmem_reclaim`). After `deadline_s` from now, idle sessions whose
    save is not done are given up; KV of a request never is."""

    call: int
    nbytes: int
    deadline_s: float | None = None


@dataclass(frozen=True)
class Offer:
    """The normal world gives memory (`rsmem_alloc`)."""

    nbytes: int


@dataclass(frozen=True)
class BudgetSet:
    """`flexserve budget SIZE`; None leaves a limit as it is. The floor is at most the cap."""

    nbytes: int | None = None
    cap_bytes: int | None = None
    floor_bytes: int | None = None


@dataclass(frozen=True)
class WorkflowDeclared:
    """A client says which models (as clients call them) it will ask, one after the other."""

    client: str
    name: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class WorkflowsForgotten:
    """Forget everything, one client's, or one line of `Framework.workflows`."""

    client: str | None = None
    entry: str | None = None


@dataclass(frozen=True)
class Tick:
    """Time has passed (`Framework.due` says when one is wanted)."""


Event = (
    ModelRegistered
    | ModelPoisoned
    | ModelRemoved
    | ModelClosed
    | SegmentsChanged
    | ComputeAt
    | RequestArrived
    | PromptTokenized
    | DecodeStarted
    | KvGrowing
    | RequestPaused
    | RequestFinished
    | RequestCancelled
    | SessionFound
    | SessionSaved
    | SessionSaveFailed
    | SessionRestored
    | SessionRestoreFailed
    | SessionDropped
    | PressureRecall
    | Offer
    | BudgetSet
    | WorkflowDeclared
    | WorkflowsForgotten
    | Tick
)

"""The vocabulary every package shares: requests, what comes back, models, page states.

Knows no I/O and no policy. Everything here is a frozen dataclass of plain values, so that it crosses the
channel between the worlds as JSON and is checked on arrival: `__post_init__` holds every rule about a
value, and raises `InvalidRequest` naming the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from .errors import InvalidRequest

PAGE_SIZE = 4096
SEGMENT_SIZE = 1 << 20  # the unit of encryption, loading and recall of weights
ROW_UNIT_SIZE = 16 << 10  # the same for the token embedding, whose rows are fetched singly

MAX_PROMPT_CHARS = 4 << 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 4096
MAX_PRIORITY = 2
MAX_CLIENT_CHARS = 128
MAX_WORKFLOW_STEPS = 16
ROLES = ("system", "user", "assistant", "tool", "developer")


class PageState(StrEnum):
    """Who may access a page (design, "Words"). On linux a resident page may also be LAZY."""

    UNPROTECTED = "unprotected"
    CLAIMED = "claimed"
    FLEX = "flex"
    LAZY = "lazy"


class FinishReason(StrEnum):
    """Why an answer ended: OpenAI's words, plus `cancelled`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


def _check(ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise InvalidRequest(f"{name} must be {rule}")


def check_client(client: str | None) -> None:
    """A client's name of itself; None: it has none. Raises `InvalidRequest`."""
    named = client is None or (1 <= len(client) <= MAX_CLIENT_CHARS and client.isprintable())
    _check(named, "client", f"1 to {MAX_CLIENT_CHARS} printable characters")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy, with no penalty unless one is asked for.

    The defaults are llama.cpp's, without its repeat penalty.
    """

    temperature: float = 0.8
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    repeat_penalty: float = 1.0  # 1: off; over the last 64 tokens
    seed: int | None = None  # None: a fresh one from the OS

    def __post_init__(self) -> None:
        _check(math.isfinite(self.temperature) and 0 <= self.temperature <= 100, "temperature", "0 to 100")
        _check(0 <= self.top_k <= 1 << 20, "top_k", "0 to 1048576")
        _check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        _check(0 <= self.min_p <= 1, "min_p", "0 to 1")
        _check(0.01 <= self.repeat_penalty <= 100, "repeat_penalty", "0.01 to 100")
        _check(self.seed is None or 0 <= self.seed < 1 << 32, "seed", "0 to 4294967295")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def __post_init__(self) -> None:
        _check(self.role in ROLES, "role", f"one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Request:
    """One prompt to answer. Exactly one of `messages`, `prompt`, `token_ids` is given.

    `messages` go through the model's chat template; `prompt` is tokenised as it is; `token_ids` are taken
    as they are. In text from a client, special tokens are never parsed.
    """

    id: str
    model: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_tokens: int | None = None  # None: as many as fit
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    embed: bool = False  # make one embedding of the prompt instead of an answer; not of messages
    session: str | None = None  # the client's name of the conversation: its newest KV replaces the one before
    client: str | None = None  # whose workflow this is a step of; None: the one of all that do not say
    next_model: str | None = None  # a hint: the model of this client's next request
    priority: int = 0  # higher is answered first, within the bound on waiting (docs/workflows.md)

    def __post_init__(self) -> None:
        _check(not (self.embed and self.messages is not None), "embed", "of a prompt or token ids")
        _check(1 <= len(self.id) <= 128, "id", "1 to 128 characters")
        _check(1 <= len(self.model) <= 128, "model", "1 to 128 characters")
        named = self.session is None or (1 <= len(self.session) <= 128 and self.session.isprintable())
        _check(named, "session", "1 to 128 printable characters")
        check_client(self.client)
        named = self.next_model is None or 1 <= len(self.next_model) <= 128
        _check(named, "next_model", "1 to 128 characters")
        _check(abs(self.priority) <= MAX_PRIORITY, "priority", f"-{MAX_PRIORITY} to {MAX_PRIORITY}")
        given = [x for x in (self.messages, self.prompt, self.token_ids) if x is not None]
        _check(len(given) == 1, "messages, prompt, token_ids", "given exactly once")
        if self.messages is not None:
            _check(1 <= len(self.messages) <= MAX_MESSAGES, "messages", f"a list of 1 to {MAX_MESSAGES}")
            chars = sum(len(m.content) for m in self.messages)
            _check(chars <= MAX_PROMPT_CHARS, "messages", f"at most {MAX_PROMPT_CHARS} characters in total")
        if self.prompt is not None:
            _check(len(self.prompt) <= MAX_PROMPT_CHARS, "prompt", f"at most {MAX_PROMPT_CHARS} characters")
        if self.token_ids is not None:
            _check(1 <= len(self.token_ids) <= 1 << 20, "token_ids", "a list of 1 to 1048576")
            _check(all(0 <= t < 1 << 31 for t in self.token_ids), "token_ids", "0 to 2147483647 each")
        _check(self.max_tokens is None or 1 <= self.max_tokens <= 1 << 20, "max_tokens", "1 to 1048576")
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        _check(
            all(1 <= len(s) <= MAX_STOP_CHARS for s in self.stop),
            "stop",
            f"1 to {MAX_STOP_CHARS} characters each",
        )


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went. Seconds are wall time; the cold-start parts are summed over the
    loader's threads and overlap each other and the prefill, which is the point of the pipeline."""

    queue_s: float = 0.0  # accepted to picked up
    tokenize_s: float = 0.0  # template and tokeniser
    prefill_s: float = 0.0  # prompt tokens through the model
    ttft_s: float = 0.0  # accepted to first token
    decode_s: float = 0.0  # first to last token
    total_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    load_bytes: int = 0  # ciphertext read for this request up to its first token
    read_s: float = 0.0
    decrypt_s: float = 0.0
    place_s: float = 0.0
    faults: int = 0  # times compute waited for a page
    fault_wait_s: float = 0.0
    cached_prompt_tokens: int = 0  # of the prompt's, those whose KV was there already
    restore_s: float = 0.0  # bringing that KV back: from memory, or read, authenticated and decrypted
    streamed_bytes: int = (
        0  # the model did not fit the budget: what had to pass through memory for every token
    )
    suspended_s: float = 0.0  # stopped between two tokens, its KV saved, for want of memory
    prefetched_bytes: int = 0  # weights and KV in memory at its start that prefetch had brought for it


@dataclass(frozen=True)
class Token:
    """One generated token. `text` may be empty while a UTF-8 sequence or a stop string is incomplete."""

    id: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of an answer; `text` and `token_ids` are the whole of it.

    `text` begins with the tokens' texts and may be longer: by what was held back to the end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    embedding: bytes = b""  # of a request with `embed`: float32, little-endian, a vector of length 1


Event = Token | Finished


@dataclass(frozen=True)
class ModelInfo:
    """What may be said about a registered model to the normal world."""

    name: str
    model_id: str
    model_version: int
    architecture: str
    quantization: str
    parameters: int
    context_tokens: int
    weight_bytes: int  # in the layout in use: a repacked second copy of a tied embedding counts
    has_chat_template: bool
    execution_layout: bool = False  # from the device's own copy, which needs no repacking
    layout_hint: str = ""  # why not, in one line; empty when it is, or when nothing is to be gained
    makes_embeddings: bool = False  # instead of text
    adapter: str = ""  # the model id of the LoRA adapter that is applied; empty: none


@dataclass(frozen=True)
class DeviceCopyInfo:
    """What `flexserve optimize` made: a model's weights in execution layout; bytes."""

    model_id: str
    model_version: int
    licence_serial: int
    file_bytes: int
    weight_bytes: int
    repacked_bytes: int
    second_output_bytes: int  # a tied output matrix, repacked, beside the embedding; 0: there is none
    tensors: int
    repacked_tensors: int
    engine: str
    cpu: str


@dataclass(frozen=True)
class ModelStatus:
    """A model's memory right now, in bytes."""

    info: ModelInfo
    resident_bytes: int
    lazy_bytes: int
    kv_bytes: int
    poisoned: bool  # a segment failed authentication: no request is answered any more
    requests: int  # answered so far
    last_used_s_ago: float | None
    sessions: int = 0  # kept, in memory or saved
    session_bytes: int = 0  # of memory that they take
    saved_sessions: int = 0  # of them, those that are in storage
    prefix_bytes: int = 0  # resident without a gap, from the first segment in execution order
    budget_bytes: int = 0  # this model's share of the budget in the best distribution
    streamed_bytes: int = (
        0  # of a model that does not fit the budget: what passes through memory for every token
    )
    adapter_bytes: int = 0  # of the LoRA adapter, in memory as long as the model is registered
    least_bytes: int = 0  # the smallest budget with which it answers a short prompt; 0: any will do
    pinned: bool = False  # its weights are taken last


@dataclass(frozen=True)
class Budget:
    """What a secure world may hold, in bytes: weights that are in memory or on their way, adapters, keys and values.

    Recalls lower the soft budget and offers raise it; it stays between the floor and the hard cap.
    """

    soft_bytes: int
    hard_bytes: int
    floor_bytes: int
    held_bytes: int  # right now
    wanted_bytes: int = 0  # what answers in progress could use more; an offer of so much would be taken


@dataclass(frozen=True)
class WorldStatus:
    """What a world says about itself (`flexserve ps`)."""

    world: str
    pid: int
    uptime_s: float
    active_requests: int
    waiting_requests: int
    restarts: int
    flexmem: str  # "userfaultfd", or "none: <reason>" when loading fully before computing
    models: tuple[ModelStatus, ...] = ()
    budget: Budget | None = None  # None: the world has none
    prefetch: bool = False  # what the next request needs is loaded before it comes


@dataclass(frozen=True)
class Workflow:
    """What a client's requests do, as far as it was learned or declared: behind `steps` comes `next_model`."""

    id: str
    client: str  # a digest; empty: of clients that gave no name
    steps: tuple[str, ...]  # models, the newest last
    next_model: str
    seen: int
    confidence: float  # that it happens again, 0 to 1
    predictions: int
    hits: int
    prefetched_bytes: int  # for requests that came
    saved_s: float  # estimated: what those would have loaded, at the measured rate
    last_s_ago: float
    declared: str = ""  # the name under which a client declared it; empty: learned


@dataclass(frozen=True)
class WorkflowReport:
    """What is known of workflows, and what prefetch made of it (`flexserve workflows`)."""

    prefetch: bool  # switched on
    note: str = ""  # why what was saved before is not here; empty: it is, or there was nothing
    predictions: int = 0  # that had come true or not
    hits: int = 0
    prefetched_bytes: int = 0  # for requests that came
    wasted_bytes: int = 0  # for requests that did not
    saved_s: float = 0.0
    workflows: tuple[Workflow, ...] = ()

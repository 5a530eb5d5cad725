"""Every threshold of the Framework, with its unit and where the number comes from.

Knows no state. docs/framework.md has this as a table, made from the fields below.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..errors import Usage

T = TypeVar("T")
MIB = 1 << 20
GIB = 1 << 30


def _setting(default: T, unit: str, source: str, text: str) -> T:
    """A dataclass field that carries its own documentation."""
    made: Any = field(default=default, metadata={"unit": unit, "source": source, "text": text})
    return made  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Settings:
    """Raises `Usage` when two of them contradict each other. Sizes are bytes, times seconds."""

    # Limits
    budget_bytes: int = _setting(
        4 * GIB, "bytes", "paper, figure 8", "the budget at the start; recalls and offers move it"
    )
    cap_bytes: int = _setting(8 * GIB, "bytes", "paper, table 1", "hard cap: no offer lifts the budget above")
    floor_bytes: int = _setting(64 * MIB, "bytes", "ours", "no recall pushes the budget below")

    # Dynamic caching
    rate_window_s: float = _setting(
        3600.0, "s", "paper, section 5: last hour", "invocations that count as recent"
    )
    rate_threshold: float = _setting(
        0.25, "share", "paper, section 5: 25 %", "a model with more of the recent invocations is kept"
    )
    top_models: int = _setting(
        3, "models", "paper, section 5: top 3", "kept when none is above the threshold"
    )
    frequency_weight: float = _setting(
        0.5,
        "share",
        "ours: the paper has no formula",
        "what long-run frequency counts beside the recent rate",
    )
    frequency_half_life_s: float = _setting(86400.0, "s", "ours", "after which an old invocation counts half")
    prompt_reference_tokens: int = _setting(
        128,
        "tokens",
        "paper's usual prompt",
        "a model with prompts this long gets half the weight of one with none",
    )
    session_share: float = _setting(
        0.25, "share", "ours", "of a model's budget that its sessions may take from its weights"
    )
    session_recent_s: float = _setting(
        3600.0, "s", "as the rate's window", "a session idle for longer is not kept"
    )

    # Loading
    load_ahead_bytes: int = _setting(
        256 * MIB, "bytes", "ours", "on its way at most, where room has to be made for it"
    )
    stream_window_bytes: int = _setting(
        32 * MIB,
        "bytes",
        "ours",
        "of a streamed tail, what is read ahead of compute: whole segments, at least one",
    )
    stream_behind_bytes: int = _setting(
        16 * MIB,
        "bytes",
        "ours: threads of one matrix are that far apart",
        "kept behind compute while streaming",
    )

    # Reclamation, stage 2, idle
    calm_s: float = _setting(
        10.0, "s", "ours", "without recall or lost page before anything is loaded in the background"
    )
    refill_ahead_bytes: int = _setting(64 * MIB, "bytes", "ours", "on its way in the background at most")
    save_after_s: float = _setting(
        10.0, "s", "paper: while idle", "after which an idle session is saved early"
    )
    saves_at_once: int = _setting(1, "sessions", "ours", "early saves under way at most")
    save_retry_s: float = _setting(10.0, "s", "ours", "until a save that failed is tried again")
    lazy: bool = _setting(True, "", "linux: MADV_FREE", "hand idle weights to the kernel lazily")
    lazy_after_s: float = _setting(5.0, "s", "ours", "after which an idle model's weights are handed over")
    saves: bool = _setting(True, "", "ours", "there is a storage for sessions; off: KV stays or is given up")
    session_limit_bytes: int = _setting(
        512 * MIB, "bytes", "ours", "of memory for idle sessions; the longest idle are saved and dropped"
    )
    session_limit: int = _setting(256, "sessions", "ours", "in memory and in storage; the longest idle go")
    stored_limit_bytes: int = _setting(
        4 * GIB, "bytes", "ours", "saved sessions in storage; the oldest are forgotten"
    )

    # Requests
    compute_slots: int = _setting(
        1, "requests", "paper: one at a time", "requests that compute at the same time"
    )
    queue_limit: int = _setting(64, "requests", "ours", "waiting requests, then `busy`")
    kv_chunk_tokens: int = _setting(256, "tokens", "ours", "the step in which a request's KV grows")
    suspend_limit_s: float = _setting(
        30.0, "s", "ours", "a request that waits longer for memory for its KV ends with `out_of_budget`"
    )

    # The next request (schedule.py)
    switch_weight: float = _setting(
        2.0,
        "s/s",
        "ours: what is displaced is loaded again",
        "what a second of loading counts against waiting",
    )
    overtake_limit: int = _setting(
        8, "requests", "ours", "that came later may be started before one that could start"
    )
    overtake_s: float = _setting(
        20.0, "s", "ours", "of waiting after which nothing that came later goes first"
    )
    pinned: tuple[str, ...] = _setting(
        (), "models", "ours", "whose weights go last, never for the background, and never to the kernel"
    )

    # Workflows (workflows.py, prefetch.py)
    prefetch: bool = _setting(
        True, "", "paper, section 5", "load what the next request needs before it comes"
    )
    prefetch_confidence: float = _setting(
        0.6, "share", "ours: two of the same are enough", "a prediction below is not acted on"
    )
    prefetch_ahead_bytes: int = _setting(
        32 * MIB, "bytes", "ours", "on its way at most for a request that has not come"
    )
    prefetch_wait_s: float = _setting(
        10.0, "s", "ours", "until a request that does not come was a wrong guess"
    )
    workflow_gap_s: float = _setting(
        60.0, "s", "ours", "without a request after which a client's next one begins a new sequence"
    )
    workflow_memory: float = _setting(
        0.8, "share", "ours", "what an older observation counts after each newer one"
    )
    workflow_half_life_s: float = _setting(
        604800.0, "s", "ours: a week", "after which an observation counts half"
    )
    workflow_limit: int = _setting(1024, "sequences", "ours", "that are remembered; the longest unseen go")

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and value < 0:
                raise Usage(f"setting {one.name} is {value}, and must not be negative")
        if not self.floor_bytes <= self.budget_bytes <= self.cap_bytes:
            raise Usage(
                f"the budget of {self.budget_bytes} bytes is not between floor ({self.floor_bytes}) "
                f"and hard cap ({self.cap_bytes})"
            )
        for name in (
            *("compute_slots", "kv_chunk_tokens", "prompt_reference_tokens", "saves_at_once"),
            *("prefetch_ahead_bytes", "workflow_limit"),
        ):
            if getattr(self, name) < 1:
                raise Usage(f"setting {name} must be at least 1")
        for name in ("rate_window_s", "frequency_half_life_s", "workflow_half_life_s"):
            if getattr(self, name) <= 0:
                raise Usage(f"setting {name} must be above 0")
        for name in (
            *("rate_threshold", "session_share", "frequency_weight"),
            *("prefetch_confidence", "workflow_memory"),
        ):
            if getattr(self, name) > 1:
                raise Usage(f"setting {name} is a share, at most 1")
        for name in ("stream_window_bytes", "load_ahead_bytes", "refill_ahead_bytes"):
            if getattr(self, name) < 1:
                raise Usage(f"setting {name} must be at least 1")

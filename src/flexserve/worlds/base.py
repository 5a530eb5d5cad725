"""What every world offers the normal side. The contract suite in tests/contract runs against each.

A world is thread-safe: the gateway calls it from many threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..core import (
    MAX_WORKFLOW_STEPS,
    Budget,
    Event,
    ModelInfo,
    Request,
    WorkflowReport,
    WorldStatus,
    check_client,
)
from ..errors import InvalidRequest, Usage

RECALL_DEADLINE_S = 10.0
_WORKFLOW_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_ADAPTER_SCALE = 1000.0


@dataclass(frozen=True)
class AdapterSource:
    """A sealed LoRA adapter and its licence, and how much of it: `scale` times what it adds to each matrix."""

    sealed: Path
    licence: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not abs(self.scale) <= MAX_ADAPTER_SCALE:
            raise Usage(f"an adapter's scale is {self.scale}: at most {MAX_ADAPTER_SCALE:g} is possible")


@dataclass(frozen=True)
class ModelSource:
    """A sealed model and its licence, as the normal world's storage holds them: ciphertext and no key.

    `copy`: the device's own copy in execution layout; None: the one beside the sealed model, where there is one.
    """

    name: str
    sealed: Path
    licence: Path
    copy: Path | None = None
    use_copy: bool = True
    adapter: AdapterSource | None = None


def check_workflow(client: str | None, name: str, models: Sequence[str]) -> None:
    """The rules about a declared workflow: its name is an id, since it is listed and kept. Raises `InvalidRequest`."""
    check_client(client)
    if not _WORKFLOW_NAME.fullmatch(name):
        raise InvalidRequest("name must be 1 to 64 letters, digits, '.', '_' and '-'")
    if not 2 <= len(models) <= MAX_WORKFLOW_STEPS:
        raise InvalidRequest(f"steps must be 2 to {MAX_WORKFLOW_STEPS} models")
    if not all(1 <= len(model) <= 128 for model in models):
        raise InvalidRequest("each of steps must be the name of a model: 1 to 128 characters")


class Generation(Protocol):
    """One answer in progress: an iterator of `Token` events that ends with one `Finished`.

    Iterating raises the error that ended the answer, if one did; nothing follows it.
    """

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...

    def cancel(self) -> None:
        """Stop computing soon; iteration then ends with `Finished(finish_reason="cancelled")`.

        May be called from any thread, more than once, and after the end.
        """


@dataclass(frozen=True)
class Recalled:
    """What a recall came to."""

    freed_bytes: int
    first_byte_s: (
        float  # from the call until the operating system had the first of it; the whole time if it got none
    )
    done_s: float  # until it had all of it


class Recalling(Protocol):
    """A recall whose bytes are chosen (the paper's two stages: choosing, and giving back)."""

    @property
    def asked_bytes(self) -> int: ...

    @property
    def chosen_bytes(self) -> int:
        """Less than was asked for where the floor, or what is in memory, allows no more."""

    @property
    def later_bytes(self) -> int:
        """Of the chosen bytes, those that have to be encrypted and written before they go."""

    @property
    def answered_s(self) -> float:
        """How long choosing took, as the caller saw it."""

    def wait(self, timeout_s: float | None = None) -> Recalled:
        """Until everything that was chosen is back. May be called more than once, from any thread.

        Raises `TimeoutError`, or `WorldCrashed` where the secure world ended first (which gives all its memory back).
        """


class World(Protocol):
    """The normal side's handle on a secure world."""

    @property
    def name(self) -> str: ...

    def start(self) -> None:
        """Start the secure world. Raises `EngineFailure`, `KeyProblem`."""

    def register(self, source: ModelSource) -> ModelInfo:
        """Authenticate a model and its licence and make it ready to answer, with no weight resident.

        Raises `NotFound`, `NotAuthentic`, `NotLicensed`, `ModelUnsupported`; then nothing is registered.
        """

    def generate(self, request: Request) -> Generation:
        """Queue a request. Raises `ModelNotFound`, `Busy`; later errors come from the iteration."""

    def recall(self, nbytes: int, *, deadline_s: float = RECALL_DEADLINE_S) -> Recalling:
        """Take back up to `nbytes` of Flex-Mem (the paper's rsmem_reclaim): returns when they are chosen, and goes on
        in the background. What is given back is zeroed first. The soft budget falls to what stays.

        Sessions that are idle and could not be saved within `deadline_s` are given up; the keys and values of an open
        answer never are: it stops, and goes on when there is memory again. Raises `InvalidRequest`, `WorldCrashed`.
        """

    def offer(self, nbytes: int) -> None:
        """Give memory (the paper's rsmem_alloc): the soft budget rises by that much, up to the hard cap.

        Raises `InvalidRequest`, `WorldCrashed`.
        """

    def budget(
        self, soft_bytes: int | None = None, hard_bytes: int | None = None, floor_bytes: int | None = None
    ) -> Budget:
        """Set limits (None leaves one as it is), and say what holds now. A hard cap below the soft budget lowers it,
        a floor above it raises it. Raises `InvalidRequest` where the floor would be above the hard cap."""

    def trace(self, after: int = 0) -> list[str]:
        """The Framework's newest events and decisions, as JSON lines in their order (docs/framework.md).

        Those of events whose number `n` is above `after`; the oldest are forgotten. A secure world that was started
        again counts from 1."""

    def workflows(self) -> WorkflowReport:
        """What is known of what clients ask one after the other, and what prefetch made of it."""

    def declare_workflow(self, client: str | None, name: str, models: Sequence[str]) -> None:
        """A client (None: all that give no name) says which models it will ask, one after the other.

        Raises `InvalidRequest` (`check_workflow`), `WorldCrashed`.
        """

    def forget_workflows(
        self, client: str | None = None, *, anonymous: bool = False, workflow: str | None = None
    ) -> int:
        """Forget one workflow by its id, those of a client, those of the clients without a name, or all; how many.

        Raises `NotFound` for an id that none has, `WorldCrashed`.
        """

    def status(self) -> WorldStatus: ...

    def close(self) -> None:
        """End the secure world. Answers in flight end with `WorldCrashed`. May be called twice."""

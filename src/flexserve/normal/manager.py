"""The Flex-Mem manager: a thread that watches memory and recalls from the world, or offers to it (paper, section 4).

It says how much; the Framework in the secure world says which bytes. It knows sizes and no content.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..errors import FlexServeError
from ..worlds.base import World
from .policy import Action, Limit, Offer, Readings, Recall, Settings, State, decide
from .pressure import Memory, PressureWatch, Woken, own_groups, read_memory

WAIT_AFTER_DEADLINE_S = 5.0  # a recall goes on by itself; only the log stops waiting for it


class Watch(Protocol):
    """`PressureWatch`, as far as the manager needs it."""

    def wait(self, timeout_s: float) -> Woken: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class MemoryManager:
    """One per world. `start` and `close` once each; `close` may come without `start`."""

    def __init__(
        self,
        world: World,
        say: Callable[[str], None],
        *,
        settings: Settings | None = None,
        watch: Watch | None = None,
        memory: Callable[[], Memory] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` gets a line for each action. Raises `StorageFailure` where this machine does not say
        what memory it has."""
        groups = own_groups()
        self._world, self._say, self._clock = world, say, clock
        self._memory = memory or (lambda: read_memory(groups=groups))
        self.settings = settings or Settings.of_machine(self._memory().total_bytes)
        self._watch = watch or self._open_watch(groups)
        self._state = State.at(clock(), self.settings)
        self._complaint = ""  # the last one, so that it is said once
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def _open_watch(self, groups: tuple[Path, ...]) -> PressureWatch:
        watch = PressureWatch(
            stall_s=self.settings.stall_s,
            window_s=self.settings.stall_window_s,
            group=groups[0] if groups else None,
        )
        for missing in watch.missing:
            self._say(
                f"memory manager: without {missing}; it looks every {self.settings.period_s:g} s instead"
            )
        return watch

    def start(self) -> None:
        """Begin to watch; the world has been started."""
        self._thread = threading.Thread(target=self._run, name="memory-manager", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more action. Returns at once; from any thread."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._watch.wake()

    def close(self) -> None:
        """Stop, and wait for the action that is under way. Call after the world is closed, or it may take a while."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._watch.close()

    def _run(self) -> None:
        while not self._stopped.is_set():
            woken = self._watch.wait(self.settings.period_s)
            if self._stopped.is_set():
                return
            self.look(woken)

    def look(self, woken: Woken) -> Action | None:
        """Read, decide, act; the action that was tried. Errors are said and not raised: memory goes on without us."""
        action = None
        try:
            readings = self._read(woken)
            if readings is None:
                return None
            self._state, action = decide(self.settings, self._state, readings)
            if action is not None:
                self._act(action, readings)
            self._complaint = ""
        except (FlexServeError, TimeoutError) as error:
            complaint = error.message if isinstance(error, FlexServeError) else "a recall takes long"
            if complaint != self._complaint and not self._stopped.is_set():
                self._say(f"memory manager: {complaint}")
            self._complaint = complaint
        return action

    def _read(self, woken: Woken) -> Readings | None:
        status = self._world.status()
        if status.budget is None:  # this world has nothing to manage
            return None
        memory = self._memory()
        return Readings(
            self._clock(),
            memory.available_bytes,
            memory.free_bytes,
            sum(model.lazy_bytes for model in status.models),
            status.budget,
            woken.stalled,
            woken.throttled,
        )

    def _act(self, action: Action, r: Readings) -> None:
        why = f"{action.why} ({_mib(r.available_bytes)} available)"
        match action:
            case Recall(nbytes):
                recalling = self._world.recall(nbytes, deadline_s=self.settings.deadline_s)
                done = recalling.wait(self.settings.deadline_s + WAIT_AFTER_DEADLINE_S)
                self._say(
                    f"memory manager: recalled {_mib(done.freed_bytes)} of {_mib(nbytes)}, chosen after "
                    f"{1000 * recalling.answered_s:.1f} ms, back after {1000 * done.done_s:.1f} ms: {why}"
                )
            case Offer(nbytes):
                self._world.offer(nbytes)
                soft = r.budget.soft_bytes + nbytes
                self._say(f"memory manager: offered {_mib(nbytes)}, the budget is {_mib(soft)}: {why}")
            case Limit(soft):
                self._world.budget(soft_bytes=soft)
                self._say(f"memory manager: the budget is {_mib(soft)} now: {why}")


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"

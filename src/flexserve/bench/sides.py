"""The sides of the cold-start bench: each makes itself ready, checks the page cache and answers once, timed.

What the clock measures:

    plain_*    from the beginning of the model's load to the first token, in a process that has loaded the library
    sealed_*   at the client, from handing over the request to its first token, with the model registered

Knows how to bring one side into its state; free memory's state is memory.py's.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..core import Finished, Request, Sampling, Token
from ..errors import EngineFailure
from ..framework.settings import Settings as Framework
from ..worlds.base import ModelSource
from ..worlds.linux import LinuxWorld
from . import machine, processor
from .files import MODEL_NAME, BenchModel
from .plain import Job, PlainProcess

EVERYTHING = 1 << 60  # bytes, of a recall
FLOOR_BYTES = 64 << 20  # as the Framework's usual floor


@dataclass(frozen=True)
class Settings:
    """What all sides have in common."""

    threads: int
    context_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Sample:
    """One answer of one side. Seconds are wall time but `cpu_s`, and those said to be of threads or cores.

    All are about the time to the first token, except `decode_tokens_per_s`, `peak_bytes` and `token_ids`. None
    where a side cannot tell.
    """

    ttft_s: float
    token_ids: tuple[int, ...]
    decode_tokens_per_s: float
    resident_ttft_s: float | None  # plain only: the same prompt once more in the same process
    peak_bytes: int
    cpu_s: float  # of the process that answers
    other_cpu_s: float  # of everything else on the machine, the host included
    read_bytes: int
    # Where the time went
    wait_s: float  # queue, channel, tokenising, sampling: neither loading nor computing
    load_s: float | None  # plain only: the model's load, before any computing
    prefill_s: float  # prompt through the model; the sealed side loads meanwhile
    read_s: float | None  # sealed only, these three: summed over the loader's threads
    decrypt_s: float | None
    place_s: float | None
    compute_s: float | None  # processor time of the computing threads
    idle_s: float  # core seconds that the process left unused
    faults: int | None  # times compute waited for a page
    fault_wait_s: float | None


class Side(Protocol):
    """One way to start and answer."""

    @property
    def name(self) -> str: ...

    @property
    def cold(self) -> bool: ...

    @property
    def kernels(self) -> str:
        """Sides that answer the same prompt with the same kernels give the same tokens."""

    def ready(self, token_ids: list[int]) -> None:
        """Everything up to the memory's preparation: processes, page cache, resident segments."""

    def check(self) -> None:
        """Make sure that the page cache is as it should be. Raises `EngineFailure`."""

    def go(self) -> Sample:
        """Answer; the clock runs inside."""

    def done(self) -> None:
        """Leave no process and no segment behind."""


class PlainSide:
    """Plain llama.cpp, a new process for every answer."""

    def __init__(
        self, name: str, model: BenchModel, settings: Settings, *, mode: str, cold: bool, repack: bool
    ) -> None:
        self.name, self.cold = name, cold
        self.kernels = "repacked" if repack else "plain"
        self._model, self._settings = model, settings
        self._mode, self._repack = mode, repack
        self._process: PlainProcess | None = None
        self._ids: list[int] = []

    def ready(self, token_ids: list[int]) -> None:
        self._ids = token_ids
        self._process = PlainProcess()
        if self.cold:
            machine.evict(self._model.gguf)
        else:
            machine.warm(self._model.gguf)  # now, because it takes memory

    def check(self) -> None:
        if self.cold:
            machine.check_evicted(self._model.gguf)
        else:
            machine.warm(self._model.gguf)  # again: the kernel may have taken pages meanwhile

    def go(self) -> Sample:
        assert self._process is not None
        s = self._settings
        got = self._process.run(
            Job(
                str(self._model.gguf),
                self._mode,
                self._repack,
                self._ids,
                s.output_tokens,
                s.threads,
                s.context_tokens,
                again=not self.cold,
            )
        )
        return Sample(
            ttft_s=got.ttft_s,
            token_ids=tuple(got.token_ids),
            decode_tokens_per_s=got.decode_tokens_per_s,
            resident_ttft_s=got.resident_ttft_s,
            peak_bytes=got.peak_bytes,
            cpu_s=got.cpu_s,
            other_cpu_s=max(0.0, got.busy_s - got.cpu_s),
            read_bytes=got.read_bytes,
            wait_s=0.0,
            load_s=got.load_s,
            prefill_s=got.prefill_s,
            read_s=None,
            decrypt_s=None,
            place_s=None,
            compute_s=None,
            idle_s=_idle_s(got.ttft_s, got.cpu_s),
            faults=None,
            fault_wait_s=None,
        )

    def done(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class SealedWorld:
    """A running world with the bench model registered, and no weight resident."""

    def __init__(
        self,
        model: BenchModel,
        settings: Settings,
        *,
        warm_up: list[int],
        on_demand: bool = True,
        layout: bool = False,
        hardened: bool = True,
        session_dir: Path | None = None,
        lazy: bool = False,
    ) -> None:
        """`warm_up`: a prompt, answered twice to learn which threads compute. `layout`: from the device's own copy
        in execution layout, which is made when there is none that fits. `session_dir`: keep conversations, and save
        them there; None: every prompt is computed from its first token. `lazy`: idle weights are handed to the kernel,
        as they are where nothing is measured."""
        self.model, self.settings, self.layout = model, settings, layout
        # With no memory at all an answer that has begun could not reach the end of its token.
        self.floor_bytes = min(FLOOR_BYTES, model.weight_bytes // 8)
        self._numbers = itertools.count()
        self._computing: frozenset[int] = frozenset()
        self.world = LinuxWorld(
            str(model.device_key),
            vendor_pub=model.vendor_pub,
            threads=settings.threads,
            context_tokens=settings.context_tokens,
            on_demand=on_demand,
            hardened=hardened,
            session_dir=session_dir,
            session_bytes=0 if session_dir is None else None,
            settings=Framework(
                budget_bytes=EVERYTHING, cap_bytes=EVERYTHING, floor_bytes=self.floor_bytes, lazy=lazy
            ),
        )
        try:
            self.world.start()
            self.give_memory()
            source = model.source
            if layout:
                source = replace(source, copy=model.copy, use_copy=True)
                self._make_copy(source)
            start = time.perf_counter()
            info = self.world.register(source)
            self.register_s = time.perf_counter() - start
            if info.execution_layout != layout:
                raise EngineFailure(f"the model was registered in the wrong layout: {info.layout_hint}")
            self.register_resident_bytes = self.world.status().models[0].resident_bytes
            self.ask(warm_up)
            before = processor.thread_cpu_s(self.pid)
            self.ask(warm_up)  # all resident: whoever works now computes
            used = processor.since(before, processor.thread_cpu_s(self.pid))
            self._computing = frozenset(t for t, s in used.items() if s > max(used.values()) / 10)
            self.empty()
        except BaseException:
            self.close()
            raise

    def _make_copy(self, source: ModelSource) -> None:
        if self.model.copy.exists() and self.world.register(source).execution_layout:
            return
        self.world.optimize(source, self.model.copy)

    @property
    def files(self) -> tuple[Path, ...]:
        """What a cold start reads."""
        sealed = self.model.source.sealed
        return (sealed, self.model.copy) if self.layout else (sealed,)

    @property
    def pid(self) -> int:
        pid = self.world.pid
        if pid is None:
            raise EngineFailure("the secure world has ended")
        return pid

    def give_memory(self) -> None:
        """Let the world hold as much as it wants: a recall has lowered its budget."""
        if self.world.status().budget is not None:
            self.world.recall(0).wait()  # so that nothing is loaded in the background for a while
            self.world.budget(EVERYTHING, EVERYTHING, self.floor_bytes)

    def empty(self) -> None:
        """No segment resident, and no budget for one until the next answer. Raises `EngineFailure` when one stays."""
        if self.world.status().budget is not None:
            self.world.budget(floor_bytes=0)
        self.world.recall(EVERYTHING).wait()
        if self.world.status().models[0].resident_bytes:
            raise EngineFailure("weights stay resident after a recall")

    def request(self, token_ids: list[int], output_tokens: int | None = None) -> Request:
        """A greedy one that goes on to the last of its tokens."""
        return Request(
            id=f"bench-{next(self._numbers)}",
            model=MODEL_NAME,
            token_ids=tuple(token_ids),
            max_tokens=output_tokens or self.settings.output_tokens,
            ignore_eos=True,
            sampling=Sampling(temperature=0),
        )

    def ask(self, token_ids: list[int], *, give: bool = True) -> Sample:
        """Answer once; with `give`, with all the memory that it takes."""
        if give:
            self.give_memory()
        request = self.request(token_ids)
        pid = self.pid
        before, busy_before = processor.thread_cpu_s(pid), processor.busy_s()
        used: dict[int, float] = {}
        ttft_s = busy_s = 0.0
        start = time.perf_counter()
        for event in self.world.generate(request):
            if isinstance(event, Token):
                if not ttft_s:
                    ttft_s = time.perf_counter() - start
                    used = processor.since(before, processor.thread_cpu_s(pid))
                    busy_s = processor.busy_s() - busy_before
                continue
            return self._sample(event, ttft_s, used, busy_s)
        raise EngineFailure("the answer did not end")

    def _sample(self, finished: Finished, ttft_s: float, used: dict[int, float], busy_s: float) -> Sample:
        t = finished.timings
        cpu_s = sum(used.values())
        return Sample(
            ttft_s=ttft_s,
            token_ids=finished.token_ids,
            decode_tokens_per_s=t.decode_tokens_per_s,
            resident_ttft_s=None,
            peak_bytes=machine.peak_resident_bytes(self.pid),
            cpu_s=cpu_s,
            other_cpu_s=max(0.0, busy_s - cpu_s),
            read_bytes=t.load_bytes,
            wait_s=max(0.0, ttft_s - t.prefill_s),
            load_s=None,
            prefill_s=t.prefill_s,
            read_s=t.read_s,
            decrypt_s=t.decrypt_s,
            place_s=t.place_s,
            compute_s=sum(s for thread, s in used.items() if thread in self._computing),
            idle_s=_idle_s(ttft_s, cpu_s),
            faults=t.faults,
            fault_wait_s=t.fault_wait_s,
        )

    def close(self) -> None:
        self.world.close()


class SealedSide:
    """The sealed model in a running world: cold, or with every segment resident."""

    def __init__(self, name: str, world: SealedWorld, *, cold: bool) -> None:
        self.name, self.cold = name, cold
        self.kernels = "repacked" if world.layout else "plain"
        self._world = world
        self._ids: list[int] = []

    def ready(self, token_ids: list[int]) -> None:
        self._ids = token_ids
        for path in self._world.files:
            machine.evict(path)
        if self.cold:
            self._world.empty()
        else:
            self._world.ask(token_ids)

    def check(self) -> None:
        if self.cold:
            for path in self._world.files:
                machine.check_evicted(path)

    def go(self) -> Sample:
        return self._world.ask(self._ids)

    def done(self) -> None:
        self._world.empty()


def _idle_s(wall_s: float, cpu_s: float) -> float:
    return max(0.0, len(os.sched_getaffinity(0)) * wall_s - cpu_s)

"""One pipelined cold start seen from inside: when each segment was read, decrypted and placed, and when compute ran.

`python -m flexserve.bench.timeline` opens the sealed model in its own process as the secure world does, says
`ready`, answers one prompt cold and prints what happened. The loader traces its spans; what the computing threads
did is sampled from the processor time of every thread that is no loader's. For looking at, not for quoting times:
the process is not hardened and has no channel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import EngineFailure
from ..flexmem.processors import PROCESSORS
from . import machine, processor
from .child import end
from .files import MODEL_NAME, BenchModel
from .memory import FreeMemory

if TYPE_CHECKING:
    from ..flexmem.loader import SpanTrace

SAMPLE_S = 0.01


@dataclass(frozen=True)
class SpanTimes:
    """One span's way from storage into the arena; seconds since the request."""

    worker: int  # 0, 1, ...
    length_bytes: int
    read_begin_s: float
    read_end_s: float
    decrypt_end_s: float
    place_begin_s: float
    place_end_s: float


@dataclass(frozen=True)
class Timeline:
    """One cold start. `compute`: (since the request, cores busy computing in the SAMPLE_S before)."""

    ttft_s: float
    cores: int
    workers: int
    spans: tuple[SpanTimes, ...]
    compute: tuple[tuple[float, float], ...]


def record(
    model: BenchModel, token_ids: list[int], free: FreeMemory, *, threads: int, context_tokens: int
) -> Timeline:
    """One cold start in a process of its own, prepared like every other. Raises `EngineFailure`."""
    job = {
        "sealed": str(model.source.sealed),
        "licence": str(model.source.licence),
        "device_key": str(model.device_key),
        "vendor_pub": str(model.vendor_pub),
        "token_ids": token_ids,
        "threads": threads,
        "context_tokens": context_tokens,
    }
    with _Process() as process:
        if process.ask(job) != {"ready": True}:
            raise EngineFailure("the process that records a cold start did not start")
        free.prepare()
        machine.evict(model.source.sealed)
        free.release()
        answer = process.ask({"go": True})
    try:
        spans = tuple(SpanTimes(**span) for span in answer["spans"])
        compute = tuple((at, busy) for at, busy in answer["compute"])
        return Timeline(answer["ttft_s"], answer["cores"], answer["workers"], spans, compute)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineFailure("the process that records a cold start ended early") from error


class _Process:
    """The child, and its two lines of JSON in each direction."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "flexserve.bench.timeline"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # as in child.py
        )

    def ask(self, message: dict[str, object]) -> dict[str, Any]:
        """Empty when the process has ended."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        try:
            self._popen.stdin.write(json.dumps(message) + "\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        except BrokenPipeError:
            return {}
        answer: dict[str, Any] = json.loads(line) if line else {}
        return answer

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        end(self._popen)


class _Sampler:
    """Adds up, every SAMPLE_S, the processor time of all threads but the loaders', itself and those of Python."""

    def __init__(self, others: set[int]) -> None:
        """`others`: ids of threads that do not compute."""
        self.rows: list[tuple[float, float]] = []
        self._others = others
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def _run(self) -> None:
        self._others.add(threading.get_native_id())
        before, then = processor.thread_cpu_s(os.getpid()), time.perf_counter()
        while not self._stop.wait(SAMPLE_S):
            used, now = processor.thread_cpu_s(os.getpid()), time.perf_counter()
            busy = sum(s for t, s in processor.since(before, used).items() if t not in self._others)
            self.rows.append((now, busy / (now - then)))
            before, then = used, now

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _serve(job: dict[str, Any]) -> None:
    """Open the model, wait for the word, answer, print."""
    from ..core import Request, Sampling
    from ..engine import llama
    from ..engine.model import EngineOptions, SecureModel
    from ..engine.template import TemplateZygote
    from ..sealed.keyfile import load_device_key
    from ..sealed.licence import open_licence
    from ..sealed.reader import SealedModel
    from ..sealed.trust import read_public_key

    cores = len(PROCESSORS)
    zygote = TemplateZygote()
    zygote.start()
    llama.start()
    path = job["sealed"]
    cached = os.open(path, os.O_RDONLY)
    try:
        direct: int | None = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        direct = None
    sealed = SealedModel.open(cached, [read_public_key(Path(job["vendor_pub"]))])
    licence = Path(job["licence"]).read_bytes()
    key, _ = open_licence(licence, sealed, load_device_key(job["device_key"]), None, time.time())
    traced: list[SpanTrace] = []
    model = SecureModel(
        MODEL_NAME,
        sealed.unlock(key),
        cached=cached,
        direct=direct,
        zygote=zygote,
        options=EngineOptions(
            threads=job["threads"],
            context_tokens=job["context_tokens"],
            trace=traced.append,
        ),
    )
    print(json.dumps({"ready": True}), flush=True)
    if not sys.stdin.readline():
        return
    request = Request(
        "timeline",
        MODEL_NAME,
        token_ids=tuple(job["token_ids"]),
        max_tokens=1,
        ignore_eos=True,
        sampling=Sampling(temperature=0),
    )
    # Every thread there is but the one that will compute: the loaders, the fault handler, the watchdog.
    others = {
        t.native_id for t in threading.enumerate() if t is not threading.current_thread() and t.native_id
    }
    with _Sampler(others) as sampler:
        start = time.perf_counter()
        ttft_s = model.answer(request, lambda _token: None, lambda: False, start).timings.ttft_s
    model.loader.wait()  # a worker notes its span behind the moment in which compute goes on
    workers = sorted({span.worker for span in traced})
    spans = [
        SpanTimes(
            workers.index(t.worker),
            t.length,
            t.begun - start,
            t.read - start,
            t.decrypted - start,
            t.place_begun - start,
            t.placed - start,
        )
        for t in sorted(traced, key=lambda t: t.begun)
    ]
    result = {
        "ttft_s": ttft_s,
        "cores": cores,
        "workers": len(workers),
        "spans": [asdict(span) for span in spans],
        "compute": [(at - start, busy) for at, busy in sampler.rows],
    }
    print(json.dumps(result), flush=True)
    model.close()
    zygote.close()


if __name__ == "__main__":
    _serve(json.loads(sys.stdin.readline()))

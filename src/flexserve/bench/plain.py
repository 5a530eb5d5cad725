"""The other side of every comparison: plain llama.cpp in a process of its own, on the unencrypted file.

`python -m flexserve.bench.plain` loads the library, says `ready`, waits for a job on stdin and prints the
result: the clock starts when the model's load does, so neither Python nor the library's start counts.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import EngineFailure
from .child import end
from .machine import peak_resident_bytes
from .processor import busy_s

# llama.h, enum llama_load_mode. "read" is into anonymous memory, through the page cache (--no-mmap); "mlock" maps
# and locks.
LOAD_MODES = {"read": 0, "mmap": 1, "mlock": 3, "direct": 4}
_REPACKED = re.compile(r"CPU_REPACK model buffer size = *([\d.]+) MiB")


@dataclass(frozen=True)
class Job:
    """One start and one answer. `repack`: llama.cpp's default of repacking weights for the processor."""

    model: str
    load_mode: str
    repack: bool
    token_ids: list[int]
    output_tokens: int
    threads: int
    context_tokens: int
    again: bool = False  # answer the same prompt once more, with everything in memory


@dataclass(frozen=True)
class PlainResult:
    """Wall and processor seconds; `ttft_s` = load, context, prefill and sampling of the first token."""

    ttft_s: float
    load_s: float
    prefill_s: float
    cpu_s: float  # of the process, up to its first token
    busy_s: float  # of the whole machine meanwhile
    decode_tokens_per_s: float
    resident_ttft_s: float | None  # of the second time
    token_ids: list[int]
    read_bytes: int  # from storage, up to the first token
    repacked_bytes: int
    peak_bytes: int = 0


class PlainProcess:
    """A process that has loaded the library and waits for its one job."""

    def __init__(self) -> None:
        """Raises `EngineFailure`."""
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "flexserve.bench.plain"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # as in child.py
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._in, self._out = self._popen.stdin, self._popen.stdout
        if self._out.readline().strip() != "ready":
            self.close()
            raise EngineFailure("plain llama.cpp did not start")

    def run(self, job: Job) -> PlainResult:
        """Raises `EngineFailure`."""
        answer = ""
        try:
            self._in.write(json.dumps(asdict(job)) + "\n")
            self._in.flush()
            answer = self._out.readline()
            peak = peak_resident_bytes(self._popen.pid) if answer else 0
        except BrokenPipeError:
            pass
        if not answer:
            raise EngineFailure(f"plain llama.cpp failed on {job.model}")
        return PlainResult(**(json.loads(answer) | {"peak_bytes": peak}))

    def close(self) -> None:
        """End it; may be called twice."""
        end(self._popen)

    def __enter__(self) -> PlainProcess:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _storage_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def _run(job: Job) -> PlainResult:
    import llama_cpp as api

    from ..core import Sampling
    from ..engine.llama import Context, ContextOptions, Model, Sampler

    repacked: list[float] = []

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def on_log(_level: int, text: bytes, _user: Any) -> None:
        repacked.extend(float(size) for size in _REPACKED.findall(text.decode("utf-8", "replace")))

    api.llama_log_set(on_log, None)
    read, busy, cpu, start = _storage_bytes(), busy_s(), _cpu_s(), time.perf_counter()
    model = Model.from_file(Path(job.model), load_mode=LOAD_MODES[job.load_mode], repack=job.repack)
    context = Context(model, ContextOptions(job.context_tokens, job.threads, bind_threads=False))
    loaded = time.perf_counter()
    sampler = Sampler(Sampling(temperature=0), 0, model.vocab.size)
    context.decode(job.token_ids)
    tokens = [sampler.sample(context)]
    first = time.perf_counter()
    cpu, busy, read = _cpu_s() - cpu, busy_s() - busy, _storage_bytes() - read
    decoding = time.perf_counter()
    while len(tokens) < job.output_tokens:
        context.decode(tokens[-1:])
        tokens.append(sampler.sample(context))
    end = time.perf_counter()
    resident_s = None
    if job.again:
        context.clear()
        again = time.perf_counter()
        context.decode(job.token_ids)
        sampler.sample(context)
        resident_s = time.perf_counter() - again
    return PlainResult(
        ttft_s=first - start,
        load_s=loaded - start,
        prefill_s=first - loaded,
        cpu_s=cpu,
        busy_s=busy,
        decode_tokens_per_s=(len(tokens) - 1) / (end - decoding) if len(tokens) > 1 else 0.0,
        resident_ttft_s=resident_s,
        token_ids=tokens,
        read_bytes=read,
        repacked_bytes=int(sum(repacked) * (1 << 20)),
    )


def main() -> None:
    """Serve one job."""
    from ..engine import llama

    llama.start()
    print("ready", flush=True)
    line = sys.stdin.readline()
    if line:
        result = asdict(_run(Job(**json.loads(line))))
        del result["peak_bytes"]  # whoever started us reads it from outside
        print(json.dumps(result), flush=True)
        sys.stdin.readline()  # stay until that is done
    sys.stdout.flush()
    os._exit(0)  # llama.cpp's log callback goes before it does


if __name__ == "__main__":
    main()

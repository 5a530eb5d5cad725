"""The other side of every comparison: plain llama.cpp in a process of its own, on the unencrypted file.

`python -m flexserve.bench.plain` loads the library, says `ready`, waits for a job on stdin and prints the
result: the clock starts when the model's load does, so neither Python nor the library's start counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import EngineFailure
from .machine import peak_resident_bytes

LOAD_MODES = {
    "read": 0,
    "mmap": 1,
    "direct": 4,
}  # llama.h, enum llama_load_mode; "read" into anonymous memory


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


@dataclass(frozen=True)
class PlainResult:
    """Seconds of wall time; `ttft_s` = load, context, prefill and sampling of the first token."""

    ttft_s: float
    load_s: float
    prefill_s: float
    decode_tokens_per_s: float
    resident_ttft_s: float  # the same prompt again, with everything in memory
    token_ids: list[int]
    peak_bytes: int


def measure(job: Job) -> PlainResult:
    """Run a job in a fresh process. Raises `EngineFailure`."""
    with subprocess.Popen(
        [sys.executable, "-m", "flexserve.bench.plain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ready = process.stdout.readline()
        if ready.strip() == "ready":
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        else:
            answer = ""
        peak = peak_resident_bytes(process.pid) if answer else 0
        process.stdin.close()
    if not answer:
        raise EngineFailure(f"plain llama.cpp failed on {job.model}")
    return PlainResult(**json.loads(answer), peak_bytes=peak)


def _run(job: Job) -> dict[str, object]:
    from ..core import Sampling
    from ..engine.llama import Context, ContextOptions, Model, Sampler

    start = time.perf_counter()
    model = Model.from_file(Path(job.model), load_mode=LOAD_MODES[job.load_mode], repack=job.repack)
    context = Context(model, ContextOptions(job.context_tokens, job.threads))
    loaded = time.perf_counter()
    sampler = Sampler(Sampling(temperature=0), 0, model.vocab.size)
    context.decode(job.token_ids)
    tokens = [sampler.sample(context)]
    first = time.perf_counter()
    while len(tokens) < job.output_tokens:
        context.decode(tokens[-1:])
        tokens.append(sampler.sample(context))
    end = time.perf_counter()
    context.clear()
    again = time.perf_counter()
    context.decode(job.token_ids)
    sampler.sample(context)
    return {
        "ttft_s": first - start,
        "load_s": loaded - start,
        "prefill_s": first - loaded,
        "decode_tokens_per_s": (len(tokens) - 1) / (end - first) if len(tokens) > 1 else 0.0,
        "resident_ttft_s": time.perf_counter() - again,
        "token_ids": tokens,
    }


def main() -> None:
    """Serve one job."""
    from ..engine import llama

    llama.start()
    print("ready", flush=True)
    line = sys.stdin.readline()
    if line:
        print(json.dumps(_run(Job(**json.loads(line)))), flush=True)
        sys.stdin.readline()  # stay until our peak memory has been read


if __name__ == "__main__":
    main()

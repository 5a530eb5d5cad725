"""Plain llama.cpp that keeps one model: a process that loads it with the first request, and ends to give it back.

`python -m flexserve.bench.workflow_plain THREADS CONTEXT_TOKENS` loads the library, says `ready`, and answers each line
`{"model", "token_ids", "output_tokens"}` with the line `first` when the first token is there and `{"load_s", "tokens"}`
at the end. Nothing of one prompt is used for the next. The model is mapped and repacked as llama.cpp does by itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from .plain import LOAD_MODES


def main() -> None:
    """Serve until the input ends."""
    from ..core import Sampling
    from ..engine import llama
    from ..engine.llama import Context, ContextOptions, Model, Sampler

    llama.start()
    threads, context_tokens = int(sys.argv[1]), int(sys.argv[2])
    context: Context | None = None
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.perf_counter()
        load_s = 0.0
        if context is None:
            model = Model.from_file(Path(job["model"]), load_mode=LOAD_MODES["mmap"], repack=True)
            context = Context(model, ContextOptions(context_tokens, threads, bind_threads=False))
            load_s = time.perf_counter() - begin
        sampler = Sampler(Sampling(temperature=0), 0, model.vocab.size)
        context.decode(job["token_ids"])
        tokens = [sampler.sample(context)]
        print("first", flush=True)
        while len(tokens) < job["output_tokens"]:
            context.decode(tokens[-1:])
            tokens.append(sampler.sample(context))
        print(json.dumps({"load_s": load_s, "tokens": tokens}), flush=True)
        context.clear()  # behind the answer: it zeroes more than plain llama.cpp would
    sys.stdout.flush()
    os._exit(0)  # faster than freeing; llama.cpp's log callback would go before it does


if __name__ == "__main__":
    main()

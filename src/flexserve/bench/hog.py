"""A process that really holds memory: `python -m flexserve.bench.hog`.

It reads lines `BYTES`, touches or gives back until it holds that much, and answers with what it holds. When the kernel
runs out of memory, this process is the one to go (oom_score_adj). It ends with its input.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

from ..errors import EngineFailure

STEP_BYTES = 64 << 20


class Hog:
    """The process, from outside."""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "flexserve.bench.hog"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hold(self, nbytes: int) -> int:
        """Hold so much, in steps of 64 MiB; what it holds then. Raises `EngineFailure` when it was killed."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        try:
            self._popen.stdin.write(f"{max(nbytes, 0)}\n")
            self._popen.stdin.flush()
            line = self._popen.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineFailure(
                "the process that holds memory was killed: there was not enough for everybody",
                hint="end other programs, or measure a smaller shape",
            )
        return int(line)

    def close(self) -> None:
        """Give everything back; may be called twice."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        self._popen.wait()

    def __enter__(self) -> Hog:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def main() -> None:
    """Serve until the input ends."""
    from .memory import Block

    Path("/proc/self/oom_score_adj").write_text("1000")
    blocks: list[Block] = []
    for line in sys.stdin:
        wanted = int(line) // STEP_BYTES
        while len(blocks) > wanted:
            blocks.pop().free()
        while len(blocks) < wanted:
            blocks.append(Block(STEP_BYTES))
        print(len(blocks) * STEP_BYTES, flush=True)


if __name__ == "__main__":
    main()

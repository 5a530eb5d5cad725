"""A process that really holds memory: `python -m flexserve.bench.hog`.

It reads lines `BYTES`, touches or gives back until it holds that much, and answers with what it holds. When the kernel
runs out of memory, this process is the one to go (oom_score_adj). It ends with its input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import EngineFailure
from .child import Child

STEP_BYTES = 64 << 20


class Hog(Child):
    """The process, from outside. Closing it gives everything back."""

    def __init__(self) -> None:
        super().__init__("flexserve.bench.hog")

    def hold(self, nbytes: int) -> int:
        """Hold so much, in steps of 64 MiB; what it holds then. Raises `EngineFailure` when it was killed."""
        line = self.ask(str(max(nbytes, 0)))
        if not line:
            raise EngineFailure(
                "the process that holds memory was killed: there was not enough for everybody",
                hint="end other programs, or measure a smaller shape",
            )
        return int(line)


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

"""A child process that is asked by lines: one line in, one line out; it ends with its input.

What stops a bench, Ctrl-C or a SIGTERM to its group, does not reach the child, which would seem to have failed.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

PATIENCE_S = 5.0


def end(process: subprocess.Popen[str]) -> None:
    """End a process that ends with its input; one that is in the middle of an answer nobody wants is not waited for."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    timer = threading.Timer(PATIENCE_S, process.kill)  # a wait with a timeout looks every 50 ms only
    timer.start()
    try:
        process.wait()
    finally:
        timer.cancel()
    if process.stdout is not None:  # not before: it may be about to write
        process.stdout.close()


class Child:
    """A module of ours that runs as `python -m MODULE ARGUMENTS`, from outside."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def listen(self) -> str:
        """Its next line; empty when it has ended."""
        assert self._popen.stdout is not None
        return self._popen.stdout.readline()

    def ask(self, line: str) -> str:
        """Its answer to a line; empty when it has ended."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(f"{line}\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            return ""
        return self.listen()

    def close(self) -> None:
        """End it; may be called twice."""
        end(self._popen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

"""Several threads at one piece of work, and their progress told in the thread that waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait


def run_workers(
    work: Callable[[], None], count: int, name: str, *, tick: Callable[[], None], stop: Callable[[], None]
) -> None:
    """Run `work` in `count` threads to its end. `tick` is called a few times per second from this thread.

    An error or an interrupt calls `stop`, after which every `work` must return soon, waits for that, and is raised.
    """
    with ThreadPoolExecutor(count, thread_name_prefix=name) as pool:
        try:  # from before the first thread: an interrupt must stop them whenever it comes
            pending = {pool.submit(work) for _ in range(count)}
            while pending:
                finished, pending = wait(pending, timeout=0.1)
                for future in finished:
                    future.result()
                tick()
        finally:
            stop()

"""What the choice of the next request and of what to fetch costs: `python -m tests.framework.decide` prints it.

20 models of 2,000 segments each, half of them in memory, 64 waiting requests. Processor time of this
thread: other programs do not count.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from flexserve.framework import events as ev
from flexserve.framework import prefetch, requests
from flexserve.framework.records import Records
from flexserve.framework.settings import Settings
from flexserve.framework.weights import Part

from .executor import Answer, Executor

MIB = 1 << 20
MODELS, SEGMENTS, ROUNDS = 20, 2_000, 400


def full() -> Executor:
    """Everything that a decision looks at is there."""
    settings = Settings(budget_bytes=20 << 30, cap_bytes=40 << 30, lazy=False)
    made = Executor(settings)
    made.patience = 10_000_000
    chance = random.Random(1)
    names = [f"m{n}" for n in range(MODELS)]
    for name in names:
        made.register(name, (Part(0, SEGMENTS, MIB, SEGMENTS * MIB),), 32_768)
    for number in range(1500):
        name = names[min(int(chance.expovariate(0.3)), MODELS - 1)]
        made.now += 1.0
        step = f"p{chance.randrange(20)}"
        made.ask(f"r{number}", Answer(name, f"{name}/{step}", 200, client=f"c{number % 7}", prefix=step))
        for key in list(made.queues):
            made.run(key)
        made.drain()
        made.step(f"r{number}")
        made.finish(f"r{number}")
        made.drain()
    made.ask("running", Answer("m0", "m0/x", 200, client="c0", prefix="p0"))
    made.drain()
    made.step("running")
    made.drain()
    for number in range(settings.queue_limit):
        name = names[number % MODELS]
        made.post(ev.RequestArrived(f"w{number}", name, None, 0, f"c{number % 7}"))
    return made


def median_ms(call: Callable[[], object]) -> float:
    """Of `ROUNDS` calls."""
    spent = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        call()
        spent.append(time.thread_time() - began)
    return statistics.median(spent) * 1e3


def main() -> None:
    records: Records = full().framework._records
    log = records.workflows
    print(
        f"who is next, {records.waiting} waiting: {median_ms(lambda: requests.next_to_start(records)):.3f} ms"
    )
    predicted = median_ms(lambda: log.predict(records.now, "c1", records.settings))
    print(f"what comes next, {len(log.followers)} sequences: {predicted:.3f} ms")

    def look() -> None:
        targets = list(prefetch.targets(records))
        for target in targets:
            prefetch.keep_for(records, target, targets)

    print(f"what may be fetched, and what may go for it: {median_ms(look):.3f} ms")


if __name__ == "__main__":
    main()

"""A long, random, repeatable run: many models, requests, recalls, offers. `python -m tests.framework.simulate 100000`
prints what an event costs, in processor time of this thread: other programs do not count."""

from __future__ import annotations

import gc
import random
import sys
import time

from flexserve.framework import events as ev
from flexserve.framework.effects import Decision
from flexserve.framework.events import Event
from flexserve.framework.settings import Settings
from flexserve.framework.weights import Part

from .executor import Answer, Executor

MIB = 1 << 20
SETTINGS = Settings(budget_bytes=4 << 30, cap_bytes=8 << 30, floor_bytes=64 * MIB)


class Timed(Executor):
    """Measures every `handle`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.times: list[float] = []
        self.patience = 1_000_000
        inner = self.framework.handle

        def handle(now: float, event: Event) -> tuple[Decision, ...]:
            began = time.thread_time()
            try:
                return inner(now, event)
            finally:
                self.times.append(time.thread_time() - began)

        self.framework.handle = handle  # type: ignore[method-assign]


def simulate(events: int, *, seed: int, models: int = 4, segments: int = 60) -> Timed:
    """Run until so many events were handled. `segments` of 1 MiB for each model, and as many rows of 16 KiB."""
    chance = random.Random(seed)
    world = Timed(SETTINGS)
    for number in range(models):
        rows = Part(0, segments, 16 << 10, segments << 14, fill=False)
        world.register(f"m{number}", (rows, Part(segments, segments, MIB, segments * MIB)), 32_768)
    count = 0
    while len(world.log) < events:
        world.now += chance.expovariate(1.0)
        what = chance.random()
        if what < 0.5:
            count += 1
            model = f"m{min(int(chance.expovariate(0.7)), models - 1)}"
            session = f"{model}/{chance.randrange(6)}"
            world.ask(f"r{count}", Answer(model, session, chance.randrange(1, 900)), explicit=True)
            world.drain()
            for _ in range(3):
                world.step(f"r{count}", 40)
                world.drain()
            if world.answers[f"r{count}"].state == "computing":
                world.finish(f"r{count}")
        elif what < 0.6:
            world.post(ev.PressureRecall(len(world.log), chance.randrange(1, 2 << 30), None))
        elif what < 0.8:
            world.post(ev.Offer(chance.randrange(1, 2 << 30)))
        else:
            world.now += chance.expovariate(0.05)
            world.post(ev.Tick())
        world.drain()
    return world


if __name__ == "__main__":
    gc.disable()  # this program's log of all events is not the Framework's garbage
    done = simulate(int(sys.argv[1]), seed=1, models=20, segments=5_000)
    spent = sorted(done.times)
    done.framework.check()
    print(
        f"{len(spent)} events: mean {sum(spent) / len(spent) * 1e6:.1f} us, "
        f"median {spent[len(spent) // 2] * 1e6:.1f}, p99 {spent[len(spent) * 99 // 100] * 1e6:.1f}, "
        f"max {spent[-1] * 1e3:.2f} ms"
    )

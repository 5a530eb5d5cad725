"""How the time to the first token falls with the part of the model that is resident; and what refilling costs.

The resident part is what recalls leave: the earliest segments in execution order, and of the embedding the rows of
the prompt. Knows a running world that keeps no conversations; prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import machine
from .memory import FreeMemory
from .sides import Sample, SealedWorld

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class CachedStart:
    """One answer with a part of the weights resident."""

    fraction: float  # that was to be resident
    resident_bytes: int  # that was, before the request
    sample: Sample


def start(world: SealedWorld, token_ids: list[int], fraction: float, *, in_page_cache: bool) -> CachedStart:
    """Answer twice: to have everything resident, and, after a recall, for the clock.

    `in_page_cache`: the ciphertext of the rest is there; otherwise it is read from storage.
    """
    world.ask(token_ids)
    model = world.world.status().models[0]
    surplus = model.resident_bytes - round(fraction * model.info.weight_bytes)
    for path in world.files:
        (machine.warm if in_page_cache else machine.evict)(path)
    if fraction == 0:
        world.empty()
    elif surplus > 0:
        world.world.recall(surplus).wait()
    resident = world.world.status().models[0].resident_bytes
    if not in_page_cache:
        for path in world.files:
            machine.check_evicted(path)
    return CachedStart(fraction, resident, world.ask(token_ids))


@dataclass(frozen=True)
class Refill:
    """Everything brought in again from the page cache."""

    bytes_per_s: float  # of one core: by the processor time of whoever does not compute
    first_touch_s_per_gb: float  # of the free memory that it went to


def refill(world: SealedWorld, token_ids: list[int], free: FreeMemory) -> Refill:
    """`token_ids`: one token, so that there is little to compute and everything to load. `free`: what brings free
    memory into a known state: a first touch of memory that the host has taken costs more than all the rest."""
    for path in world.files:
        machine.warm(path)
    world.empty()
    free.prepare()
    condition = free.release()
    sample = world.ask(token_ids)
    assert sample.compute_s is not None
    rate = sample.read_bytes / max(sample.cpu_s - sample.compute_s, 1e-9)
    return Refill(rate, condition.first_touch_s_per_gb)

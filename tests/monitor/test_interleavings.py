"""Every interleaving of two CPUs' operations on three pages, in the C code and in the model."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import pytest

from flexserve.monitor.model import BLOCK_PAGES, DRAM_BASE, PAGE, Entry, Kind, Op, Pages

from .host_build import MONITOR, build

WATCHED = (0, 1, BLOCK_PAGES)  # two share a block
LISTS = ((0,), (1,), (2,), (0, 1), (2, 0), (1, 1))


def explorer(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = build(out / "explore", (*MONITOR, "host/explore.c"), "-fsanitize=address,undefined", *flags)
    return subprocess.run([program], capture_output=True, text=True, check=False)


Busy = tuple[int, int, int, int, int]  # kind, list, phase, next, merges


def reachable() -> set[str]:
    """The model's states, in the explorer's notation."""
    pages = Pages(2 * BLOCK_PAGES)
    pages.worst(WATCHED)
    start: tuple[Pages, tuple[Busy | None, Busy | None]] = (pages, (None, None))
    seen = {line(*start)}
    todo = [start]
    while todo:
        pages, ops = todo.pop()
        for cpu in (0, 1):
            here = ops[cpu]
            starts = [(k, n, 0, 0, 0) for k in Kind for n in range(len(LISTS))] if here is None else [here]
            for kind, chosen, phase, at, merges in starts:
                after = copy_of(pages)
                items = tuple(DRAM_BASE + WATCHED[i] * PAGE for i in LISTS[chosen])
                op = Op(Kind(kind), items, cpu=cpu, phase=phase, next=at, merges=bool(merges))
                more = after.step(op)
                if more is None:
                    continue
                after.worst(WATCHED)
                mine = (int(kind), chosen, op.phase, op.next, int(op.merges)) if more else None
                new = (after, (mine, ops[1]) if cpu == 0 else (ops[0], mine))
                text = line(*new)
                if text not in seen:
                    seen.add(text)
                    todo.append(new)
    return seen


def copy_of(pages: Pages) -> Pages:
    new = copy.copy(pages)
    for name in ("entry", "in_table", "form", "cached", "secret"):
        setattr(new, name, list(getattr(pages, name)))
    return new


def line(pages: Pages, ops: tuple[Busy | None, Busy | None]) -> str:
    watched = "".join(f"{pages.entry[p]:d}{pages.cached[p]:d}{pages.secret[p]:d}" for p in WATCHED)
    busy = " ".join("-" if op is None else ".".join(map(str, op)) for op in ops)
    return f"{watched} {pages.form[0]:d}{pages.form[1]:d} {pages.lock} {busy}"


def test_no_interleaving_shows_a_secret_and_the_model_reaches_the_same_states(tmp_path: Path) -> None:
    done = explorer(tmp_path)
    assert done.returncode == 0, done.stderr
    states = done.stdout.splitlines()
    assert len(states) > 5000
    assert set(states) == reachable()


@pytest.mark.parametrize(
    ("defence", "what"),
    [
        ("D_FLUSH", "the normal world can"),
        ("D_UNMAP", "the normal world can"),
        ("D_SCRUB", "the normal world can read a secret"),
        ("D_STATE", ""),
    ],
)
def test_control_without_a_defence_the_explorer_finds_the_hole(
    tmp_path: Path, defence: str, what: str
) -> None:
    source = tmp_path / "off.c"
    source.write_text(f'#include "defences.h"\nu64 defences_off = {defence};\n')
    done = explorer(tmp_path, "-DCONTROLS", str(source))
    assert done.returncode == 1
    assert f"broken: {what}" in done.stderr


def test_the_model_itself_refuses_a_state_that_leaks() -> None:
    pages = Pages(BLOCK_PAGES)
    pages.entry[3] = Entry.FLEX
    with pytest.raises(AssertionError, match="secret"):
        pages.worst([3])

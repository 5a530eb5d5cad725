"""The arena: a model's image as address space whose pages come and go, segment by segment.

Knows which segments are resident and how to place, recall, hand over and pin them. Does not know where
plaintext comes from (source.py) nor when it is wanted (loader.py).

A segment's state changes under one lock, and only like this (place/recall, lazy/pin are pairs):

    ABSENT --claim--> LOADING --placed--> RESIDENT --lazy--> LAZY --pin--> RESIDENT
       ^                 ^                    |                |
       |                 +---- lost pages ----+----------------+     (the kernel took single pages)
       +------------------------ recall ------+----------------+

A thread that touches a page that is not there waits in the kernel until it is placed. An ABSENT segment
has no page with content: where the kernel took some pages, the others are given back too, because they are
still the kernel's to take.

With a *journal*, every change that somebody else has to hear of is noted in the order in which it happened, in the
words of the Framework (framework/tables.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby

from ..core import PAGE_SIZE
from ..errors import FlexServeError
from ..framework.order import Range, join
from ..framework.tables import SegmentTrigger
from ..sealed.format import Region
from . import uffd
from .uffd import Userfaultfd, libc

MLOCK_ONFAULT = 1
RECALL_CHUNK = 4 << 20  # the longest stretch taken under the lock at a time


class SegmentState(IntEnum):
    """State of one segment in the arena."""

    ABSENT = 0
    LOADING = 1
    RESIDENT = 2
    LAZY = 3


@dataclass(frozen=True)
class Span:
    """Consecutive segments of one region: `count` from index `first`, and their bytes in the image."""

    first: int
    count: int
    offset: int
    length: int


@dataclass(frozen=True)
class Change:
    """What happened to `count` segments from index `first`."""

    what: SegmentTrigger
    first: int
    count: int


@dataclass
class Counters:
    """What happened in this arena since it was made; bytes, and numbers of events."""

    placed_bytes: int = 0
    recalled_bytes: int = 0
    lazy_bytes: int = 0
    lost_segments: int = 0  # segments of which the kernel took pages while they were LAZY


class Arena:
    """Address space for one image. Thread-safe."""

    def __init__(
        self,
        regions: Sequence[Region],
        faults: Userfaultfd | None,
        *,
        hide_from_dumps: bool = True,
        journal: bool = False,
        locked: bool = False,
    ) -> None:
        """`regions`: EMBED and BODY of the manifest. Without `faults` (no userfaultfd) a page that is touched
        before it is placed reads as zeros, so everything must be placed before anything computes.

        `journal`: note changes, for whoever calls `take_journal`. `locked`: this process locks its memory
        (mlockall), so that the arena has to be unlocked while the kernel may take pages of it.
        """
        self.regions = [r for r in regions if r.segment_count]
        self.length = -(-max(r.image_offset + r.padded_bytes for r in self.regions) // PAGE_SIZE) * PAGE_SIZE
        self.counters = Counters()
        self.poisoned: FlexServeError | None = None
        self._faults = faults
        self._journal: list[Change] | None = [] if journal else None
        self._locks, self._unlocked = locked, False
        self._lock = threading.RLock()
        self._closed = False
        last = max(r.first_segment + r.segment_count for r in self.regions)
        self._state = bytearray(last)
        # So that two body segments are exactly one huge page.
        self._shift = -self.regions[-1].image_offset % uffd.HUGE_PAGE
        self.base = uffd.reserve(self._shift + self.length, align=uffd.HUGE_PAGE) + self._shift
        uffd.advise(self.base, self.length, uffd.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            uffd.advise(self.base, self.length, uffd.MADV_HUGEPAGE)
        if hide_from_dumps:
            uffd.advise(self.base, self.length, uffd.MADV_DONTDUMP)
        if faults is not None:
            faults.register(self.base, self.length)

    # Geometry

    def span(self, first: int, count: int = 1) -> Span:
        """Where consecutive segments lie. Raises `IndexError` unless all are in one region."""
        for r in self.regions:
            at = first - r.first_segment
            if at >= 0 and at + count <= r.segment_count:
                start = at * r.unit_bytes
                end = min((at + count) * r.unit_bytes, r.padded_bytes)
                return Span(first, count, r.image_offset + start, end - start)
        raise IndexError(f"segments {first} to {first + count - 1} are not in one region of the image")

    def block(self, first: int) -> int:
        """How many segments from `first` fit before the next huge page begins; at least 1."""
        span = self.span(first)
        return max(1, (uffd.HUGE_PAGE - (self.base + span.offset) % uffd.HUGE_PAGE) // span.length)

    def segment_at(self, offset: int) -> int | None:
        """The segment at an image offset; None in the gap between the regions."""
        for r in self.regions:
            if 0 <= offset - r.image_offset < r.padded_bytes:
                return r.first_segment + (offset - r.image_offset) // r.unit_bytes
        return None

    # State

    def state(self, index: int) -> SegmentState:
        return SegmentState(self._state[index])

    def claim(self, first: int, limit: int) -> Span | None:
        """Claim the longest run of absent segments that starts at `first`, at most `limit`, in one region.

        Whoever gets a span must end it with `placed` or `poison`. None when `first` is not absent.
        """
        with self._lock:
            if self.poisoned or self._state[first] != SegmentState.ABSENT:
                return None
            end = self._region_end(first)
            count = 1
            while count < limit and first + count < end and self._state[first + count] == SegmentState.ABSENT:
                count += 1
            self._mark(first, count, SegmentState.LOADING)
            return self.span(first, count)

    def claim_fault(self, offset: int, planned: Sequence[Range] = (), run: int = 1) -> Span | None:
        """What to load because a thread waits at an image offset; None when nothing is to be done (any more).

        The segment there, with the other one of the same huge page if that is `planned` too; of small segments up to
        `run`, of half a huge page at most.
        """
        page = offset & ~(PAGE_SIZE - 1)
        with self._lock:
            index = self.segment_at(offset)
            if index is None or self.poisoned:
                self._zero(page, PAGE_SIZE)
                return None
            state = self._state[index]
            if state == SegmentState.LOADING:
                return None  # it is on its way, and placing it wakes the thread
            span = self.span(index)
            if state != SegmentState.ABSENT:
                if uffd.resident_pages(self.base + page, PAGE_SIZE)[0]:
                    self._wake(page, PAGE_SIZE)  # placed between the fault and now
                    return None
                self._drop_lost(span)
            first, count = self._absent_around(index, planned)
            end, most = (
                self._region_end(first),
                min(run, uffd.HUGE_PAGE // 2 // span.length, self.block(first)),
            )
            while count < most and first + count < end and self._state[first + count] == SegmentState.ABSENT:
                count += 1
            self._mark(first, count, SegmentState.LOADING)
            return self.span(first, count)

    def _absent_around(self, index: int, planned: Sequence[Range]) -> tuple[int, int]:
        """An absent segment and, where two make one huge page, its neighbour if that is to be loaded anyway: both are
        placed faster than one. The first, and how many. Call with the lock held."""
        span = self.span(index)
        if 2 * span.length != uffd.HUGE_PAGE:
            return index, 1
        other = index - 1 if (self.base + span.offset) % uffd.HUGE_PAGE else index + 1
        if self.segment_at(span.offset + (other - index) * span.length) != other:
            return index, 1
        if self._state[other] != SegmentState.ABSENT or self.span(other).length != span.length:
            return index, 1
        if not any(other in range(r.first, r.first + r.count) for r in planned):
            return index, 1
        return min(index, other), 2

    def _mark(self, first: int, count: int, state: SegmentState) -> None:
        self._state[first : first + count] = bytes([state]) * count

    # The journal

    def take_journal(self) -> list[Change]:
        """What has happened since the last call, in order."""
        with self._lock:
            taken = self._journal or []
            if taken:
                self._journal = []
            return taken

    def note_stopped(self, first: int, count: int) -> None:
        """These will not be loaded: note it of those that are not there nor on their way."""
        with self._lock:
            for index in range(first, first + count):
                if self._state[index] == SegmentState.ABSENT:
                    self._note(SegmentTrigger.STOPPED, index)

    def _note(self, what: SegmentTrigger, first: int, count: int = 1) -> None:
        """Call with the lock held."""
        if self._journal is None:
            return
        last = self._journal[-1] if self._journal else None
        if last and last.what == what and last.first + last.count == first:
            self._journal[-1] = Change(what, last.first, last.count + count)
        else:
            self._journal.append(Change(what, first, count))

    # Moving pages

    def place(self, span: Span, source: int, *, movable: bool = False) -> int:
        """Put `span.length` bytes from address `source` at a claimed span, and wake who waits for them.

        Pages of the span that are there already are left alone. With `movable`, `source` begins a huge page
        that may be moved instead of copied: returns the bytes that were, which `source` has no more.
        """
        target, moved = self.base + span.offset, 0
        if self._faults is None:
            libc.memmove(target, source, span.length)
        else:
            whole = span.length == uffd.HUGE_PAGE and target % uffd.HUGE_PAGE == 0
            if movable and whole and self._faults.can_move:
                moved = self._faults.move(target, source, span.length)
            if moved < span.length:
                self._faults.copy(target + moved, source + moved, span.length - moved)
        with self._lock:
            self._mark(span.first, span.count, SegmentState.RESIDENT)
            self._note(SegmentTrigger.PLACED, span.first, span.count)
            self.counters.placed_bytes += span.length
            # Whoever was told "it is on its way" tries again, whichever page it waits for.
            self._wake(span.offset, span.length)
        return moved

    def recall(self, segments: Iterable[int], given: Callable[[int], None] | None = None) -> int:
        """Zero these segments' pages and give them back to the kernel; returns the bytes given back.

        Allowed at any time: a thread that computes on them waits until they are placed again. The pages are
        taken out of the arena first and zeroed where nobody looks, so no thread ever sees the zeros.
        Segments that are absent or on their way are passed over. `given` hears of each stretch that is back.
        """
        freed = 0
        with self._lock:
            runs = self._runs(segments, RECALL_CHUNK)[::-1]
        while runs:
            span = runs.pop()
            indices = range(span.first, span.first + span.count)
            with self._lock:
                states = {self._state[i] for i in indices}
                if len(states) > 1:  # one has changed since the runs were made
                    runs += [self.span(i) for i in reversed(indices)]
                    continue
                (state,) = states
                if state < SegmentState.RESIDENT:
                    passed = (
                        SegmentTrigger.SPARED if state == SegmentState.LOADING else SegmentTrigger.RECALLED
                    )
                    self._note(passed, span.first, span.count)
                    continue
                away = uffd.move_away(self.base + span.offset, span.length)
                with contextlib.suppress(OSError):  # before Linux 5.18
                    # Frees page tables that are empty now (Linux 6.14): a whole huge page can be moved here again.
                    uffd.advise(self.base + span.offset, span.length, uffd.MADV_DONTNEED_LOCKED)
                self._mark(span.first, span.count, SegmentState.ABSENT)
                self._note(SegmentTrigger.RECALLED, span.first, span.count)
                self.counters.recalled_bytes += span.length
            if state == SegmentState.LAZY:
                freed += _zero_present(away, span.length)
            else:
                libc.memset(away, 0, span.length)
                freed += span.length
            uffd.release(away, span.length)
            if given is not None:
                given(span.length)
        return freed

    def lazy(self, segments: Iterable[int]) -> int:
        """Let the kernel take these resident segments when it wants, without asking (MADV_FREE).

        Their content stays valid until it does. Returns the bytes handed over: none without userfaultfd,
        where nobody would notice that a page is gone.
        """
        handed = 0
        if self._faults is None:
            return 0
        self._unlock()
        with self._lock:
            runs = self._runs(segments, 64 << 20)
        for span in runs:
            with self._lock:
                if any(
                    self._state[i] != SegmentState.RESIDENT
                    for i in range(span.first, span.first + span.count)
                ):
                    continue
                uffd.advise(self.base + span.offset, span.length, uffd.MADV_FREE)
                self._mark(span.first, span.count, SegmentState.LAZY)
                self.counters.lazy_bytes += span.length
            handed += span.length
        return handed

    def pin(self, segments: Iterable[int]) -> int:
        """Make lazy segments stay again. Those of which the kernel took pages become absent.

        Returns the bytes that stayed. Source: madvise(2), MADV_FREE ends at the next write.
        """
        kept = 0
        self._lock_again()
        with self._lock:
            runs = self._runs(segments, RECALL_CHUNK)[::-1]
        while runs:
            span = runs.pop()
            indices = range(span.first, span.first + span.count)
            with self._lock:
                states = {self._state[i] for i in indices}
                if states == {SegmentState.RESIDENT}:  # firm already
                    self._note(SegmentTrigger.PINNED, span.first, span.count)
                elif states == {SegmentState.LAZY}:
                    try:
                        # Marks every page written without changing it; EFAULT where one is missing.
                        uffd.advise(self.base + span.offset, span.length, uffd.MADV_POPULATE_WRITE)
                    except OSError:
                        if span.count == 1:
                            self._drop_lost(span)
                        else:
                            runs += [self.span(i) for i in reversed(indices)]
                        continue
                    self._mark(span.first, span.count, SegmentState.RESIDENT)
                    self._note(SegmentTrigger.PINNED, span.first, span.count)
                    kept += span.length
                elif len(states) > 1:
                    runs += [self.span(i) for i in reversed(indices)]
        return kept

    def _unlock(self) -> None:
        """The kernel takes no locked page. All of the arena at once: moving pages away wants one mapping."""
        with self._lock:
            if self._locks and not self._unlocked:
                self._unlocked = libc.munlock(self.base, self.length) == 0

    def _lock_again(self) -> None:
        with self._lock:
            if (
                self._unlocked
            ):  # without the right to, it stays unlocked: as it was where there is no right at all
                self._unlocked = libc.mlock2(self.base, self.length, MLOCK_ONFAULT) != 0

    def _drop_lost(self, span: Span) -> None:
        """Empty a segment of which the kernel took pages. Call with the lock held."""
        away = uffd.move_away(self.base + span.offset, span.length)
        _zero_present(away, span.length)
        uffd.release(away, span.length)
        self.counters.lost_segments += 1
        self._mark(span.first, span.count, SegmentState.ABSENT)
        self._note(SegmentTrigger.LOST, span.first, span.count)

    def _runs(self, segments: Iterable[int], limit: int) -> list[Span]:
        """Join neighbours of one region and state; no run crosses a multiple of `limit` bytes, so that huge pages
        stay whole. Call with the lock held: a state that changes meanwhile would make a run of nothing, whose span is
        that of another region's end."""
        runs: list[Span] = []
        for one in join(segments):
            at, end = one.first, one.first + one.count
            while at < end:
                state, span = self._state[at], self.span(at)
                same = self._state[at : min(end, self._region_end(at))]
                count = len(same) - len(same.lstrip(bytes([state])))
                room = limit - (self.base + span.offset) % limit
                count = min(count, -(-room // span.length))
                runs.append(self.span(at, count))
                at += count
        return runs

    def _region_end(self, index: int) -> int:
        ends = (r.first_segment + r.segment_count for r in self.regions)
        return next(end for end in ends if index < end)

    # Failure

    def poison(self, error: FlexServeError) -> None:
        """Give up on this model: release every waiting thread, now and later, with zeros.

        What is computed afterwards is worthless: callers check `poisoned` before they use a result. The
        first error is the one that is kept.
        """
        with self._lock:
            if self.poisoned is None:
                self.poisoned = error
            for r in self.regions:
                for index in range(r.first_segment, r.first_segment + r.segment_count):
                    if self._state[index] == SegmentState.LOADING:
                        span = self.span(index)
                        self._zero(span.offset, span.length)
                        self._state[index] = SegmentState.RESIDENT  # it has pages, which a recall takes
                        self._note(SegmentTrigger.PLACED, index)
            # Also those whose fault was read by a handler that died: they fault again, and get zeros.
            self._wake(0, self.length)

    def _zero(self, offset: int, length: int) -> None:
        if self._faults is not None:
            self._faults.zero(self.base + offset, length)

    def _wake(self, offset: int, length: int) -> None:
        if self._faults is not None:
            self._faults.wake(self.base + offset, length)

    # Reports

    def segments_in(self, *states: SegmentState) -> list[int]:
        """Indices of the segments in one of these states, in file order."""
        return [
            i
            for r in self.regions
            for i in range(r.first_segment, r.first_segment + r.segment_count)
            if self._state[i] in states
        ]

    def bytes_in(self, state: SegmentState) -> int:
        """Bytes of all segments in a state."""
        total = 0
        for r in self.regions:
            part = self._state[r.first_segment : r.first_segment + r.segment_count]
            total += part.count(state) * r.unit_bytes
            if part[-1] == state:
                total -= r.segment_count * r.unit_bytes - r.padded_bytes
        return total

    def resident_pages(self) -> int:
        """Pages that are in memory right now, asked of the kernel: the truth behind the states."""
        return sum(uffd.resident_pages(self.base, self.length))

    def close(self) -> None:
        """Zero and return everything; may be called twice. Nothing may compute on the arena any more."""
        if self._closed:
            return
        self._closed = True
        self.recall(self.segments_in(SegmentState.RESIDENT, SegmentState.LAZY))
        for at in range(0, self.length, RECALL_CHUNK):  # a span that was on its way when its loader ended
            length = min(RECALL_CHUNK, self.length - at)
            away = uffd.move_away(self.base + at, length)
            _zero_present(away, length)
            uffd.release(away, length)
        uffd.release(self.base - self._shift, self._shift + self.length)


def _zero_present(address: int, length: int) -> int:
    """Zero the pages of a private range that are in memory; returns their bytes. The others stay missing:
    giving memory back must not take any."""
    zeroed = 0
    at = address
    for present, run in groupby(uffd.resident_pages(address, length)):
        size = len(list(run)) * PAGE_SIZE
        if present:
            libc.memset(at, 0, size)
            zeroed += size
        at += size
    return zeroed

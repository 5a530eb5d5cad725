"""The reference model of the Flex-Monitor: page states, operations step by step, and the calls on top.

Knows what the C code (firmware/el2/pages.c and calls.c, firmware/sel1/flexmem.c) must do: tests drive both with
the same calls and compare every reachable state of both. Does not know descriptors, exceptions or registers. Words:
docs/monitor-abi.md. An item is the address of a page, or of a block with `ITEM_BLOCK` set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from .abi import BLOCK_SHIFT, ITEM_BLOCK, MAX_BATCH, MODE_ASYNC, PAGE_SHIFT, State, Status

PAGE = 1 << PAGE_SHIFT
BLOCK = 1 << BLOCK_SHIFT
BLOCK_PAGES = BLOCK // PAGE
DRAM_BASE = 1 << 30
SLICE_PAGES = 512  # so many pages the trusted OS scrubs between two points where an interrupt can stop it


class Entry(IntEnum):
    """A page's state with the two internal steps between `State`s."""

    UNPROTECTED = 0
    DONATING = 1
    FLEX = 2
    CLAIMED = 3
    SCRUBBING = 4
    SCRUBBED = 5


class Form(IntEnum):
    """How stage 2 shows a block."""

    BLOCK = 0
    TABLE = 1
    NONE = 2
    BROKEN = 3  # nothing maps it until the flush; then a table will
    MERGING = 4  # nothing maps it until the flush; then one entry will


class Kind(IntEnum):
    """An operation: the only ways to change a page's state."""

    DONATE = 0
    CLAIM = 1
    SCRUB = 2
    RELEASE = 3


FROM = (Entry.UNPROTECTED, Entry.FLEX, Entry.CLAIMED, Entry.SCRUBBED)
TO = (Entry.DONATING, Entry.CLAIMED, Entry.SCRUBBING, Entry.UNPROTECTED)
PROGRAMS = (
    ("lock", "check", "break", "flush", "make", "unlock"),
    ("lock", "check", "unlock"),
    ("lock", "check", "unlock", "zero"),
    ("lock", "check", "map", "merge", "flush_merged", "merged", "unlock"),
)
PER_ITEM = frozenset({"break", "make", "zero", "map", "merge", "merged"})
PUBLIC = (State.UNPROTECTED, State.UNPROTECTED, State.FLEX, State.CLAIMED, State.CLAIMED, State.CLAIMED)


@dataclass
class Op:
    """One operation under way: a position in its program."""

    kind: Kind
    items: tuple[int, ...]
    cpu: int = 0
    allowed: int = 1 << 62  # donate: pages wanted
    phase: int = 0
    next: int = 0
    merges: bool = False
    pages: int = 0
    bad: int = 0
    status: Status = Status.OK


@dataclass
class Pages:
    """Page states and what stage 2 and the worst TLB show of them."""

    count: int
    lock: int = 0  # 0, or the CPU that has it, plus 1
    entry: list[Entry] = field(default_factory=list)
    in_table: list[bool] = field(default_factory=list)
    form: list[Form] = field(default_factory=list)
    cached: list[bool] = field(default_factory=list)
    secret: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.count % BLOCK_PAGES:
            raise ValueError(f"{self.count} pages are no whole number of blocks")
        if not self.entry:
            self.entry = [Entry.UNPROTECTED] * self.count
            self.in_table = [False] * self.count
            self.form = [Form.BLOCK] * (self.count // BLOCK_PAGES)
            self.cached = [True] * self.count
            self.secret = [False] * self.count

    def mapped(self, page: int) -> bool:
        """Whether the normal world's stage 2 shows the page."""
        form = self.form[page // BLOCK_PAGES]
        return form == Form.BLOCK or (form == Form.TABLE and self.in_table[page])

    def state(self, address: int) -> State | Status:
        """QUERY."""
        if address % PAGE:
            return Status.INVALID
        page = (address - DRAM_BASE) // PAGE
        return PUBLIC[self.entry[page]] if 0 <= page < self.count else Status.RANGE

    def pages_of(self, item: int) -> range:
        """The page numbers an item names."""
        first = ((item & ~ITEM_BLOCK) - DRAM_BASE) // PAGE
        return range(first, first + (BLOCK_PAGES if item & ITEM_BLOCK else 1))

    def worst(self, watch: Iterable[int]) -> None:
        """TLBs learn all that is mapped, the secure world writes secrets where it may. Raises `AssertionError`."""
        for page in watch:
            self.cached[page] |= self.mapped(page)
            self.secret[page] |= self.entry[page] == Entry.FLEX
            reachable = self.cached[page]
            assert not (reachable and self.secret[page]), "the normal world can read a secret"
            assert not reachable or self.entry[page] <= Entry.DONATING, (
                "a page that is not UNPROTECTED is reached"
            )

    def _item_status(self, item: int, wanted: Entry) -> Status:
        size = BLOCK if item & ITEM_BLOCK else PAGE
        if (item & ~ITEM_BLOCK) % size:
            return Status.INVALID
        pages = self.pages_of(item)
        if not 0 <= pages[0] < self.count:
            return Status.RANGE
        return Status.OK if all(self.entry[page] == wanted for page in pages) else Status.STATE

    def _check(self, op: Op) -> Status:
        if not 0 < len(op.items) <= MAX_BATCH:
            return Status.INVALID
        done: list[int] = []
        named: set[int] = set()
        for index, item in enumerate(op.items):
            status = self._item_status(item, FROM[op.kind])
            pages = self.pages_of(item)
            if status == Status.STATE and not named.isdisjoint(pages):
                status = Status.DUPLICATE
            if status == Status.OK and op.kind == Kind.DONATE and len(done) + len(pages) > op.allowed:
                status = Status.UNWANTED
            if status != Status.OK:
                for page in done:
                    self.entry[page] = FROM[op.kind]
                op.bad = index
                return status
            for page in pages:
                self.entry[page] = TO[op.kind]
            done += pages
            named.update(pages)
        op.pages = len(done)
        return Status.OK

    def _flush(self) -> None:
        self.cached = [False] * self.count

    def _item(self, op: Op, step: str, item: int) -> None:
        pages = self.pages_of(item)
        block = pages[0] // BLOCK_PAGES
        form = self.form[block]
        inside = range(block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES)
        if step == "break" and item & ITEM_BLOCK:
            self.form[block] = Form.NONE
        elif step == "break":
            if form == Form.BLOCK:
                self.form[block] = Form.BROKEN
                for page in inside:
                    self.in_table[page] = True
            self.in_table[pages[0]] = False
        elif step == "make":
            if form == Form.BROKEN:
                self.form[block] = Form.TABLE
            for page in pages:
                self.entry[page] = Entry.FLEX
        elif step == "zero":
            for page in pages:
                self.secret[page] = False
                self.entry[page] = Entry.SCRUBBED
        elif step == "map":
            if form == Form.NONE:
                for page in inside:
                    self.in_table[page] = False
                self.form[block] = Form.BLOCK if item & ITEM_BLOCK else Form.TABLE
            for page in pages:
                self.in_table[page] = True
        elif step == "merge":
            if form == Form.TABLE and all(self.entry[page] == Entry.UNPROTECTED for page in inside):
                self.form[block] = Form.MERGING
                op.merges = True
        elif step == "merged" and form == Form.MERGING:
            self.form[block] = Form.BLOCK

    def step(self, op: Op) -> bool | None:
        """One step. True: there is more; False: done; None: another CPU has the lock."""
        program = PROGRAMS[op.kind]
        step = program[op.phase]
        if step == "lock":
            if self.lock:
                return None
            self.lock = op.cpu + 1
        elif step == "check":
            op.status = self._check(op)
            if op.status != Status.OK:
                self.lock = 0
                return False
        elif step == "flush" or (step == "flush_merged" and op.merges):
            self._flush()
        elif step == "unlock":
            self.lock = 0
        elif step in PER_ITEM:
            self._item(op, step, op.items[op.next])
            op.next += 1
            if op.next < len(op.items):
                return True
            op.next = 0
        op.phase += 1
        return op.phase < len(program)

    def run(self, op: Op) -> tuple[Status, int]:
        """All steps. The status, and the pages or the index of the bad item."""
        while self.step(op):
            pass
        return op.status, op.pages if op.status == Status.OK else op.bad


@dataclass
class Monitor:
    """The calls, over `Pages` and the trusted OS's two lists. Method names are those of the interface, lower case."""

    pages: Pages
    ticket: int = 0
    wanted: int = 0
    holding: list[int] = field(default_factory=list)
    claims: list[int] = field(default_factory=list)

    def want(self, pages: int) -> tuple[Status, int, int]:
        """SECURE_CALL(WANT): (status, pages, ticket)."""
        busy = sum(entry != Entry.UNPROTECTED for entry in self.pages.entry)
        if not 0 < pages <= self.pages.count - busy:
            return Status.INVALID, 0, 0
        self.ticket += 1
        self.wanted = pages
        return Status.WANT_PAGES, pages, self.ticket

    def donate(self, list_address: int, items: Sequence[int], ticket: int) -> tuple[Status, int]:
        """DONATE of a list that holds these items."""
        if not 0 < len(items) <= MAX_BATCH or list_address % 8:
            return (Status.TICKET if ticket >> 32 else Status.INVALID), 0
        if ticket >> 32:
            return Status.TICKET, 0
        end = list_address + 8 * len(items)
        for page in range((list_address - DRAM_BASE) // PAGE, (end - 1 - DRAM_BASE) // PAGE + 1):
            if not 0 <= page < self.pages.count or self.pages.entry[page] != Entry.UNPROTECTED:
                return Status.RANGE, 0
        if ticket != self.ticket or self.wanted == 0:
            return Status.TICKET, 0
        op = Op(Kind.DONATE, tuple(items), allowed=self.wanted)
        status, value = self.pages.run(op)
        if status == Status.OK:
            self.wanted -= op.pages
            self.holding += items
        return status, value

    def reclaim(self, pages: int, mode: int) -> tuple[Status, int]:
        """RECLAIM: (status, pages given back or chosen)."""
        if pages < 1 or not 0 <= mode <= MODE_ASYNC:
            return Status.INVALID, 0
        left = pages
        while self.holding and left:
            if self.holding[-1] & ITEM_BLOCK and left < BLOCK_PAGES:
                base = self.holding.pop() & ~ITEM_BLOCK
                self.holding += [base + i * PAGE for i in range(BLOCK_PAGES)]
            chosen: list[int] = []
            while self.holding and left and len(chosen) < MAX_BATCH:
                size = len(self.pages.pages_of(self.holding[-1]))
                if size > left:
                    break
                chosen.insert(0, self.holding.pop())
                left -= size
            self._change(Kind.CLAIM, chosen)
            self.claims += chosen
        if mode != MODE_ASYNC:
            self.run(1 << 62)
        return Status.OK, pages - left

    def run(self, pages: int) -> tuple[Status, int, int]:
        """RUN: (status, pages given back, pages still CLAIMED)."""
        if pages < 1:
            return Status.INVALID, 0, 0
        released = 0
        while self.claims and released < pages:
            batch: list[int] = []
            size = 0
            while self.claims and size < SLICE_PAGES and released + size < pages:
                batch.append(self.claims.pop(0))
                size += len(self.pages.pages_of(batch[-1]))
            self._change(Kind.SCRUB, batch)
            self._change(Kind.RELEASE, batch)
            released += size
        return Status.OK, released, sum(len(self.pages.pages_of(item)) for item in self.claims)

    def touch(self, address: int) -> State:
        """The normal world accesses a page. The state it was in; a CLAIMED one is released for it."""
        state = self.pages.state(address & ~(PAGE - 1))
        assert isinstance(state, State)
        if state == State.CLAIMED:
            page = (address - DRAM_BASE) // PAGE
            item = next(item for item in self.claims if page in self.pages.pages_of(item))
            self.claims.remove(item)
            self._change(Kind.SCRUB, [item])
            self._change(Kind.RELEASE, [item])
        return state

    def stats(self) -> tuple[int, int, int]:
        """STATS: FLEX pages, CLAIMED pages, pages wanted."""
        public = [PUBLIC[entry] for entry in self.pages.entry]
        return public.count(State.FLEX), public.count(State.CLAIMED), self.wanted

    def _change(self, kind: Kind, items: Sequence[int]) -> None:
        for start in range(0, len(items), MAX_BATCH):
            status, _ = self.pages.run(Op(kind, tuple(items[start : start + MAX_BATCH])))
            assert status == Status.OK, f"the trusted OS's {kind.name} was refused: {status.name}"

"""Applications that need memory beside FlexServe, each a process: `python -m flexserve.bench.neighbour KIND PATH`.

    sqlite   orders looked up and summed in a database of random orders, through SQLite and the page cache
    reader   a file read in random blocks of 64 KiB, through the page cache

It prints `ready`, then works; for each line on its input it prints what it has done since the last one: `COUNT SECONDS`
(queries, or bytes). It ends with its input.
"""

from __future__ import annotations

import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ..errors import EngineFailure
from .child import Child

KINDS = ("sqlite", "reader")
BLOCK_BYTES = 64 << 10
ROW_BYTES = 512  # of an order, about
CUSTOMERS_PER_ORDER = 20


class Neighbour(Child):
    """One application, from outside."""

    def __init__(self, kind: str, path: Path) -> None:
        """Raises `EngineFailure` when it does not start."""
        super().__init__("flexserve.bench.neighbour", kind, str(path))
        self.kind = kind
        if self.listen() != "ready\n":
            self.close()
            raise EngineFailure(f"the neighbour {kind} did not start")

    def rate(self) -> float:
        """Queries or bytes per second since the last call. Raises `EngineFailure` when it has ended."""
        try:
            count, seconds = self.ask("").split()
        except ValueError:
            raise EngineFailure(f"the neighbour {self.kind} has ended") from None
        return int(count) / float(seconds)


@contextmanager
def _making(path: Path) -> Iterator[Path]:
    """Another name to write under: the file appears when it is complete, and none is left when it is not."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_database(path: Path, nbytes: int) -> None:
    """Orders with an index by customer, about `nbytes` in all."""
    orders = max(1000, nbytes // ROW_BYTES)
    rng = random.Random(orders)  # noqa: S311 - the same database every time
    customers = max(1, orders // CUSTOMERS_PER_ORDER)
    with _making(path) as part, closing(sqlite3.connect(part)) as db:
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, cents INTEGER, note TEXT)")
        note_bytes = ROW_BYTES - 40
        db.executemany(
            "INSERT INTO orders VALUES (?, ?, ?, ?)",
            (
                (n, rng.randrange(customers), rng.randrange(100000), rng.randbytes(note_bytes // 2).hex())
                for n in range(orders)
            ),
        )
        db.execute("CREATE INDEX by_customer ON orders (customer)")
        db.commit()


def make_file(path: Path, nbytes: int) -> None:
    """Random bytes."""
    with _making(path) as part, part.open("wb") as file:
        for _ in range(0, nbytes, 1 << 20):
            file.write(os.urandom(1 << 20))


def sqlite_query(path: Path) -> Callable[[], int]:
    """A function that makes one query: mostly an order by its number, sometimes the sum of a customer's."""
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)
    orders = db.execute("SELECT max(id) + 1 FROM orders").fetchone()[0]
    customers = db.execute("SELECT max(customer) + 1 FROM orders").fetchone()[0]
    rng = random.Random(0)  # noqa: S311

    def query() -> int:
        if rng.random() < 0.1:
            which = (rng.randrange(customers),)
            db.execute("SELECT count(*), sum(cents) FROM orders WHERE customer = ?", which).fetchone()
        else:
            db.execute("SELECT * FROM orders WHERE id = ?", (rng.randrange(orders),)).fetchone()
        return 1

    return query


def random_read(path: Path) -> Callable[[], int]:
    """A function that reads one block."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    blocks = os.fstat(fd).st_size // BLOCK_BYTES
    rng, buffer = random.Random(0), bytearray(BLOCK_BYTES)  # noqa: S311

    def read() -> int:
        return os.preadv(fd, [buffer], rng.randrange(blocks) * BLOCK_BYTES)

    return read


def main(kind: str, path: Path) -> None:
    """Work until the input ends."""
    work = {"sqlite": sqlite_query, "reader": random_read}[kind](path)
    done = 0

    def go_on() -> None:
        nonlocal done
        while True:
            done += work()

    print("ready", flush=True)
    threading.Thread(target=go_on, daemon=True).start()
    before, since = 0, time.perf_counter()
    for _ in sys.stdin:
        now, at = done, time.perf_counter()
        print(now - before, at - since, flush=True)
        before, since = now, at
    os._exit(0)  # in the middle of its work


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

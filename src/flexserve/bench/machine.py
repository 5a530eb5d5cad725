"""The page cache before a measurement, and what machine it is. Free memory's state is memory.py's."""

from __future__ import annotations

import mmap
import os
import platform
import resource
from pathlib import Path

from ..errors import EngineFailure
from ..flexmem.processors import PROCESSORS
from ..flexmem.uffd import libc

WARM_TRIES = 4


def evict(path: Path) -> None:
    """Empty the page cache of a file and check that it is (mincore). Raises `EngineFailure`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)  # dirty pages would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        left = cached_pages(fd)
    finally:
        os.close(fd)
    if left:
        raise EngineFailure(f"{left} pages of {path} stay in the page cache: a cold start cannot be measured")


def check_evicted(path: Path) -> None:
    """That none of a file's pages is in the page cache. Raises `EngineFailure`."""
    with path.open("rb") as file:
        there = cached_pages(file.fileno())
    if there:
        raise EngineFailure(
            f"{there} pages of {path} are in the page cache just before a cold start: another program reads it"
        )


def may_lock(count: int) -> bool:
    """Whether this process may lock that many bytes (mlock(2))."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return os.geteuid() == 0 or limit == resource.RLIM_INFINITY or limit >= count


def warm(path: Path) -> None:
    """Read a file so that it is in the page cache, all but what the kernel takes back at once (proactive
    reclaim). Raises `EngineFailure` when that is more than a hundredth, each time."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    for _ in range(WARM_TRIES):
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
            there = cached_pages(file.fileno())
        if there >= pages * 0.99:
            return
    raise EngineFailure(f"only {there} of {pages} pages of {path} stay in the page cache: memory is short")


def cached_pages(fd: int) -> int:
    """How many pages of a file are in the page cache (mincore(2))."""
    import ctypes

    size = os.fstat(fd).st_size
    pages = -(-size // mmap.PAGESIZE)
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        out = bytearray(pages)
        view = (ctypes.c_char * pages).from_buffer(out)
        first = ctypes.c_char.from_buffer(mapping)
        try:
            if libc.mincore(ctypes.addressof(first), size, ctypes.addressof(view)) != 0:
                raise EngineFailure("mincore failed")
        finally:
            del first, view
    return sum(byte & 1 for byte in out)


def describe() -> dict[str, str | int]:
    """The machine, for the record beside every number."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": len(PROCESSORS),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def peak_resident_bytes(pid: int) -> int:
    """VmHWM of a process: the most memory it ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise EngineFailure(f"process {pid} does not say its peak memory")

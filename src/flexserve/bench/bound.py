"""The shortest time a cold start can take on a machine: max(I/O, processor work, compute). Pure.

The three run side by side in a perfect pipeline, so the longest of them is what remains. Filling the pipeline
and the layer that waits for the last segment come on top in any real one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Rates:
    """What a machine does, undisturbed; decrypting and placing per core."""

    cores: int
    read_bytes_per_s: float  # from storage, past the page cache
    decrypt_bytes_per_s: float
    place_bytes_per_s: float  # into memory that the host backs, by the better of copying and moving
    first_touch_extra_s_per_byte: float = 0.0  # what taking a fresh page costs more in this memory state

    def __post_init__(self) -> None:
        positive = (self.cores, self.read_bytes_per_s, self.decrypt_bytes_per_s, self.place_bytes_per_s)
        if min(positive) <= 0 or self.first_touch_extra_s_per_byte < 0:
            raise ValueError(f"rates must be above 0: {self}")


@dataclass(frozen=True)
class Work:
    """What one cold start has to do. The two of computing are seen when every segment is resident."""

    load_bytes: int
    compute_s: float  # wall time
    compute_cpu_s: float  # processor time, of all cores


@dataclass(frozen=True)
class Bound:
    """The three candidates, in seconds."""

    io_s: float
    cpu_s: float
    compute_s: float

    @property
    def lower_bound_s(self) -> float:
        return max(self.io_s, self.cpu_s, self.compute_s)

    @property
    def limited_by(self) -> str:
        """`io`, `cpu` or `compute`."""
        return max((self.io_s, "io"), (self.cpu_s, "cpu"), (self.compute_s, "compute"))[1]

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self) | {"lower_bound_s": self.lower_bound_s, "limited_by": self.limited_by}


def lower_bound(work: Work, rates: Rates) -> Bound:
    """Every byte is read, decrypted by one core and placed by one core; computing takes what it takes resident."""
    per_byte = (
        1 / rates.decrypt_bytes_per_s + 1 / rates.place_bytes_per_s + rates.first_touch_extra_s_per_byte
    )
    return Bound(
        io_s=work.load_bytes / rates.read_bytes_per_s,
        cpu_s=(work.load_bytes * per_byte + work.compute_cpu_s) / rates.cores,
        compute_s=work.compute_s,
    )

"""Medians, spreads and ratios of repeated measurements. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spread:
    """What repeated measurements of one thing came to, in the unit of the values."""

    median: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises `ValueError` without values."""
        if not values:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Series:
    """The values of one quantity of one side, one per round."""

    side: str
    quantity: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, object]:
        return {"side": self.side, "quantity": self.quantity} | asdict(Spread.of(self.values))


@dataclass(frozen=True)
class Ratio:
    """Numerator over denominator: of their medians, and round by round for the spread."""

    numerator: Series
    denominator: Series

    def __post_init__(self) -> None:
        if len(self.numerator.values) != len(self.denominator.values):
            raise ValueError("a ratio needs both sides of every round")

    @property
    def value(self) -> float:
        return self.numerator.median / self.denominator.median

    def per_round(self) -> list[float]:
        """Less sensitive to a machine that slows down from round to round."""
        pairs = zip(self.numerator.values, self.denominator.values, strict=True)
        return [above / below for above, below in pairs]

    def as_dict(self) -> dict[str, object]:
        return {
            "ratio": self.value,
            "per_round": asdict(Spread.of(self.per_round())),
            "numerator": self.numerator.as_dict(),
            "denominator": self.denominator.as_dict(),
        }

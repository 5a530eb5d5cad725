"""The arithmetic behind the report: medians, ratios, the lower bound."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.bench.bound import Rates, Work, lower_bound
from flexserve.bench.stats import Ratio, Series, Spread

positive = st.floats(min_value=1e-3, max_value=1e6)
rates = st.builds(
    Rates,
    cores=st.integers(1, 128),
    read_bytes_per_s=st.floats(1e6, 1e11),
    decrypt_bytes_per_s=st.floats(1e6, 1e11),
    place_bytes_per_s=st.floats(1e6, 1e11),
    first_touch_extra_s_per_byte=st.floats(0, 1e-8),
)
work = st.builds(Work, load_bytes=st.integers(0, 1 << 40), compute_s=positive, compute_cpu_s=positive)


@given(st.lists(positive, min_size=1, max_size=9))
def test_a_spread_encloses_its_median(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.min <= spread.median <= spread.max
    assert (spread.median, spread.count) == (statistics.median(values), len(values))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=9))
def test_a_ratio_is_of_medians_and_its_spread_is_of_rounds(pairs: list[tuple[float, float]]) -> None:
    above, below = zip(*pairs, strict=True)
    ratio = Ratio(Series("a", "ttft_s", above), Series("b", "ttft_s", below))
    assert ratio.value == statistics.median(above) / statistics.median(below)
    assert ratio.per_round() == [a / b for a, b in pairs]
    inverse = Ratio(ratio.denominator, ratio.numerator)
    assert ratio.value * inverse.value == pytest.approx(1)


@given(st.lists(positive, min_size=1, max_size=9), st.floats(0.01, 100))
def test_a_ratio_does_not_depend_on_the_unit(values: list[float], unit: float) -> None:
    scaled = tuple(v * unit for v in values)
    ratio = Ratio(Series("a", "ttft_s", scaled), Series("b", "ttft_s", tuple(values)))
    assert ratio.value == pytest.approx(unit)
    assert ratio.per_round() == pytest.approx([unit] * len(values))


def test_rounds_that_miss_a_side_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="every round"):
        Ratio(Series("a", "ttft_s", (1.0, 2.0)), Series("b", "ttft_s", (1.0,)))
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


@given(work, rates)
def test_the_bound_is_the_longest_of_its_three(work: Work, rates: Rates) -> None:
    bound = lower_bound(work, rates)
    assert bound.lower_bound_s == max(bound.io_s, bound.cpu_s, bound.compute_s)
    assert getattr(bound, f"{bound.limited_by}_s") == bound.lower_bound_s
    assert bound.lower_bound_s >= work.compute_s


@given(work, rates, st.floats(1, 100))
def test_a_faster_machine_never_raises_the_bound(work: Work, rates: Rates, times: float) -> None:
    faster = Rates(
        rates.cores,
        rates.read_bytes_per_s * times,
        rates.decrypt_bytes_per_s * times,
        rates.place_bytes_per_s * times,
        rates.first_touch_extra_s_per_byte / times,
    )
    assert lower_bound(work, faster).lower_bound_s <= lower_bound(work, rates).lower_bound_s


@given(work, rates)
def test_more_to_load_never_lowers_the_bound(work: Work, rates: Rates) -> None:
    more = Work(work.load_bytes + (1 << 20), work.compute_s, work.compute_cpu_s)
    assert lower_bound(more, rates).lower_bound_s >= lower_bound(work, rates).lower_bound_s


def test_the_bound_of_a_machine_that_can_be_worked_out_by_hand() -> None:
    rates = Rates(cores=2, read_bytes_per_s=2e9, decrypt_bytes_per_s=10e9, place_bytes_per_s=5e9)
    bound = lower_bound(Work(load_bytes=10**9, compute_s=1.0, compute_cpu_s=2.0), rates)
    assert (bound.io_s, bound.compute_s) == (0.5, 1.0)
    assert bound.cpu_s == pytest.approx((0.1 + 0.2 + 2.0) / 2)
    assert bound.limited_by == "cpu"


@pytest.mark.parametrize(
    "wrong", [{"cores": 0}, {"read_bytes_per_s": 0.0}, {"first_touch_extra_s_per_byte": -1.0}]
)
def test_rates_that_no_machine_has_are_refused(wrong: dict[str, float]) -> None:
    fields = {"cores": 2, "read_bytes_per_s": 1e9, "decrypt_bytes_per_s": 1e9, "place_bytes_per_s": 1e9}
    with pytest.raises(ValueError, match="above 0"):
        Rates(**(fields | wrong))  # type: ignore[arg-type]

"""`flexserve tz bench`: its arithmetic, its limits, its verb. The measurements: slow tests at the end."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from tests.schemas import validate

from flexserve.cli import tz
from flexserve.errors import EngineFailure
from flexserve.worlds.trustzone import bench, firmware

MISSING = firmware.missing_tools()
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"missing {', '.join(MISSING)}: {firmware.INSTALL}")

TIMED = {
    "protect": [900_000, 800_000, 5_000_000],
    "recall": [20_000_000, 21_000_000, 22_000_000],
    "async": [300_000, 400_000, 400_000],
    "carve_out": [90_000_000],
    "switch_on": [2_000_000],
    "request_on": [6_000_000, 7_000_000, 30_000_000],
    "workload_on": [105, 210, 400],
    "workload_off": [100, 200, 300],
}
TICK = 16  # instructions between two ticks of the machine's clock
SLOW = {"protect": [90_000_000], "recall": [90_000_000]}
COUNTED = {"hvc_10000": [1_080_000]}


def values(boots: list[float]) -> dict[str, bench.Number]:
    return {number.limit.name: number for number in bench.numbers(TIMED, SLOW, COUNTED, boots, "no Debian")}


def test_numbers_are_medians_and_ratios_of_medians() -> None:
    got = {name: number.value for name, number in values([2.0, 3.0, 9.0]).items()}
    assert got["protect_64mb_ms"] == 0.9
    assert got["recall_gb_s"] == pytest.approx((64 << 20) / 21e6)
    assert got["protect_batch_ratio"] == 100
    assert got["async_return_percent"] == pytest.approx(100 * 0.4 / 21)
    assert got["hvc_instructions"] == 108
    assert got["request_on_ms"] == 7
    assert got["linux_boot_s"] == 3
    assert got["stage2_overhead_percent"] == pytest.approx(5)


def test_a_number_that_was_not_measured_is_not_met_and_says_why() -> None:
    number = values([])["linux_boot_s"]
    assert number.value is None and not number.met and number.why == "no Debian"
    assert all(other.why == "" for name, other in values([]).items() if name != "linux_boot_s")


@pytest.mark.parametrize("limit", bench.LIMITS, ids=lambda limit: limit.name)
def test_a_limit_is_met_at_the_bound_and_not_beyond(limit: bench.Limit) -> None:
    worse = limit.bound * (0.99 if limit.least else 1.01)
    assert limit.met(limit.bound) and not limit.met(worse)


def test_a_machine_that_says_something_else_is_no_sample() -> None:
    assert bench.parse(["sample protect 0x10", "sample protect 0x20"]) == {"protect": [16, 32]}
    with pytest.raises(EngineFailure, match="set-up failed: protect"):
        bench.parse(["sample protect 0x10", "set-up failed: protect"])


def test_the_verb_prints_each_number_beside_its_limit_and_fails_for_a_miss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "qemu_version", lambda: "0")
    report = bench.report(bench.numbers(TIMED, SLOW, COUNTED, [], "no Debian"), COUNTED)
    validate("tz-bench", report)
    monkeypatch.setattr(bench, "run", lambda _: report)
    done = CliRunner().invoke(tz.command, ["bench"])
    assert done.exit_code == 1
    assert all(limit.name in done.output for limit in bench.LIMITS)
    assert "NOT MET  linux_boot_s" in done.output and "no Debian" in done.output
    assert "met      hvc_instructions" in done.output


def test_the_batch_switch_is_no_defence_and_only_in_a_control_build() -> None:
    assert "BATCH" not in firmware.defence_bits()


@pytest.mark.slow
@needs_tools
def test_a_call_takes_no_more_instructions_than_promised() -> None:
    counted = bench.measure(firmware.build().flash, ["calls"], bench.ICOUNT)
    rounds = counted["hvc_10000"]
    assert max(rounds) - min(rounds) <= 4 * TICK, "instruction counts repeat, but for the clock's ticks"
    assert max(rounds) / 10_000 <= 150


@pytest.mark.slow
@needs_tools
def test_a_look_at_the_request_page_takes_few_instructions_and_none_while_protection_is_on() -> None:
    counted = bench.measure(firmware.build().flash, ["polls"], bench.ICOUNT)
    look = max(counted["gap_off"]) - max(counted["gap_on"])
    assert 50 < look <= 500


@pytest.mark.slow
@needs_tools
def test_protection_goes_off_by_itself_after_the_window_and_comes_on_by_request() -> None:
    timed = bench.measure(firmware.build().flash, ["request"])
    assert min(timed["idle_off"]) >= 90_000_000, "not before the window of 100 ms is over"
    assert len(timed["request_on"]) == 9


@pytest.mark.slow
@needs_tools
def test_one_invalidation_per_page_is_many_times_slower() -> None:
    flash = firmware.build(controls=True)
    batched = bench.measure(flash.without(frozenset()), ["pages"])
    per_page = bench.measure(flash.without(bench.PER_PAGE), ["pages"])
    assert min(per_page["protect"]) > 4 * min(batched["protect"])

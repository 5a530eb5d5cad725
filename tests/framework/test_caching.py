"""The best distribution: who is kept, and who gets how much."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.framework.caching import ModelUse, SessionUse, distribute, divide
from flexserve.framework.settings import Settings
from flexserve.framework.usage import Usage
from flexserve.framework.weights import Ledger, Part, Weights

SETTINGS = Settings()
NO_DEADLINE = settings(deadline=None)  # the machine may be busy
GIB = 1 << 30


def use(
    model: str, recent: int, *, frequency: float = 0.0, prompt: float = 128.0, size: int = GIB
) -> ModelUse:
    return ModelUse(model, size, recent, frequency or float(recent), prompt, 0.0)


def kept(*models: ModelUse, budget: int = 4 * GIB) -> set[str]:
    return {s.model for s in distribute(budget, models, (), 0.0, SETTINGS).shares if s.kept}


def test_models_above_a_quarter_of_the_last_hours_invocations_are_kept() -> None:
    assert kept(use("a", 60), use("b", 26), use("c", 14)) == {"a", "b"}


def test_exactly_a_quarter_is_not_above_it() -> None:
    assert kept(use("a", 75), use("b", 25)) == {"a"}


def test_without_one_above_the_threshold_the_top_three_are_kept() -> None:
    assert kept(use("a", 24), use("b", 22), use("c", 20), use("d", 18), use("e", 16)) == {"a", "b", "c"}


def test_a_model_nobody_ever_invoked_is_not_kept() -> None:
    assert kept(use("a", 0), use("b", 0)) == set()


def test_after_a_quiet_hour_the_most_frequent_stay() -> None:
    models = [
        use(name, 0, frequency=count) for name, count in zip("abcde", (1.0, 5.0, 4.0, 3.0, 2.0), strict=True)
    ]
    assert kept(*models) == {"b", "c", "d"}


def budgets(*models: ModelUse, budget: int) -> dict[str, int]:
    return {s.model: s.budget_bytes for s in distribute(budget, models, (), 0.0, SETTINGS).shares}


def test_a_budget_grows_with_the_rate_and_shrinks_with_the_prompt() -> None:
    rates = budgets(use("a", 60), use("b", 40), budget=GIB)
    assert rates["a"] > rates["b"]
    prompts = budgets(use("a", 50, prompt=64), use("b", 50, prompt=1024), budget=GIB)
    assert prompts["a"] > 2 * prompts["b"]
    often = budgets(use("a", 50, frequency=500.0), use("b", 50, frequency=50.0), budget=GIB)
    assert often["a"] > often["b"]


def test_sessions_get_their_share_the_newest_first_and_more_when_the_weights_fit() -> None:
    sessions = [SessionUse(f"s{n}", "a", GIB // 8, float(n)) for n in range(6)]

    def chosen(budget: int, now: float = 10.0) -> tuple[str, ...]:
        return distribute(budget, [use("a", 1)], sessions, now, SETTINGS).shares[0].sessions

    assert chosen(GIB) == ("s5", "s4")  # a quarter
    assert chosen(2 * GIB) == ("s5", "s4", "s3", "s2", "s1", "s0")
    assert chosen(2 * GIB, now=3603.5) == ("s5", "s4")  # the others are too old


@NO_DEADLINE
@given(
    st.integers(0, 1 << 40),
    st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(0, 10), max_size=8),
    st.data(),
)
def test_what_is_divided_is_never_more_than_there_is_nor_more_than_one_can_use(
    total: int, scores: dict[str, float], data: st.DataObject
) -> None:
    most = {name: data.draw(st.integers(0, 1 << 36)) for name in scores}
    given_out = divide(total, scores, most)
    assert given_out.keys() == scores.keys()
    assert all(0 <= given_out[name] <= most[name] for name in scores)
    assert sum(given_out.values()) <= total + len(scores)  # rounding of floats above 2^53


@NO_DEADLINE
@given(st.integers(0, 1 << 33), st.lists(st.integers(0, 50), min_size=1, max_size=12), st.data())
def test_the_distribution_fits_the_budget_and_prefers_nobody_without_reason(
    budget: int, counts: list[int], data: st.DataObject
) -> None:
    models = [use(f"m{n}", count, size=data.draw(st.integers(1, GIB))) for n, count in enumerate(counts)]
    sessions = [
        SessionUse(
            f"s{n}", data.draw(st.sampled_from(models)).model, data.draw(st.integers(1, GIB)), float(n)
        )
        for n in range(data.draw(st.integers(0, 5)))
    ]
    best = distribute(budget, models, sessions, 10.0, SETTINGS)
    assert sum(s.budget_bytes for s in best.shares) <= budget + len(models)
    sizes = {s.session: s.nbytes for s in sessions}
    for share in best.shares:
        assert share.prefix_bytes + sum(sizes[s] for s in share.sessions) <= share.budget_bytes
        assert share.kept or not share.budget_bytes
    assert best == distribute(budget, list(reversed(models)), list(reversed(sessions)), 10.0, SETTINGS)


def test_only_the_last_hour_counts_as_recent() -> None:
    usage = Usage()
    for minute in range(90):
        usage.invoked(minute * 60.0, SETTINGS)
    assert usage.recent(89 * 60.0, SETTINGS) == 60
    assert usage.recent(89 * 60.0 + 3600.0, SETTINGS) == 0
    day = replace(SETTINGS, frequency_half_life_s=60.0)
    assert (
        abs(usage.frequency(89 * 60.0 + 86400.0, SETTINGS) / usage.frequency(89 * 60.0, SETTINGS) - 0.5)
        < 1e-9
    )
    assert usage.frequency(1e9, day) < 1e-9


@NO_DEADLINE
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=40))
def test_the_typical_prompt_lies_between_the_shortest_and_the_longest(prompts: list[int]) -> None:
    usage = Usage()
    for tokens in prompts:
        usage.prompted(tokens)
    assert min(prompts) - 1e-6 <= usage.typical_prompt_tokens <= max(prompts) + 1e-6


PARTS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(2, 50), st.integers(0, 1), st.booleans()), min_size=1, max_size=3
)


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    """Parts of any sizes; the first may not be filled."""
    parts: list[Part] = []
    first = draw(st.integers(0, 5))
    for count, unit, short, gap in draw(PARTS):
        parts.append(Part(first, count, unit, count * unit - short, fill=bool(parts) or draw(st.booleans())))
        first += count + gap
    return Weights(parts, Ledger())


@NO_DEADLINE
@given(weights(), st.data())
def test_positions_and_bytes_agree_with_counting_one_by_one(model: Weights, data: st.DataObject) -> None:
    sizes = [model.nbytes(n, n + 1) for n in range(model.count)]
    assert sum(sizes) == model.size
    start = data.draw(st.integers(0, model.count))
    end = data.draw(st.integers(start, model.count))
    assert model.nbytes(start, end) == sum(sizes[start:end])
    wanted = data.draw(st.integers(0, model.size + 3))
    far = model.forward(start, wanted)
    assert far == max(n for n in range(start, model.count + 1) if sum(sizes[start:n]) <= wanted)
    near = model.backward(end, wanted)
    assert near == max((n for n in range(end + 1) if sum(sizes[n:end]) >= wanted), default=0)

"""The text generator: what it writes is what the call says, and the held-out side stays held out."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training.assistant import TASK, avoided
from training.forms import normalise, spellings, templates
from training.generator import INTENTS, Generator
from training.schema import SPANS, TOOLS, check_call, read_call, write_call
from training.text import sections
from training.words import Words, is_held_out

from training import phrases

SEEDS = st.integers(0, 1 << 32)


def test_the_same_seed_writes_the_same_sentences() -> None:
    assert list(islice(Generator(3), 50)) == list(islice(Generator(3), 50))
    assert list(islice(Generator(3), 50)) != list(islice(Generator(4), 50))


def test_no_template_is_on_both_sides_and_every_command_is_held_out_somewhere() -> None:
    assert set(INTENTS) == set(sections("templates"))
    for intent in INTENTS:
        training, kept = set(templates("templates", intent, False)), set(templates("templates", intent, True))
        assert training and kept
        assert not training & kept
        assert training | kept == set(sections("templates")[intent])


def test_no_listed_name_is_on_both_sides() -> None:
    """An invented name may happen to be a listed one: rarely, and by chance only."""
    trained, kept = set(Words(False)._names), set(Words(True)._names)
    assert trained and kept and not trained & kept
    assert not any(is_held_out(name) for name in trained)
    assert all(is_held_out(name) for name in kept)


def test_no_held_out_wording_can_be_said_by_a_training_template() -> None:
    trained = {
        normalise(say.removeprefix("= "))
        for intent in INTENTS
        for template in templates("templates", intent, False)
        for say in spellings(template)
        if "{" not in say
    }
    kept = {normalise(e.say) for e in islice(Generator(1, held_out=True), 5000)}
    assert not kept & trained
    assert {normalise(e.say) for e in islice(Generator(1), 5000)} & trained  # the control


@pytest.mark.parametrize(("held_out", "least", "most"), [(True, 0.08, 0.14), (False, 0.28, 0.36)])
def test_the_share_of_sentences_with_odd_words_is_the_documented_one(
    monkeypatch: pytest.MonkeyPatch, held_out: bool, least: float, most: float
) -> None:
    drawn: list[str] = []
    for name in ("invented", "salad", "phrase"):
        make = getattr(Words, name)

        def draw(self: Words, *args: Any, make: Callable[..., str] = make) -> str:
            drawn.append("odd")
            return make(self, *args)

        monkeypatch.setattr(Words, name, draw)
    generator, odd = Generator(1, held_out=held_out), 0
    for _ in range(4000):
        drawn.clear()
        next(generator)
        odd += bool(drawn)
    assert least <= odd / 4000 <= most


def test_alternatives_inside_alternatives_are_all_spelled_out() -> None:
    assert spellings("= (a|b (c|d)) e") == ["= a e", "= b c e", "= a e", "= b d e"]


def test_the_generator_never_writes_a_sentence_it_is_to_avoid() -> None:
    sentences = {normalise(e.say) for e in islice(Generator(1), 20_000)}
    avoid = avoided() | {"what's new", "thank you"}
    assert len(avoid) == 52
    assert sentences & avoid  # the control: left alone, it does write some
    assert not {normalise(e.say) for e in islice(Generator(1, avoid=avoid), 20_000)} & avoid


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.booleans())
def test_every_call_fits_the_schema_and_copies_its_spans_from_the_sentence(seed: int, side: bool) -> None:
    for example in islice(Generator(seed, held_out=side), 40):
        assert read_call(example.answer) == example.call
        assert "\n" not in example.say and "\n" not in example.reply
        for key in SPANS & set(example.call):
            span = str(example.call[key])
            if span != "all":
                assert span.lower() in example.say.lower(), example
        for key in ("time", "until"):
            if key in example.call and example.call[key] != "all":
                assert re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", str(example.call[key])), example


def test_both_sides_use_every_tool() -> None:
    for side in (False, True):
        assert {e.call["tool"] for e in islice(Generator(1, held_out=side), 3000)} == set(TOOLS)
    assert len(TASK.held_out(100)) == 100


@settings(deadline=None)
@given(SEEDS)
def test_a_time_in_digits_means_what_a_second_reader_makes_of_it(seed: int) -> None:
    when = phrases.clock(Random(seed))
    found = re.fullmatch(r"(\d{1,2})(?:[:.](\d\d))?(?: ?([ap])\.?m\.?)?", when.phrase, re.IGNORECASE)
    if found:
        hour, minute, half = int(found[1]), int(found[2] or 0), (found[3] or "").lower()
        if half:
            hour = hour % 12 + (12 if half == "p" else 0)
        assert when.time == f"{hour:02d}:{minute:02d}"


@pytest.mark.parametrize(
    ("phrase", "time"),
    [
        ("half past six", "06:30"),
        ("half eight", "08:30"),
        ("quarter to nine", "08:45"),
        ("quarter to one", "12:45"),
        ("ten past twelve", "12:10"),
        ("twenty-five to one", "12:35"),
        ("nine in the evening", "21:00"),
        ("half past twelve in the afternoon", "12:30"),
        ("ten at night", "22:00"),
        ("12 am", "00:00"),
        ("12pm", "12:00"),
        ("noon", "12:00"),
        ("midnight", "00:00"),
    ],
)
def test_a_phrase_always_means_the_same_time(phrase: str, time: str) -> None:
    rng = Random(5)
    meanings = {
        w.time
        for w in (phrases.clock(rng) for _ in range(60_000))
        if w.phrase.replace("-", " ") == phrase.replace("-", " ")
    }
    assert meanings == {time}


def test_durations_in_words_mean_their_minutes() -> None:
    rng = Random(5)
    seen = {w.phrase: w.minutes for w in (phrases.duration(rng) for _ in range(40_000))}
    wanted = {"an hour and a half": 90, "two and a half hours": 150, "forty-five minutes": 45, "1 minute": 1}
    assert {phrase: seen[phrase] for phrase in wanted} == wanted


@pytest.mark.parametrize(
    ("time", "spoken"), [("00:00", "12 am"), ("07:30", "7:30 am"), ("12:05", "12:05 pm"), ("23:00", "11 pm")]
)
def test_replies_speak_the_twelve_hour_clock(time: str, spoken: str) -> None:
    assert phrases.spoken_time(time) == spoken


def test_a_call_is_written_in_the_schemas_order_and_read_back() -> None:
    call = {"day": "friday", "time": "07:00", "tool": "set_alarm"}
    assert write_call(call) == '{"tool":"set_alarm","time":"07:00","day":"friday"}'  # type: ignore[arg-type]
    assert read_call("Alarm set.\n" + write_call(call)) == call  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Alarm set.",
        '{"tool":"set_alarm"}',
        '{"tool":"fly","to":"Oslo"}',
        '{"tool":"set_timer","minutes":"5"}',
        '{"tool":"set_timer","minutes":true}',
        '{"tool":"none","why":"x"}',
        '["none"]',
        '{"tool":"none"} trailing',
    ],
)
def test_an_answer_that_is_not_one_well_formed_call_counts_as_none_at_all(answer: str) -> None:
    assert read_call(answer) is None


def test_a_bad_call_is_named() -> None:
    with pytest.raises(ValueError, match="set_timer lacks minutes"):
        check_call({"tool": "set_timer"})

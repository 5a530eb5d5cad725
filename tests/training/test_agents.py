"""What the router, the rewriter and the privacy guard are trained on: the answers follow from what is said."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from training.forms import normalise, spellings, templates, wordings
from training.guard import PLACEHOLDERS
from training.rewriter import POLITE
from training.tasks import TASKS
from training.text import sections

SHARED = {"fillers", "beginnings", "chatter", "ends"}  # of the rewriter: what is to be left out
AGENTS = [name for name in TASKS if name != "assistant"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_same_seed_gives_the_same_samples_in_which_nothing_is_left_open(
    name: str, held_out: bool
) -> None:
    samples = list(islice(TASKS[name].samples(3, held_out), 300))
    assert samples == list(islice(TASKS[name].samples(3, held_out), 300))
    assert samples != list(islice(TASKS[name].samples(4, held_out), 300))
    for sample in samples:
        assert not re.search(r"\{\w+\}|\(.*\|", sample.say + sample.answer.partition("\n")[0]), sample
        assert TASKS[name].read(sample.answer) == sample.want


@pytest.mark.parametrize("name", AGENTS)
def test_no_sentence_of_the_held_out_side_is_a_training_sentence(name: str) -> None:
    kept = {say for say, _ in TASKS[name].held_out()}
    trained = {sample.say for sample in islice(TASKS[name].samples(1, False), 3000)}
    assert not kept & trained


def test_whole_lines_of_the_routers_templates_are_held_out() -> None:
    for section, lines in sections("router").items():
        kept, trained = templates("router", section, True), templates("router", section, False)
        assert kept and trained and not set(kept) & set(trained)
        assert set(kept) | set(trained) == set(lines)


@pytest.mark.parametrize("folder", ["rewriter", "guard"])
def test_no_wording_of_the_others_is_on_both_sides(folder: str) -> None:
    for section in set(sections(folder)) - SHARED:
        kept, trained = (
            {normalise(say) for line in wordings(folder, section, side) for say in line}
            for side in (True, False)
        )
        assert trained and not kept & trained
        assert kept | trained == {normalise(s) for line in sections(folder)[section] for s in spellings(line)}


def test_the_router_is_shown_every_agent_equally_often() -> None:
    wanted = [sample.want for sample in islice(TASKS["router"].samples(1, False), 2000)]
    for agent in ("assistant", "rewriter", "guard", "none"):
        assert 0.2 <= wanted.count(agent) / len(wanted) <= 0.3


def test_a_polite_message_says_nothing_that_the_note_does_not_say() -> None:
    form = {word for text in POLITE.values() for word in re.findall(r"[\w']+", text)} | {"Hi", "Hello"}
    form |= {word.lower() for word in form}
    for sample in islice(TASKS["rewriter"].samples(1, True), 500):
        said = set(re.findall(r"[\w']+", sample.say))
        assert set(re.findall(r"[\w']+", sample.answer)) <= said | form, sample
        assert re.match(r"(Hi .+|Hello), .+[.?]$", sample.answer)


def test_every_thing_a_note_can_say_has_a_polite_form() -> None:
    assert set(POLITE) == set(sections("rewriter")) - SHARED


def test_the_guard_changes_nothing_but_what_is_private() -> None:
    marks = "|".join(map(re.escape, sorted(set(PLACEHOLDERS.values()))))
    redacted = 0
    for sample in islice(TASKS["guard"].samples(1, False), 1000):
        between = [re.escape(part) for part in re.split(marks, sample.answer)]
        assert re.fullmatch("(.+)".join(between), sample.say), sample
        redacted += len(between) > 1
    assert 700 <= redacted <= 950


def test_no_phone_number_address_or_full_name_is_left_in_a_guarded_text() -> None:
    for sample in islice(TASKS["guard"].samples(2, False), 1000):
        assert "@" not in sample.answer
        assert not re.search(r"\d{5}|\b\d{3,4} \d{3,4}\b", sample.answer), sample

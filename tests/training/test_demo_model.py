"""The committed demo model: the figures belong to it, and llama.cpp answers with it for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2
import llama_cpp
import pytest
from training.schema import read_call

from training import evaluate

Answer = Callable[[str], str]


@pytest.fixture(scope="module")
def answer() -> Answer:
    return evaluate.assistant(evaluate.MODEL)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(evaluate.RESULT.read_text(encoding="utf-8"))
    return result


def test_the_committed_evaluation_is_of_the_committed_model(recorded: dict[str, Any]) -> None:
    assert recorded["sha256"] == evaluate.digest(evaluate.MODEL)


def test_the_committed_evaluation_is_of_the_committed_sentences(recorded: dict[str, Any]) -> None:
    for name, cases in (("held_out", evaluate.held_out()), ("handwritten", evaluate.handwritten())):
        part = recorded[name]
        assert part["total"] == len(cases)
        assert part["right"] + len(part["misses"]) == len(cases)
        wanted = dict(cases)
        assert all(wanted[miss["say"]] == miss["want"] for miss in part["misses"])


@pytest.mark.parametrize(
    ("name", "share"),
    [
        pytest.param(
            "held_out",
            0.95,
            marks=pytest.mark.xfail(strict=True, reason="864 of 1,000, see docs/demo-model.md"),
        ),
        ("handwritten", 0.80),
    ],
)
def test_the_committed_model_reaches_its_target(recorded: dict[str, Any], name: str, share: float) -> None:
    assert recorded[name]["right"] >= share * recorded[name]["total"]


def test_the_docs_quote_the_committed_figures(recorded: dict[str, Any]) -> None:
    text = (evaluate.MODEL.parent.parent / "docs" / "demo-model.md").read_text(encoding="utf-8")
    for name in ("held_out", "handwritten"):
        part = recorded[name]
        assert f"{part['right']} of {part['total']:,} ({part['share']:.1%})" in text


def test_the_model_is_at_most_five_megabytes() -> None:
    assert evaluate.MODEL.stat().st_size <= 5_000_000


@pytest.mark.parametrize("name", ["held_out", "handwritten"])
def test_a_sample_is_answered_as_recorded(answer: Answer, recorded: dict[str, Any], name: str) -> None:
    cases = evaluate.held_out(40) if name == "held_out" else evaluate.handwritten()[::2]
    missed = {miss["say"] for miss in recorded[name]["misses"]}
    expected = sum(say not in missed for say, _ in cases)
    scored = evaluate.score(cases, answer)
    assert abs(scored.right - expected) <= 2, "another processor may round a close call the other way"


def test_an_answer_is_one_sentence_and_one_call(answer: Answer) -> None:
    assert answer("Set an alarm for half past seven tomorrow.") == (
        'Alarm set for 7:30 am tomorrow.\n{"tool":"set_alarm","time":"07:30","day":"tomorrow"}'
    )


@pytest.mark.parametrize(
    "say", ["Hello!", "What is the capital of Peru?", "play some music", "thanks", "what can you do"]
)
def test_what_it_cannot_do_ends_in_no_tool(answer: Answer, say: str) -> None:
    assert read_call(answer(say)) == {"tool": "none"}


def test_the_chat_template_lays_messages_out_as_in_training() -> None:
    template = llama_cpp.Llama(str(evaluate.MODEL), vocab_only=True, verbose=False).metadata[
        "tokenizer.chat_template"
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi {{ 1 }}"}]
    text = (
        jinja2.Environment(autoescape=False)
        .from_string(template)
        .render(messages=messages, add_generation_prompt=True)
    )
    assert text == "<|system|>Be brief.<|end|><|user|>hi {{ 1 }}<|end|><|assistant|>"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["held_out", "handwritten"])
def test_the_whole_sets_give_the_recorded_figures(
    answer: Answer, recorded: dict[str, Any], name: str
) -> None:
    cases = evaluate.held_out() if name == "held_out" else evaluate.handwritten()
    scored = evaluate.score(cases, answer)
    assert abs(scored.right - recorded[name]["right"]) <= max(2, len(cases) // 100), scored.misses

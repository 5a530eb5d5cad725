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


def test_the_committed_evaluation_reaches_what_the_docs_promise(recorded: dict[str, Any]) -> None:
    assert recorded["held_out"]["share"] >= 0.95
    assert recorded["handwritten"]["share"] >= 0.80


def test_the_model_is_at_most_five_megabytes() -> None:
    assert evaluate.MODEL.stat().st_size <= 5_000_000


def test_a_sample_of_both_sets_is_answered_right(answer: Answer) -> None:
    held_out = evaluate.score(evaluate.held_out(30), answer)
    handwritten = evaluate.score(evaluate.handwritten()[::5], answer)
    assert held_out.right >= 27, held_out.misses
    assert handwritten.right >= 7, handwritten.misses


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
def test_the_whole_handwritten_set_reaches_eighty_percent(answer: Answer) -> None:
    score = evaluate.score(evaluate.handwritten(), answer)
    assert score.share >= 0.80, score.misses


@pytest.mark.slow
def test_the_whole_held_out_set_reaches_ninety_five_percent(answer: Answer) -> None:
    score = evaluate.score(evaluate.held_out(), answer)
    assert score.share >= 0.95, score.misses

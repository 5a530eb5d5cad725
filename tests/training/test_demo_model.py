"""The committed demo model: the figures belong to it, and llama.cpp answers with it for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2
import llama_cpp
import pytest
from training.schema import read_call
from training.task import Task
from training.tasks import TASKS

from training import evaluate

Answer = Callable[[str], str]
ASSISTANT = TASKS["assistant"]
TARGETS = {("assistant", "held_out"): 0.95, ("assistant", "handwritten"): 0.80}
BEHIND = {("assistant", "held_out"): "875 of 1,000, see docs/demo-model.md"}


@pytest.fixture(scope="module")
def answer() -> Answer:
    return evaluate.answers(ASSISTANT.model)


def recorded(task: Task) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(task.result.read_text(encoding="utf-8"))
    return result


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_committed_evaluation_is_of_the_committed_model_and_sentences(task: Task) -> None:
    result = recorded(task)
    assert result["sha256"] == evaluate.digest(task.model)
    for name, cases in evaluate.sets(task).items():
        part = result[name]
        assert part["total"] == len(cases)
        assert part["right"] + len(part["misses"]) == len(cases)
        wanted = dict(cases)
        assert all(wanted[miss["say"]] == miss["want"] for miss in part["misses"])


@pytest.mark.parametrize(
    ("task", "name"),
    [
        pytest.param(
            *key, marks=[pytest.mark.xfail(strict=True, reason=BEHIND[key])] if key in BEHIND else []
        )
        for key in TARGETS
    ],
)
def test_the_committed_model_reaches_its_target(task: str, name: str) -> None:
    part = recorded(TASKS[task])[name]
    assert part["right"] >= TARGETS[task, name] * part["total"]


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_docs_quote_the_committed_figures(task: Task) -> None:
    text = (task.model.parent.parent / "docs" / "demo-model.md").read_text(encoding="utf-8")
    for name in evaluate.sets(task):
        part = recorded(task)[name]
        assert f"{part['right']} of {part['total']:,} ({part['share']:.1%})" in text


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_model_is_at_most_five_megabytes(task: Task) -> None:
    assert task.model.stat().st_size <= 5_000_000


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_sample_is_answered_as_recorded(task: Task) -> None:
    answer = evaluate.answers(task.model)
    for name, cases in evaluate.sets(task).items():
        part = cases[:40] if name == "held_out" else cases[::2]
        missed = {miss["say"] for miss in recorded(task)[name]["misses"]}
        expected = sum(say not in missed for say, _ in part)
        scored = evaluate.score(task, part, answer)
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
    template = llama_cpp.Llama(str(ASSISTANT.model), vocab_only=True, verbose=False).metadata[
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
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_whole_sets_give_the_recorded_figures(task: Task) -> None:
    answer = evaluate.answers(task.model)
    for name, cases in evaluate.sets(task).items():
        scored = evaluate.score(task, cases, answer)
        right = recorded(task)[name]["right"]
        assert abs(scored.right - right) <= max(2, len(cases) // 100), scored.misses

"""One sealed model: what it refuses, how it ends early, and what happens when its file goes bad."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from flexserve.bench.shapes import shape_named
from flexserve.core import FinishReason, Message, Sampling, Token
from flexserve.engine import model as model_module
from flexserve.errors import (
    ContextOverflow,
    InvalidRequest,
    ModelUnsupported,
    SegmentNotAuthentic,
    TemplateFailure,
)
from flexserve.flexmem.arena import Span
from flexserve.flexmem.source import FetchTimes, Source, Staging

from ..sealed_fixtures import SMALL
from ..world_fixtures import DEMO
from .secure_models import CONTEXT_TOKENS, Opened, Opener, answer, request, settle

EVERYTHING = 1 << 40
PROMPT = "Wake me at seven."


@pytest.fixture(scope="module")
def demo(opener: Opener) -> Opened:
    return opener.open(DEMO)


@pytest.fixture
def fresh(opener: Opener) -> Iterator[Opened]:
    """A cold model that a test may ruin: its file is its own."""
    yield opener.open(opener.generate(SMALL, "Q8_0"))


class Gate:
    """A source whose first fetches wait until the gate is opened."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.open = threading.Event()
        self.reached = threading.Event()

    def fetch(self, span: Span, staging: Staging) -> FetchTimes:
        self.reached.set()
        assert self.open.wait(30)
        return self._source.fetch(span, staging)


def gate(opened: Opened) -> Gate:
    assert opened.model._loader
    made = Gate(opened.model._loader._source)
    opened.model._loader._source = made
    return made


# Requests it refuses


def test_an_overflow_names_the_prompts_tokens_and_the_contexts(fresh: Opened) -> None:
    asked = request(token_ids=(5,) * (CONTEXT_TOKENS + 17), max_tokens=1)
    with pytest.raises(ContextOverflow) as caught:
        answer(fresh.model, asked)
    assert str(CONTEXT_TOKENS + 17) in caught.value.message
    assert str(CONTEXT_TOKENS) in caught.value.message.replace(str(CONTEXT_TOKENS + 17), "")
    assert fresh.model.resident_bytes == 0  # nothing was loaded for it


def test_the_answers_tokens_count_too(fresh: Opened) -> None:
    fits = request(token_ids=(5,) * (CONTEXT_TOKENS - 4), max_tokens=4)
    assert len(answer(fresh.model, fits).token_ids) == 4
    with pytest.raises(ContextOverflow, match=rf"{CONTEXT_TOKENS - 4} tokens .* 5, .* {CONTEXT_TOKENS}$"):
        answer(fresh.model, request(token_ids=(5,) * (CONTEXT_TOKENS - 4), max_tokens=5))


def test_without_a_limit_an_answer_fills_the_context(fresh: Opened) -> None:
    finished = answer(fresh.model, request(token_ids=(5,) * (CONTEXT_TOKENS - 9)))
    assert finished.finish_reason == FinishReason.LENGTH
    assert len(finished.token_ids) == 9


def test_an_empty_prompt_is_refused_where_the_model_has_no_first_token(opener: Opener) -> None:
    qwen = opener.open(opener.generate(shape_named("tiny-qwen3"), "Q8_0"))
    with pytest.raises(InvalidRequest, match="empty") as caught:
        answer(qwen.model, request(prompt="", max_tokens=4))
    assert caught.value.code == "invalid_request"


def test_an_empty_prompt_is_answered_where_the_model_adds_a_first_token(fresh: Opened) -> None:
    finished = answer(fresh.model, request(prompt="", max_tokens=4))
    assert finished.timings.prompt_tokens == 1
    assert len(finished.token_ids) == 4


@pytest.mark.parametrize("token", [SMALL.vocabulary, SMALL.vocabulary + 1, (1 << 31) - 1])
def test_a_token_id_outside_the_vocabulary_is_refused_by_name(fresh: Opened, token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{token} .* {SMALL.vocabulary}"):
        answer(fresh.model, request(token_ids=(1, token), max_tokens=1))
    last = answer(fresh.model, request(token_ids=(SMALL.vocabulary - 1,), max_tokens=1))
    assert len(last.token_ids) == 1


def test_messages_need_a_template(opener: Opener) -> None:
    opened = opener.open(opener.generate(SMALL, "Q8_0"))
    assert opened.model._equipment is not None
    opened.model._equipment = replace(opened.model._equipment, template=None)
    with pytest.raises(TemplateFailure, match="no chat template"):
        answer(opened.model, request(messages=(Message("user", "x"),)))


# Stop strings, seeds, ends


def test_a_stop_string_ends_the_answer_before_it(demo: Opened) -> None:
    whole = answer(demo.model, request(prompt=PROMPT, max_tokens=40)).text
    stop = whole[10:14]
    emitted: list[Token] = []
    finished = answer(
        demo.model, request(prompt=PROMPT, max_tokens=40, stop=("never there", stop)), emitted.append
    )
    assert finished.finish_reason == FinishReason.STOP
    assert finished.text == whole[: whole.index(stop)]
    assert "".join(t.text for t in emitted) == finished.text
    assert [t.id for t in emitted] == list(finished.token_ids)


def test_a_stop_string_that_is_begun_but_not_completed_is_text(demo: Opened) -> None:
    whole = answer(demo.model, request(prompt=PROMPT, max_tokens=12))
    stop = whole.text[-3:] + "\0"
    finished = answer(demo.model, request(prompt=PROMPT, max_tokens=12, stop=(stop,)))
    assert (finished.text, finished.token_ids) == (whole.text, whole.token_ids)
    assert finished.finish_reason == FinishReason.LENGTH


def test_the_end_token_ends_an_answer_unless_it_is_ignored(demo: Opened) -> None:
    assert demo.model._model
    vocab = demo.model._model.vocab
    turn = f"<|user|>{PROMPT}<|end|><|assistant|>"  # what the model was trained on
    prompt = tuple(vocab.tokenize(turn, add_special=False, parse_special=True))
    ends = answer(demo.model, request(token_ids=prompt, max_tokens=400, ignore_eos=False))
    assert ends.finish_reason == FinishReason.STOP
    assert not any(vocab.is_end(t) for t in ends.token_ids)
    on = answer(demo.model, request(token_ids=prompt, max_tokens=len(ends.token_ids) + 5))
    assert len(on.token_ids) == len(ends.token_ids) + 5
    assert vocab.is_end(on.token_ids[len(ends.token_ids)])


def test_a_seed_decides_a_sampled_answer(demo: Opened) -> None:
    def sampled(seed: int | None) -> tuple[int, ...]:
        warm = Sampling(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed)
        return answer(demo.model, request(prompt=PROMPT, max_tokens=24, sampling=warm)).token_ids

    assert sampled(7) == sampled(7)
    assert len({sampled(seed) for seed in range(4)}) == 4
    assert sampled(None) != sampled(None)


def test_a_repeat_penalty_counts_the_prompt(demo: Opened) -> None:
    def penalised(penalty: float) -> tuple[int, ...]:
        sampling = Sampling(temperature=0, repeat_penalty=penalty)
        return answer(demo.model, request(prompt=PROMPT, max_tokens=16, sampling=sampling)).token_ids

    assert penalised(1.0) != penalised(50.0)
    assert len(set(penalised(50.0))) == 16


# Cancelling


def test_a_cancelled_prefill_gives_no_token(fresh: Opened) -> None:
    """Compute waits for a page; the cancel comes then."""
    held = gate(fresh)
    cancelled = threading.Event()
    emitted: list[Token] = []
    finished: list[Any] = []
    thread = threading.Thread(
        target=lambda: finished.append(
            answer(fresh.model, request(token_ids=(5,) * 600, max_tokens=9), emitted.append, cancelled.is_set)
        ),
        daemon=True,
    )
    thread.start()
    assert held.reached.wait(30)
    cancelled.set()
    fresh.model.cancel()
    held.open.set()
    thread.join(30)
    assert finished[0].finish_reason == FinishReason.CANCELLED
    assert not emitted
    assert finished[0].token_ids == ()
    assert len(answer(fresh.model, request(token_ids=(5,), max_tokens=2)).token_ids) == 2


def test_a_cancelled_decode_keeps_what_was_said(demo: Opened) -> None:
    emitted: list[Token] = []
    finished = answer(
        demo.model, request(prompt=PROMPT, max_tokens=40), emitted.append, lambda: len(emitted) >= 3
    )
    assert finished.finish_reason == FinishReason.CANCELLED
    assert [t.id for t in emitted] == list(finished.token_ids)
    assert len(emitted) == 3


def test_what_was_cancelled_before_it_began_computes_nothing(fresh: Opened) -> None:
    finished = answer(fresh.model, request(token_ids=(5,), max_tokens=9), cancelled=lambda: True)
    assert finished.finish_reason == FinishReason.CANCELLED
    assert finished.token_ids == ()


def test_a_late_cancel_does_not_end_the_next_answer(demo: Opened) -> None:
    demo.model.cancel()
    assert len(answer(demo.model, request(prompt=PROMPT, max_tokens=5)).token_ids) == 5


# Files that go bad after registration


def truncate(opened: Opened) -> None:
    os.truncate(opened.flex, opened.flex.stat().st_size // 2)


def overwrite(opened: Opened) -> None:
    size = opened.flex.stat().st_size
    with opened.flex.open("r+b") as file:
        file.write(b"\x37" * size)
        file.flush()
        os.fsync(file.fileno())


def flip(opened: Opened) -> None:
    """One bit of the last segment."""
    with opened.flex.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
        file.flush()
        os.fsync(file.fileno())


RUIN: list[Callable[[Opened], None]] = [truncate, overwrite, flip]


def check_poisoned(opened: Opened, first: SegmentNotAuthentic) -> None:
    """Every later request ends with the same error, without computing."""
    assert opened.model.status().poisoned
    for _ in range(2):
        with pytest.raises(SegmentNotAuthentic) as caught:
            answer(opened.model, request(token_ids=(5,), max_tokens=2))
        assert caught.value is first
    assert first.code == "segment_not_authentic"
    assert "segment" in first.message


@pytest.mark.parametrize("ruin", RUIN)
def test_a_file_that_went_bad_before_the_first_answer_gives_no_token(
    fresh: Opened, ruin: Callable[[Opened], None]
) -> None:
    ruin(fresh)
    emitted: list[Token] = []
    with pytest.raises(SegmentNotAuthentic) as caught:
        answer(fresh.model, request(token_ids=(5, 6, 7), max_tokens=5), emitted.append)
    assert not emitted
    check_poisoned(fresh, caught.value)


@pytest.mark.parametrize("ruin", RUIN)
def test_a_file_that_goes_bad_during_an_answer_ends_it_and_nothing_computed_after_is_used(
    fresh: Opened, demo: Opened, ruin: Callable[[Opened], None]
) -> None:
    other = answer(demo.model, request(prompt=PROMPT, max_tokens=8)).token_ids
    undisturbed = answer(fresh.model, request(token_ids=(5, 6, 7), max_tokens=8)).token_ids
    emitted: list[Token] = []

    def emit(token: Token) -> None:
        emitted.append(token)
        if len(emitted) == 3:
            ruin(fresh)
            fresh.model.recall(EVERYTHING)

    with pytest.raises(SegmentNotAuthentic) as caught:
        answer(fresh.model, request(token_ids=(5, 6, 7), max_tokens=8), emit)
    assert tuple(t.id for t in emitted) == undisturbed[:3]
    check_poisoned(fresh, caught.value)
    demo.model.recall(EVERYTHING)
    assert answer(demo.model, request(prompt=PROMPT, max_tokens=8)).token_ids == other


@pytest.mark.parametrize("ruin", RUIN)
def test_without_userfaultfd_a_bad_file_gives_no_token_either(
    opener: Opener, ruin: Callable[[Opened], None]
) -> None:
    opened = opener.open(opener.generate(SMALL, "Q8_0"), on_demand=False)
    ruin(opened)
    emitted: list[Token] = []
    with pytest.raises(SegmentNotAuthentic) as caught:
        answer(opened.model, request(token_ids=(5,), max_tokens=5), emitted.append)
    assert not emitted
    check_poisoned(opened, caught.value)


def test_a_file_replaced_under_its_name_is_not_the_models_file(fresh: Opened) -> None:
    expected = answer(fresh.model, request(token_ids=(5,), max_tokens=5)).token_ids
    other = fresh.flex.with_suffix(".other")
    other.write_bytes(b"junk" * 1000)
    other.replace(fresh.flex)
    fresh.model.recall(EVERYTHING)
    assert answer(fresh.model, request(token_ids=(5,), max_tokens=5)).token_ids == expected


def test_a_resident_model_does_not_care_for_its_file(fresh: Opened) -> None:
    expected = answer(fresh.model, request(token_ids=(5,), max_tokens=5)).token_ids
    truncate(fresh)
    assert answer(fresh.model, request(token_ids=(5,), max_tokens=5)).token_ids == expected


# Memory


def test_opening_makes_no_weight_resident_and_an_answer_only_what_it_needs(opener: Opener) -> None:
    opened = opener.open(opener.generate(SMALL, "Q8_0"))  # untied
    assert opened.model.arena.resident_pages() == 0
    finished = answer(opened.model, request(token_ids=(0,), max_tokens=1))
    settle(opened.model)
    body = opened.model._body
    assert finished.timings.load_bytes == body.padded_bytes + (16 << 10)
    assert opened.model.resident_bytes == body.padded_bytes + (16 << 10)


def test_a_recall_takes_what_is_needed_last_first_and_no_more_than_asked_and_a_run(fresh: Opened) -> None:
    answer(fresh.model, request(token_ids=(0,), max_tokens=1))
    settle(fresh.model)
    before = fresh.model.resident_bytes
    assert fresh.model.recall(0) == 0
    given = fresh.model.recall(1)
    assert 0 < given <= 4 << 20
    assert fresh.model.resident_bytes == before - given
    assert fresh.model.recall(EVERYTHING) == before - given
    assert fresh.model.arena.resident_pages() == 0


def test_keys_and_values_beyond_the_machine_are_refused_before_they_are_allocated(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = opener.generate(SMALL, "Q8_0")
    assert opener.open(gguf).model.status().kv_bytes == 3 * 2 * 64 * 2 * 2 * CONTEXT_TOKENS
    assert model_module.kv_limit_bytes() > 1 << 28
    monkeypatch.setattr(model_module, "kv_limit_bytes", lambda: 1 << 20)
    with pytest.raises(ModelUnsupported, match=rf"{CONTEXT_TOKENS} tokens .* 1 MiB .*, .* 1 MiB") as caught:
        opener.open(gguf)
    assert "context" in caught.value.hint


def test_a_closed_model_gives_nothing_back_and_may_be_closed_again(fresh: Opened) -> None:
    answer(fresh.model, request(token_ids=(0,), max_tokens=1))
    settle(fresh.model)
    fresh.model.close()
    assert fresh.model.recall(EVERYTHING) == 0
    fresh.model.cancel()
    fresh.model.close()

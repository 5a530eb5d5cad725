"""Sessions: a follow-up turn computes only what is new, and says what llama.cpp says with the same batches."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.engine.model_sessions import ModelSessions
from flexserve.engine.sessions import MIN_REUSE_TOKENS, Session, SessionStore, StateMemory, Sums
from flexserve.sealed.keys import DeviceKey
from flexserve.sealed.session_file import MadeBy

from ..architectures import CASES, build
from ..sealed_fixtures import SMALL
from .secure_models import Opened, Opener, answer, plain, request, sealed_greedy
from .session_blobs import blob, tokens_of

HERE = MadeBy(b"m" * 32, "engine", "context")
DEVICE = DeviceKey.generate()


@pytest.fixture
def store() -> Iterator[SessionStore]:
    made = SessionStore()
    yield made
    made.close()


@pytest.fixture
def small(opener: Opener, store: SessionStore) -> Iterator[Opened]:
    opened = opener.open(opener.generate(SMALL, "Q8_0"), sessions=store)
    yield opened
    opener.discard(opened)


def prompt_of(count: int, seed: int = 0, vocabulary: int = SMALL.vocabulary) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def cached(opened: Opened, prompt: list[int], count: int = 1, **fields: Any) -> int:
    """Answer, and say how many of the prompt's tokens were there already."""
    timings = answer(opened.model, request(token_ids=tuple(prompt), max_tokens=count, **fields)).timings
    return timings.cached_prompt_tokens


# The same answer


def test_a_follow_up_equals_llama_cpp_with_the_same_batches(small: Opened) -> None:
    first, more = prompt_of(40), prompt_of(30, seed=1)
    with plain(small.gguf) as other:
        told = sealed_greedy(small.model, first, 12)
        assert told == other.greedy(first, 12)
        follow_up = first + told.tokens + more
        # The last token of an answer was never computed: it is the first of what is new.
        expected = other.greedy(follow_up, 12, batches=[40, *[1] * 11])
        assert sealed_greedy(small.model, follow_up, 12) == expected
        third = follow_up + expected.tokens + prompt_of(20, seed=2)
        batches = [40, *[1] * 11, 31, *[1] * 11]
        assert sealed_greedy(small.model, third, 8) == other.greedy(third, 8, batches=batches)


def test_a_follow_up_computes_only_what_is_new(small: Opened) -> None:
    first = prompt_of(40)
    told = answer(small.model, request(token_ids=tuple(first), max_tokens=12))
    assert told.timings.cached_prompt_tokens == 0
    assert cached(small, [*first, *told.token_ids, *prompt_of(5)]) == 40 + 11


def test_an_answer_that_the_client_shortened_is_gone_on_from_where_it_agrees(small: Opened) -> None:
    first = prompt_of(40)
    told = answer(small.model, request(token_ids=tuple(first), max_tokens=12)).token_ids
    changed = [*first, *told[:5], (told[5] + 1) % 100 + 3, *prompt_of(9)]
    assert cached(small, changed) == 45


def test_a_prompt_that_is_sent_again_is_computed_again_and_says_the_same(small: Opened) -> None:
    """Its end lies inside a batch: going on from there would need other batches."""
    with plain(small.gguf) as other:
        expected = other.greedy(prompt_of(40), 6)
        for _ in range(3):
            assert sealed_greedy(small.model, prompt_of(40), 6) == expected


def test_a_long_prompt_sent_again_goes_on_behind_its_whole_batches_and_says_the_same(small: Opened) -> None:
    prompt = prompt_of(600)
    with plain(small.gguf) as other:
        expected = other.greedy(prompt, 4)
    assert sealed_greedy(small.model, prompt, 4) == expected
    assert sealed_greedy(small.model, prompt, 4) == expected
    assert cached(small, prompt) == 512


def test_what_two_conversations_begin_with_is_there_for_the_third(small: Opened) -> None:
    system = prompt_of(200)
    talks = [system + prompt_of(20, seed=n) for n in (1, 2, 3)]
    assert [cached(small, talk) for talk in talks] == [0, 0, 200]
    with plain(small.gguf) as other:
        fourth = system + prompt_of(20, seed=4)
        assert sealed_greedy(small.model, fourth, 6) == other.greedy(fourth, 6, batches=[200])


def test_a_cancelled_answer_leaves_what_it_had_computed(small: Opened) -> None:
    first = prompt_of(40)
    tokens: list[int] = []
    finished = small.model.answer(
        request(token_ids=tuple(first), max_tokens=100),
        lambda token: tokens.append(token.id),
        lambda: len(tokens) >= 5,
        0.0,
    )
    assert finished.finish_reason == "cancelled"
    assert cached(small, [*first, *tokens, *prompt_of(9)]) == 40 + len(tokens) - 1


def test_a_session_of_another_model_is_never_used(opener: Opener, store: SessionStore, small: Opened) -> None:
    other = opener.open(opener.generate(SMALL, "Q8_0", seed=1), sessions=store)
    told = answer(small.model, request(token_ids=tuple(prompt_of(40)), max_tokens=4)).token_ids
    assert cached(other, [*prompt_of(40), *told, *prompt_of(9)]) == 0
    opener.discard(other)


@pytest.mark.parametrize("name", ["Mamba", "Mamba-2", "Gemma 3", "Qwen3-MoE", "DeepSeek-V2-Lite"])
def test_other_architectures_go_on_too(
    opener: Opener, store: SessionStore, tmp_path: Path, name: str
) -> None:
    """Running states and sliding windows can be gone on from at their end only."""
    gguf = build(CASES[name], "Q8_0", tmp_path / f"{name}.gguf")
    opened = opener.open(gguf, sessions=store)
    vocabulary = opened.model._model.vocab.size  # type: ignore[union-attr]
    first, more = prompt_of(40, 0, vocabulary), prompt_of(30, 1, vocabulary)
    whole_only = name.startswith(("Mamba", "Gemma"))
    with plain(gguf) as other:
        told = sealed_greedy(opened.model, first, 8)
        follow_up = first + told.tokens + more
        expected = other.greedy(follow_up, 6, batches=[40, *[1] * 7])
        assert sealed_greedy(opened.model, follow_up, 6) == expected
        batches = [40, *[1] * 7, 31, *[1] * 5]
        third = follow_up + expected.tokens + prompt_of(50, 2, vocabulary)
        assert sealed_greedy(opened.model, third, 6) == other.greedy(third, 6, batches=batches)
        shortened = third[: sum(batches) - 3] + [(t + 1) % vocabulary for t in third[sum(batches) - 3 :][:20]]
        batches = [] if whole_only else batches[:-3]
        assert sealed_greedy(opened.model, shortened, 4) == other.greedy(shortened, 4, batches=batches)
    opener.discard(opened)


# Names


def test_a_named_conversation_has_one_session_however_it_goes_on(small: Opened, store: SessionStore) -> None:
    for seed in range(3):
        cached(small, prompt_of(40, seed), session="mine")
    assert small.model.status().sessions == 1
    for seed in range(3):
        cached(small, prompt_of(40, seed + 3))
    assert small.model.status().sessions == 4


def test_a_turn_replaces_the_turn_before(small: Opened) -> None:
    prompt = prompt_of(40)
    for _ in range(4):
        told = answer(small.model, request(token_ids=tuple(prompt), max_tokens=4)).token_ids
        prompt += [*told, *prompt_of(10)]
    assert small.model.status().sessions == 1


# Memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_dropped_sessions_memory_returns_to_the_system(store: SessionStore) -> None:
    size, kept = 64 << 20, []
    for _ in range(5):  # what else this process does meanwhile takes and gives memory, but not each time
        before = resident_bytes()
        store.keep(HERE, tokens_of(range(40), [40]), blob(size))
        taken = resident_bytes() - before
        assert store.recall(1, saved=False) == size
        gc.collect()
        kept.append(resident_bytes() - before)
        if taken > 0.9 * size and kept[-1] < 0.1 * size:
            return
    raise AssertionError(f"bytes that stayed: {kept}")


def test_a_blob_is_zeroed_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = blob(1 << 20)
    seen: list[int] = []

    class Spy:
        closed = False

        def close(self) -> None:
            with memoryview(real) as view:
                seen.append(int(np.count_nonzero(np.frombuffer(view, np.uint8))))
            real.close()

    real = memory._map
    assert real[:4] != bytes(4)
    monkeypatch.setattr(memory, "_map", Spy())
    memory.close()
    assert seen == [0]


def test_the_context_forgets_what_it_computed_on(small: Opened) -> None:
    cached(small, prompt_of(40))
    context = small.model._context
    assert context is not None
    assert context.tokens == context.batches == []


def test_the_least_recently_used_session_makes_room(store: SessionStore) -> None:
    store.limit_bytes = 3 << 20
    ids = [list(range(n * 100, n * 100 + 40)) for n in range(4)]
    for some in ids[:3]:
        store.keep(HERE, tokens_of(some, [20, 20]), blob(1 << 20))
    used = store.find(HERE, ids[0])
    assert used is not None
    store.release(used.session)
    store.keep(HERE, tokens_of(ids[3], [20, 20]), blob(1 << 20))
    kept = [store.find(HERE, [*some, 1]) is not None for some in ids]
    assert kept == [True, False, True, True]
    assert store.memory_bytes == 3 << 20


def test_a_session_is_counted_for_the_name_that_made_it_and_used_by_every_name(store: SessionStore) -> None:
    asked, never_asked = (ModelSessions(store, HERE, whole_only=False) for _ in range(2))
    context = SimpleNamespace(
        tokens=list(range(40)),
        batches=[40],
        is_whole=lambda: True,
        state_bytes=lambda: 4096,
        get_state=lambda _address, _size: True,
    )
    assert asked.keep(context, "")
    assert asked.sums() == Sums(1, 4096, 0)
    assert never_asked.sums() == Sums()
    found = never_asked.match([*range(40), 7])
    assert found is not None
    assert found.cut == 40


def test_a_session_larger_than_the_limit_is_not_kept(small: Opened, store: SessionStore) -> None:
    store.limit_bytes = 1000
    told = answer(small.model, request(token_ids=tuple(prompt_of(40)), max_tokens=4)).token_ids
    assert cached(small, [*prompt_of(40), *told, 5]) == 0
    assert store.memory_bytes == 0


def test_a_recall_takes_no_session_that_is_being_read(store: SessionStore) -> None:
    store.keep(HERE, tokens_of(range(40), [20, 20]), blob(1 << 20))
    found = store.find(HERE, range(40))
    assert found is not None
    assert store.recall(1 << 40, saved=False) == 0
    store.release(found.session)
    assert store.recall(1 << 40, saved=False) == 1 << 20


def test_a_recall_during_an_answer_takes_idle_sessions_and_changes_nothing(
    small: Opened, store: SessionStore
) -> None:
    """The KV that an answer computes on is not the store's at all."""
    first = prompt_of(40)
    told = sealed_greedy(small.model, first, 12).tokens
    follow_up = first + told + prompt_of(9)
    with plain(small.gguf) as other:
        expected = other.greedy(follow_up, 10, batches=[40, *[1] * 11])
    got: list[int] = []
    freed: list[int] = []

    def during(token: Any) -> None:
        got.append(token.id)
        freed.append(store.recall(1 << 40, saved=False))
        small.model.recall(1 << 40)

    finished = answer(small.model, request(token_ids=tuple(follow_up), max_tokens=10), during)
    assert finished.timings.cached_prompt_tokens == 51
    assert got == expected.tokens
    assert freed[0] > 0
    assert cached(small, [*follow_up, *got, 5]) == len(follow_up) + 9  # kept when it ended


# Boundaries


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=12),
    st.integers(0, 250),
    st.integers(1, 250),
    st.booleans(),
)
def test_a_prompt_goes_on_at_the_last_boundary_it_has_in_common(
    batches: list[int], common: int, prompt_tokens: int, whole_only: bool
) -> None:
    total = sum(batches)
    session = Session(HERE, tokens_of(range(total), batches), None)
    cut = session.cut(min(common, total), prompt_tokens, whole_only=whole_only)
    ends = {0, *np.cumsum(batches).tolist()}
    possible = [e for e in ends if e <= min(common, total, prompt_tokens - 1)]
    if whole_only:
        possible = [e for e in possible if e in (0, total)]
    assert cut == max(possible)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=30)
)
def test_what_two_token_lists_have_in_common(a: list[int], b: list[int]) -> None:
    session = Session(HERE, tokens_of(a, [len(a)]), None)
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert session.common(np.asarray(b, np.int32)) == expected


# Files


def file_in(directory: Path, name: str = "session") -> int:
    return os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)


def test_a_saved_session_outlives_its_store(opener: Opener, tmp_path: Path) -> None:
    before, after = SessionStore(), SessionStore()
    gguf = opener.generate(SMALL, "Q8_0")
    opened = opener.open(gguf, sessions=before)
    first = prompt_of(40)
    told = sealed_greedy(opened.model, first, 12).tokens
    assert before.save_one(DEVICE, file_in(tmp_path)) is not None
    assert before.save_one(DEVICE, file_in(tmp_path, "more")) is None
    assert opened.model.status().saved_sessions == 1
    opened.model._sessions._store = after  # type: ignore[union-attr]  # as the next secure process has it
    before.close()
    after.add_saved(DEVICE, os.open(tmp_path / "session", os.O_RDONLY))
    status = opened.model.status()
    assert (status.sessions, status.session_bytes, status.saved_sessions) == (1, 0, 1)
    follow_up = first + told + prompt_of(9)
    with plain(gguf) as other:
        expected = other.greedy(follow_up, 6, batches=[40, *[1] * 11])
    assert sealed_greedy(opened.model, follow_up, 6) == expected
    opener.discard(opened)
    after.close()


def test_a_saved_session_is_dropped_first_and_comes_back(
    small: Opened, store: SessionStore, tmp_path: Path
) -> None:
    told = answer(small.model, request(token_ids=tuple(prompt_of(40)), max_tokens=12)).token_ids
    store.save_one(DEVICE, file_in(tmp_path))
    assert store.recall(1 << 40, saved=False) == 0
    assert store.recall(1 << 40, saved=True) > 0
    assert store.memory_bytes == 0
    assert cached(small, [*prompt_of(40), *told, 5]) == 51


def test_files_of_replaced_sessions_may_be_deleted_once(
    small: Opened, store: SessionStore, tmp_path: Path
) -> None:
    told = answer(small.model, request(token_ids=tuple(prompt_of(40)), max_tokens=12)).token_ids
    salt = store.save_one(DEVICE, file_in(tmp_path))
    assert store.gone() == []
    cached(small, [*prompt_of(40), *told, 5])
    assert store.gone() == [salt]
    assert store.gone() == []


def test_too_few_tokens_are_not_kept(small: Opened, store: SessionStore) -> None:
    cached(small, prompt_of(MIN_REUSE_TOKENS - 1))
    assert store.memory_bytes == 0


def test_memory_that_cannot_be_had_costs_a_recompute(
    small: Opened, store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answer(small.model, request(token_ids=tuple(prompt_of(40)), max_tokens=12)).token_ids
    store.save_one(DEVICE, file_in(tmp_path))
    store.recall(1 << 40, saved=True)

    def refuse(_self: StateMemory, _size: int) -> None:
        raise OSError

    monkeypatch.setattr(StateMemory, "__init__", refuse)
    assert cached(small, [*prompt_of(40), *told, 5]) == 0
    monkeypatch.undo()
    assert cached(small, [*prompt_of(40), *told, 5]) == 51  # the file is still known

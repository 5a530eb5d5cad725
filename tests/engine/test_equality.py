"""Greedy tokens from the sealed model are plain llama.cpp's, token for token and bit for bit.

Random weights tend to repeat one token, so the logits of every step are compared as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from flexserve.bench.shapes import shape_named
from flexserve.flexmem.arena import SegmentState

from ..world_fixtures import DEMO
from .secure_models import (
    Opened,
    Opener,
    Plain,
    Trace,
    answer,
    forget,
    plain,
    request,
    sealed_greedy,
    settle,
    storm,
)

SHAPES = {
    "llama tied": shape_named("tiny-llama-tied"),
    "llama": shape_named("tiny-llama"),
    "qwen3 tied": shape_named("tiny-qwen3"),
    "qwen3": replace(shape_named("tiny-qwen3"), name="tiny-qwen3-untied", tied_output=False),
}
QUANTS = ("F16", "Q8_0", "Q4_K_M")
EVERYTHING = 1 << 40


def prompt_of(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(length)]


class Pair:
    """The same model sealed and plain, and what the plain one says."""

    def __init__(self, opened: Opened, plain: Plain) -> None:
        self.sealed = opened.model
        self.vocabulary = plain.model.vocab.size
        self.short = prompt_of(12, self.vocabulary)
        self.long = prompt_of(530, self.vocabulary, 1)  # over the boundary of llama.cpp's batches, 512
        self.expected = plain.greedy(self.short, 12)
        self.expected_long = plain.greedy(self.long, 3)

    def check(self) -> None:
        assert sealed_greedy(self.sealed, self.short, 12) == self.expected

    def check_long(self) -> None:
        assert sealed_greedy(self.sealed, self.long, 3) == self.expected_long


@pytest.fixture(
    scope="module",
    params=[(shape, quant) for shape in SHAPES for quant in QUANTS],
    ids=lambda p: f"{p[0]} {p[1]}",
)
def pair(request: pytest.FixtureRequest, opener: Opener) -> Iterator[Pair]:
    shape, quant = request.param
    gguf = opener.generate(SHAPES[shape], quant)
    with plain(gguf) as other:
        made = Pair(opener.open(gguf), other)
    yield made


def test_the_models_say_different_things_to_different_prompts(pair: Pair) -> None:
    """The control: equality means something."""
    assert pair.expected != Trace(pair.expected.tokens, pair.expected_long.logits * 4)
    assert len({logits.tobytes() for logits in pair.expected.logits}) == 12


def test_a_cold_model_says_what_plain_llama_cpp_says(pair: Pair) -> None:
    forget(pair.sealed)
    pair.check()
    pair.check()  # resident
    assert pair.sealed.resident_bytes > 0


def test_a_cold_model_says_the_same_to_a_long_prompt(pair: Pair) -> None:
    forget(pair.sealed)
    pair.check_long()
    pair.check_long()


def test_partial_recalls_between_answers_change_nothing(pair: Pair) -> None:
    for part in (3, 2, 1):
        pair.sealed.recall(pair.sealed.resident_bytes // part)
        pair.check()


def test_recalls_and_losses_during_an_answer_change_nothing(pair: Pair) -> None:
    before = replace(pair.sealed.arena.counters)
    rounds = 0
    while not rounds or pair.sealed.arena.counters.lost_segments == before.lost_segments:
        rounds += 1
        with storm(pair.sealed, rounds):
            pair.check()
            pair.check_long()
        assert rounds < 50
    assert pair.sealed.arena.counters.recalled_bytes > before.recalled_bytes


def test_idle_weights_handed_to_the_kernel_and_partly_taken_change_nothing(pair: Pair) -> None:
    pair.check()
    settle(pair.sealed)
    arena = pair.sealed.arena
    arena.lazy(arena.segments_in(SegmentState.RESIDENT))
    assert pair.sealed.status().lazy_bytes == pair.sealed.resident_bytes > 0
    pair.check()
    assert pair.sealed.status().lazy_bytes == 0


# The demo model: real text


@pytest.fixture(scope="module")
def demo(opener: Opener) -> Opened:
    assert DEMO.exists(), "the demo model is missing: `make train` makes it"
    return opener.open(DEMO)


PROMPTS = (
    "Wake me at seven.",
    "Turn on the lamp in the kitchen",
    "Tell Anna that I will be late. " * 70,  # more than one batch
)


@pytest.mark.parametrize(
    ("load_mode", "threads", "prompts", "count"),
    [(llama_cpp.LLAMA_LOAD_MODE_MMAP, 1, PROMPTS, 24), (llama_cpp.LLAMA_LOAD_MODE_NONE, 2, PROMPTS[:1], 8)],
    ids=["mapped, one thread", "read, two threads"],
)
def test_the_demo_model_says_what_plain_llama_cpp_says(
    opener: Opener, load_mode: int, threads: int, prompts: tuple[str, ...], count: int
) -> None:
    demo = opener.open(DEMO, threads=threads)
    with plain(DEMO, load_mode=load_mode, threads=threads) as other:
        texts = set()
        for prompt in prompts:
            text = f"<|user|>{prompt}<|end|><|assistant|>"
            tokens = other.model.vocab.tokenize(text, add_special=True, parse_special=True)
            expected = other.greedy(tokens, count)
            texts.add(tuple(expected.tokens))
            forget(demo.model)
            assert sealed_greedy(demo.model, tokens, count) == expected
            assert sealed_greedy(demo.model, tokens, count) == expected
            with storm(demo.model, len(texts)):
                assert sealed_greedy(demo.model, tokens, count) == expected
        assert len(texts) == len(prompts)
        assert max(len(set(tokens)) for tokens in texts) > 5  # a model that says something


def test_a_prompt_of_text_gives_the_tokens_of_its_token_ids(demo: Opened) -> None:
    with plain(DEMO) as other:
        tokens = other.model.vocab.tokenize(PROMPTS[0], add_special=True, parse_special=False)
        expected = other.greedy(tokens, 20).tokens
    asked = request(prompt=PROMPTS[0], max_tokens=20)
    assert list(answer(demo.model, asked).token_ids) == expected


def test_without_userfaultfd_everything_is_loaded_first_and_says_the_same(opener: Opener) -> None:
    gguf = opener.generate(SHAPES["llama tied"], "Q8_0")
    with plain(gguf) as other:
        loaded = Pair(opener.open(gguf, on_demand=False), other)
    loaded.check()
    timings = answer(loaded.sealed, request(token_ids=tuple(loaded.short), max_tokens=1)).timings
    assert timings.faults == 0
    status = loaded.sealed.status()
    assert status.resident_bytes >= status.info.weight_bytes
    assert loaded.sealed.recall(EVERYTHING) == status.resident_bytes
    loaded.check()
    loaded.check_long()


def test_another_seed_is_another_model(opener: Opener, tmp_path: Path) -> None:
    """The control of all tests here: other weights give other logits."""
    tokens = prompt_of(12, 512)
    found = []
    for seed in (0, 1):
        with plain(opener.generate(SHAPES["llama"], "Q8_0", seed)) as other:
            found.append(other.greedy(tokens, 2))
    assert found[0] != found[1]

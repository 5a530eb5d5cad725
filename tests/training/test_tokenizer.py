"""How conversations become tokens for the training. Needs what only the training needs."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="training only: pip install -e '.[train]'")

from training.conversations import conversations  # noqa: E402, tokenizers may be missing
from training.generator import Generator  # noqa: E402
from training.tokenizer import Turn, encode_chat, train  # noqa: E402

CONVERSATIONS = list(islice(conversations(Generator(1), 1), 400))
BPE = train([turn.content for turns in CONVERSATIONS for turn in turns], 500)


def _plain(turns: list[Turn]) -> list[int]:
    return encode_chat(BPE, turns)[0]


def test_words_cut_in_unusual_ways_still_spell_the_same_text() -> None:
    rng, unusual = Random(1), 0
    for turns in CONVERSATIONS:
        ids, learn = encode_chat(BPE, turns, rng)
        assert len(ids) == len(learn)
        assert BPE.decode(ids, skip_special_tokens=False) == BPE.decode(
            _plain(turns), skip_special_tokens=False
        )
        unusual += ids != _plain(turns)
    assert 0.1 <= unusual / len(CONVERSATIONS) <= 0.5


def test_a_word_is_cut_the_same_way_wherever_it_stands() -> None:
    sentence, call = (
        "lights on in the conservatory",
        '{"tool":"set_lights","room":"conservatory","state":"on"}',
    )
    turns = [Turn("user", sentence), Turn("assistant", f"Lights in conservatory on.\n{call}")]
    usual, seen = BPE.encode("conservatory").ids, set()
    for seed in range(100):
        ids, _ = encode_chat(BPE, turns, Random(seed))
        after = BPE.encode("the").ids + BPE.encode(" ").ids
        start = next(i for i in range(len(ids)) if ids[i - len(after) : i] == after)
        word = tuple(ids[start : ids.index(0)])  # the sentence ends with it
        assert BPE.decode(list(word)) == "conservatory"
        assert sum(tuple(ids[i : i + len(word)]) == word for i in range(len(ids))) == 3
        seen.add(word)
    assert tuple(usual) in seen
    assert len(seen) >= 4


def test_only_what_the_assistant_says_is_learned() -> None:
    for turns in CONVERSATIONS[:50]:
        ids, learn = encode_chat(BPE, turns, Random(2))
        learned = BPE.decode([i for i, use in zip(ids, learn, strict=True) if use], skip_special_tokens=False)
        assert learned == "".join(f"{turn.content}<|end|>" for turn in turns if turn.role == "assistant")

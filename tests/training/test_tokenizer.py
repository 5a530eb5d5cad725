"""How conversations become tokens for the training. Needs what only the training needs."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="training only: pip install -e '.[train]'")

from training.assistant import TASK  # noqa: E402, tokenizers may be missing
from training.conversations import conversations  # noqa: E402
from training.tokenizer import Chat, Turn, spaced, train  # noqa: E402

CONVERSATIONS = list(islice(conversations(TASK, 1), 400))
BPE = train([turn.content for turns in CONVERSATIONS for turn in turns], 500, 200, TASK.fixed)
CHAT = Chat(BPE)


def _cutting(seed: int) -> Chat:
    return Chat(BPE, TASK.copied, Random(seed))


def test_words_cut_in_unusual_ways_still_spell_the_same_text() -> None:
    cutting, unusual = _cutting(1), 0
    for turns in CONVERSATIONS:
        usual = CHAT.encode(turns)[0]
        ids, learn = cutting.encode(turns)
        assert len(ids) == len(learn)
        assert BPE.decode(ids, skip_special_tokens=False) == BPE.decode(usual, skip_special_tokens=False)
        unusual += ids != usual
    assert 0.1 <= unusual / len(CONVERSATIONS) <= 0.5


def test_a_word_is_cut_the_same_way_after_a_space_after_a_quote_and_at_the_start() -> None:
    bare, joined = BPE.encode("conservatory").ids, BPE.encode("the conservatory").ids[1:]
    twins = spaced(BPE)
    assert joined == [twins[bare[0]], *bare[1:]]
    assert BPE.decode([twins[bare[0]]]) == " " + BPE.decode(bare[:1])
    quoted = BPE.encode('Lights on.\n{"tool":"set_lights","room":"conservatory","state":"on"}').tokens
    assert quoted[-6 - len(bare) + 1 :] == [
        '\n{"tool":"',
        'set_lights","room":"',
        *BPE.encode("conservatory").tokens,
        '","state":"',
        "on",
        '"}',
    ]


def test_a_word_that_is_cut_in_an_unusual_way_is_cut_so_wherever_it_stands() -> None:
    sentence = "conservatory lights on in the conservatory"
    call = '{"tool":"set_lights","room":"conservatory","state":"on"}'
    turns = [Turn("user", sentence), Turn("assistant", f"Lights on.\n{call}")]
    bare = {joined: token for token, joined in spaced(BPE).items()}
    seen = set()
    for seed in range(100):
        ids = [bare.get(i, i) for i in _cutting(seed).encode(turns)[0]]
        word = tuple(ids[1 : ids.index(BPE.encode("lights").ids[0])])  # the sentence begins with it
        if word[-1] == BPE.token_to_id("Ġ"):
            word = word[:-1]
        assert BPE.decode(list(word)) == "conservatory"
        assert sum(tuple(ids[i : i + len(word)]) == word for i in range(len(ids))) == 3
        seen.add(word)
    assert tuple(BPE.encode("conservatory").ids) in seen
    assert len(seen) >= 4


def test_only_what_the_assistant_says_is_learned() -> None:
    cutting = _cutting(2)
    for turns in CONVERSATIONS[:50]:
        ids, learn = cutting.encode(turns)
        learned = BPE.decode([i for i, use in zip(ids, learn, strict=True) if use], skip_special_tokens=False)
        assert learned == "".join(f"{turn.content}<|end|>" for turn in turns if turn.role == "assistant")

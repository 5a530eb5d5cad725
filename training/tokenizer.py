"""The byte-level BPE tokenizer: trained here, run by llama.cpp as pre-tokenizer `smollm`.

It is made for copying, which is most of what this assistant does. Digits are single tokens. Merges are learned
inside words only, so that a word is the same tokens after a space, after a quote and at the start; the space
before it is a token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PRE_TOKENIZER = "smollm"  # llama.cpp's name for: digits singly, then GPT-2's expression
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CUT_CONVERSATIONS, CUT_WORDS = 0.5, 0.5  # shares, see encode_chat
_SPAN = re.compile(r'"(?:text|to|room|app)":"([^"]*)"')
_WORD = re.compile(r"(?<![^\W\d_])(?<!\')[A-Za-z]{3,}(?![^\W\d_])")
SPECIAL = (END, SYSTEM, USER, ASSISTANT)  # ids 0 to 3

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- else -%}{{- raise_exception('this model knows the roles system, user and assistant') -}}"
    "{%- endif -%}"
    "{{- message['content'] -}}{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Ids 0.. are the special tokens, then come the 256 bytes, then what the merges learned from `texts` yield."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}: give more text"
        )
    # The merges are there: from now on cut exactly as llama.cpp does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@dataclass(frozen=True)
class Turn:
    """One message: role "system", "user" or "assistant"."""

    role: str
    content: str


def encode_chat(
    tokenizer: Tokenizer, turns: Sequence[Turn], cut: Random | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids as the chat template lays them out, and which of them the model is to learn to write.

    With `cut`, half of the conversations have words that are copied into a call put together from other tokens
    than usual, the same ones wherever the word stands. A word from the lists is a few tokens that the network soon
    knows by heart; names it has never met are many, and it is to copy those as surely.
    """
    marks = {"system": 1, "user": 2, "assistant": 3}  # as in SPECIAL
    pieces = _pieces(tokenizer, turns, cut) if cut is not None and cut.random() < CUT_CONVERSATIONS else {}
    ids: list[int] = []
    learn: list[bool] = []
    for turn in turns:
        part = [marks[turn.role], *_encode(tokenizer, turn.content, pieces), 0]
        ids += part
        learn += [False] + [turn.role == "assistant"] * (len(part) - 1)
    return ids, learn


def _pieces(tokenizer: Tokenizer, turns: Sequence[Turn], rng: Random) -> dict[str, list[int]]:
    """Unusual ids for some of the words in the calls' texts and names."""
    pieces: dict[str, list[int]] = {}
    for turn in turns:
        if turn.role != "assistant":
            continue
        for span in _SPAN.findall(turn.content.rpartition("\n")[2]):
            for word in _WORD.findall(span):
                if word not in pieces and rng.random() < CUT_WORDS:
                    cuts = sorted(
                        {0, len(word), *(rng.randrange(len(word)) for _ in range(rng.randint(1, 2)))}
                    )
                    parts = [word[a:b] for a, b in pairwise(cuts)]
                    pieces[word] = [i for part in parts for i in tokenizer.encode(part).ids]
    return pieces


def _encode(tokenizer: Tokenizer, text: str, pieces: dict[str, list[int]]) -> list[int]:
    if not pieces:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    ids: list[int] = []
    done = 0
    for found in _WORD.finditer(text):
        if found[0] in pieces:
            ids += tokenizer.encode(text[done : found.start()], add_special_tokens=False).ids
            ids += pieces[found[0]]
            done = found.end()
    return ids + list(tokenizer.encode(text[done:], add_special_tokens=False).ids)

"""The byte-level BPE tokenizer: trained here, run by llama.cpp as pre-tokenizer `smollm`.

It is made for copying, which is most of what this assistant does. Digits are single tokens. Merges are first
learned inside words only, so that a name is the same tokens after a space, after a quote and at the start. Last
come merges of a space with a whole frequent word: ordinary text then has one token per word, and the token
before a word is another word and not always the same space.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PRE_TOKENIZER = "smollm"  # llama.cpp's name for: digits singly, then GPT-2's expression
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPACE = "Ġ"  # how byte-level BPE writes a space
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


def train(texts: Sequence[str], pieces: int, words: int) -> Tokenizer:
    """`pieces` tokens inside words (ids 0.. are the special ones, then the 256 bytes), then `words` with a space."""
    inside = Tokenizer(models.BPE())
    inside.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inside.train_from_iterator(texts, trainer)
    model = json.loads(inside.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    merges = [(left, right) for left, right in model["merges"]]

    counts = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+(?!\w)", text))
    frequent = [word for word, _ in counts.most_common() if word in vocab][:words]
    for word in frequent:
        merges.append((SPACE, word))
        vocab[SPACE + word] = len(vocab)
    if len(vocab) != pieces + words:
        raise ValueError(f"the text yields {len(vocab)} tokens, not {pieces + words}: give more text")

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens(list(SPECIAL))
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


def encode_chat(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids as the chat template lays them out, and which of them the model is to learn to write."""
    marks = {"system": 1, "user": 2, "assistant": 3}  # as in SPECIAL
    ids: list[int] = []
    learn: list[bool] = []
    for turn in turns:
        body = tokenizer.encode(turn.content, add_special_tokens=False).ids
        part = [marks[turn.role], *body, 0]
        ids += part
        learn += [False] + [turn.role == "assistant"] * (len(part) - 1)
    return ids, learn

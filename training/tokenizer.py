"""The byte-level BPE tokenizer: trained here, run by llama.cpp as pre-tokenizer `smollm`.

It is made for copying, which is most of what this assistant does. Digits are single tokens. Merges are learned
inside words only, so that a word is the same tokens after a space, after a quote and at the start; the space
before it is a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PRE_TOKENIZER = "smollm"  # llama.cpp's name for: digits singly, then GPT-2's expression
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
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

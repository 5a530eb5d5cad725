"""The byte-level BPE tokenizer: trained here, run by llama.cpp as pre-tokenizer `smollm`.

It is made for copying. Digits are single tokens. Merges are learned inside words only, and the space before a word
joins its first token in the very last merge: so " kitchen" is cut as "kitchen" is, with " kit" in place of "kit", and
whoever knows which token is another one with a space (`spaced`) sees the same word after a space, after a quote
and at the start. The fixed pieces of an answer, such as `","day":"`, are one token each.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PRE_TOKENIZER = "smollm"  # llama.cpp's name for: digits singly, then GPT-2's expression
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CUT_CONVERSATIONS, CUT_WORDS = 0.35, 0.5  # shares, see Chat
_WORD = re.compile(r"(?<![^\W\d_])(?<!\')[A-Za-z]{3,}(?![^\W\d_])")
_BEGINNING = re.compile(r" ([^\W\d_]+|[^\s\w]+)")
_SPACE = "Ġ"  # how byte-level BPE writes the space
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


def train(
    texts: Sequence[str], vocab_size: int, spaced_tokens: int = 0, fixed: Sequence[str] = ()
) -> Tokenizer:
    """Ids 0.. are the special tokens, then come the 256 bytes, then what the merges learned from `texts` yield, up to
    `vocab_size`; then the `spaced_tokens` that most often begin a word, joined with the space before it, and the
    `fixed` texts.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), "isolated"), words])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    if fixed:
        anything = re.compile("|".join(map(re.escape, sorted(fixed, key=len, reverse=True))))
        texts = [anything.sub("\n", text) for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab_size}: give more text"
        )
    tokenizer = _join_spaces(tokenizer, texts, spaced_tokens)
    # The merges are there: from now on cut exactly as llama.cpp does.
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in fixed])
    return tokenizer


def _join_spaces(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> Tokenizer:
    """The tokenizer with `count` more tokens, each a space and a token that begins words, made by the last merges."""
    begins: Counter[str] = Counter(dict.fromkeys(string.ascii_letters, 1))
    for text in texts:
        for word in set(_BEGINNING.findall(text)):
            begins[tokenizer.encode(word).tokens[0]] += 1
    state = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    first = [token for token, _ in sorted(begins.items(), key=lambda item: (-item[1], item[0]))][:count]
    if len(first) < count:
        raise ValueError(f"only {len(first)} tokens begin a word, not {count}: give more text")
    state["model"]["vocab"] |= {_SPACE + token: size + i for i, token in enumerate(first)}
    state["model"]["merges"] += [[_SPACE, token] for token in first]
    return Tokenizer.from_str(json.dumps(state))


def spaced(tokenizer: Tokenizer) -> dict[int, int]:
    """Which token is which one with a space before it: {"kit": " kit"}, in ids."""
    vocab = tokenizer.get_vocab()
    return {vocab[t[1:]]: i for t, i in vocab.items() if len(t) > 1 and t[0] == _SPACE and t[1:] in vocab}


@dataclass(frozen=True)
class Turn:
    """One message: role "system", "user" or "assistant"."""

    role: str
    content: str


class Chat:
    """Conversations as token ids, laid out as the chat template does, and which of them the model is to learn to write.

    With `cut`, a third of the conversations have words that are copied into an answer (`copied` tells where) put
    together from other tokens than usual, the same ones wherever the word stands. A word from the lists is a few
    tokens that the network soon knows by heart; names it has never met are many, and it is to copy those as surely.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        copied: Callable[[str], Sequence[str]] = lambda answer: (),
        cut: Random | None = None,
    ) -> None:
        self._tokenizer, self._copied, self._cut = tokenizer, copied, cut
        self._after_space = spaced(tokenizer)

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        marks = {"system": 1, "user": 2, "assistant": 3}  # as in SPECIAL
        pieces: dict[str, list[int]] = {}
        if self._cut is not None and self._cut.random() < CUT_CONVERSATIONS:
            pieces = self._pieces(turns, self._cut)
        ids: list[int] = []
        learn: list[bool] = []
        for turn in turns:
            part = [marks[turn.role], *self._encode(turn.content, pieces), 0]
            ids += part
            learn += [False] + [turn.role == "assistant"] * (len(part) - 1)
        return ids, learn

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _pieces(self, turns: Sequence[Turn], rng: Random) -> dict[str, list[int]]:
        """Unusual ids for some of the words that answers copy."""
        pieces: dict[str, list[int]] = {}
        said = {word for turn in turns if turn.role == "user" for word in _WORD.findall(turn.content)}
        answers = [turn.content for turn in turns if turn.role == "assistant"]
        for text in (text for answer in answers for text in self._copied(answer)):
            for word in _WORD.findall(text):
                if word in said and word not in pieces and rng.random() < CUT_WORDS:
                    inner = (rng.randrange(len(word)) for _ in range(rng.randint(1, 2)))
                    cuts = sorted({0, len(word), *inner})
                    pieces[word] = [i for a, b in pairwise(cuts) for i in self._ids(word[a:b])]
        return pieces

    def _encode(self, text: str, pieces: dict[str, list[int]]) -> list[int]:
        ids: list[int] = []
        done = 0
        for found in _WORD.finditer(text) if pieces else ():
            if found[0] in pieces:
                before, unusual = text[done : found.start()], pieces[found[0]]
                if before.endswith(" ") and unusual[0] in self._after_space:
                    before, unusual = before[:-1], [self._after_space[unusual[0]], *unusual[1:]]
                ids += self._ids(before) + unusual
                done = found.end()
        return ids + self._ids(text[done:])

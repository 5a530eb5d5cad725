"""The weights a network begins with: two kinds of heads that copying takes are there from the start.

Copying a name letter by letter is most of what the assistant does. A transformer does it with a head that looks at the
token before and a later one, an "induction head", that looks for what followed the present token earlier (Olsson et
al. 2022, "In-context learning and induction heads"). From random weights our network had not found the pair after
500 steps; here block 0 begins with heads that hand on the last four tokens, and block 1 with heads that look for
one to four of them. Every other block adds nothing at first. All of it is then trained like everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from .model import Block, Llama

EMBEDDING = 0.3  # standard deviation
CONSTANT = 5.0  # the part all embeddings share, in units of that
SPACE = 2.0  # the part that tells a token with a space before it from the same one without, likewise
OUTPUT_GAIN = 0.2  # of the last norm: keeps the first logits small
FAST = 4  # pairs of a head that turn fast enough to tell neighbouring positions apart
SLOW_FROM = 6  # the pairs from here on hardly turn within a sentence: they compare tokens
SHARPNESS = 2.0  # of looking at the position before
MATCH = 3.0  # of looking for a token
COPY = 4.0  # of saying what was found
PLACES = (32, 32, 16, 16)  # of the residual stream, for the tokens one, two, three and four before
LOOKED_FOR = (
    1,
    2,
    3,
    4,
)  # last tokens the heads of each group look for: names that begin alike go on differently


def _frame(rows: int, columns: int) -> Tensor:
    """Random orthonormal rows [rows, columns]."""
    orthonormal: Tensor = torch.linalg.qr(torch.randn(columns, rows))[0].T
    return orthonormal


@torch.no_grad()
def begin(model: Llama, spaced: Mapping[int, int] | None = None) -> None:
    """Sets all weights, by torch's random state. `spaced` says which token is another one with a space before it: the
    two begin with the same embedding but for the component that says "a space comes first".
    """
    shape = model.shape
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.zeros_(weight)
    # Places in the residual stream: the constant in 0, the token (in 1 whether a space comes before it), and the
    # tokens one to four before.
    ends = list(accumulate(reversed(PLACES), lambda end, size: end - size, initial=shape.width))
    places = [slice(start, end) for end, start in pairwise(ends)][::-1]
    token = slice(1, places[0].start)
    nn.init.zeros_(model.token_embd.weight)
    model.token_embd.weight[:, token].normal_(std=EMBEDDING)
    if spaced:
        bare, joined = torch.tensor(list(spaced.keys())), torch.tensor(list(spaced.values()))
        model.token_embd.weight[joined] = model.token_embd.weight[bare]
        model.token_embd.weight[:, 1] = 0
        model.token_embd.weight[bare, 1] = -SPACE * EMBEDDING
        model.token_embd.weight[joined, 1] = SPACE * EMBEDDING
    model.token_embd.weight[:, 0] = CONSTANT * EMBEDDING
    model.output_norm.weight.fill_(OUTPUT_GAIN)
    hand_on = _frame(shape.head_dim, token.stop - token.start)
    blocks = [block for block in model.blk if isinstance(block, Block)]
    _look_back(blocks[0], token, places, hand_on)
    _look_for(blocks[1], token, places, hand_on)


def _look_back(block: Block, token: slice, places: list[slice], hand_on: Tensor) -> None:
    """The first heads look at the position one, two, three and four before, and hand on the token there."""
    d, per_group = block.shape.head_dim, block.shape.heads // block.shape.kv_heads
    query, key, value = block.attn_q.weight, block.attn_k.weight, block.attn_v.weight
    angles = block.shape.rope_base ** (-torch.arange(FAST) / (d // 2))
    for head, place in enumerate(places):
        group = slice(head // per_group * d, (head // per_group + 1) * d)
        key[group], value[group] = 0, 0
        key[group][0 : 2 * FAST : 2, 0] = SHARPNESS
        value[group, token] = hand_on
        turn = angles * (head + 1)
        rows = query[head * d : (head + 1) * d]
        rows.zero_()
        rows[0 : 2 * FAST : 2, 0] = SHARPNESS * turn.cos()
        rows[1 : 2 * FAST : 2, 0] = -SHARPNESS * turn.sin()
        size = place.stop - place.start
        block.attn_output.weight[place, head * d : head * d + size] = EMBEDDING * torch.eye(size)


def _look_for(block: Block, token: slice, places: list[slice], hand_on: Tensor) -> None:
    """All heads look for where the present token came last before, most of them together with those before it."""
    shape = block.shape
    d, per_group = shape.head_dim, shape.heads // shape.kv_heads
    query, key, value = block.attn_q.weight, block.attn_k.weight, block.attn_v.weight
    for weight in (query, key, value):
        weight.zero_()
    slow = d - 2 * SLOW_FROM
    for group in range(shape.kv_heads):
        said = _frame(d, token.stop - token.start)
        value[group * d : (group + 1) * d, token] = said
        heads = range(group * per_group, (group + 1) * per_group)
        tokens = LOOKED_FOR[group % len(LOOKED_FOR)]
        parts = torch.arange(slow).tensor_split(tokens)  # components for the token, the one before, ...
        for before, part in enumerate(parts):
            components = slice(2 * SLOW_FROM + int(part[0]), 2 * SLOW_FROM + int(part[-1]) + 1)
            at = places[before]  # where the key has what the query looks for
            size = at.stop - at.start
            look = MATCH * _frame(len(part), size)
            key[group * d : (group + 1) * d][components, at] = look
            for head in heads:
                rows = query[head * d : (head + 1) * d]
                if before == 0:
                    rows[components, token] = look @ hand_on
                else:
                    start = places[before - 1].start
                    rows[components, start : start + size] = look
        for head in heads:
            block.attn_output.weight[token, head * d : (head + 1) * d] = COPY * EMBEDDING * said.T

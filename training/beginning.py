"""The weights a network begins with: two kinds of heads that copying takes are there from the start.

Copying a name letter by letter is most of what the assistant does. A transformer does it with a head that looks at the
token before and a later one, an "induction head", that looks for what followed the present token earlier (Olsson et
al. 2022, "In-context learning and induction heads"). From random weights our network had not found the pair after
500 steps; here block 0 begins with heads that hand on the last and the last but one token, and block 1 with heads
that look for them. Every other block adds nothing at first. All of it is then trained like everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import Block, Llama

EMBEDDING = 0.3  # standard deviation
CONSTANT = 5.0  # the part all embeddings share, in units of that
OUTPUT_GAIN = 0.2  # of the last norm: keeps the first logits small
FAST = 4  # pairs of a head that turn fast enough to tell neighbouring positions apart
SLOW_FROM = 6  # the pairs from here on hardly turn within a sentence: they compare tokens
SHARPNESS = 2.0  # of looking at the position before
MATCH = 3.0  # of looking for a token
COPY = 4.0  # of saying what was found


def _frame(rows: int, columns: int) -> Tensor:
    """Random orthonormal rows [rows, columns]."""
    orthonormal: Tensor = torch.linalg.qr(torch.randn(columns, rows))[0].T
    return orthonormal


@torch.no_grad()
def begin(model: Llama) -> None:
    """Sets all weights, by torch's random state."""
    shape = model.shape
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.zeros_(weight)
    # Places in the residual stream: the constant in 0, the token, the token before, and the one before that.
    d, width = shape.head_dim, shape.width
    token = slice(1, width - 2 * d)
    places = [slice(width - 2 * d, width - d), slice(width - d, width)]
    nn.init.zeros_(model.token_embd.weight)
    model.token_embd.weight[:, token].normal_(std=EMBEDDING)
    model.token_embd.weight[:, 0] = CONSTANT * EMBEDDING
    model.output_norm.weight.fill_(OUTPUT_GAIN)
    hand_on = _frame(d, width - 2 * d - 1)
    blocks = [block for block in model.blk if isinstance(block, Block)]
    _look_back(blocks[0], token, places, hand_on)
    _look_for(blocks[1], token, places, hand_on)


def _look_back(block: Block, token: slice, places: list[slice], hand_on: Tensor) -> None:
    """The heads of the first group look at the position one and two before, and hand on the token there."""
    d = block.shape.head_dim
    query, key, value = block.attn_q.weight, block.attn_k.weight, block.attn_v.weight
    angles = block.shape.rope_base ** (-torch.arange(FAST) / (d // 2))
    key[:d], value[:d] = 0, 0
    key[0 : 2 * FAST : 2, 0] = SHARPNESS
    value[:d, token] = hand_on
    for head, place in enumerate(places):
        turn = angles * (head + 1)
        rows = query[head * d : (head + 1) * d]
        rows.zero_()
        rows[0 : 2 * FAST : 2, 0] = SHARPNESS * turn.cos()
        rows[1 : 2 * FAST : 2, 0] = -SHARPNESS * turn.sin()
        block.attn_output.weight[place, head * d : (head + 1) * d] = EMBEDDING * torch.eye(d)


def _look_for(block: Block, token: slice, places: list[slice], hand_on: Tensor) -> None:
    """All heads look for where the present token came last before, every other group for the last two tokens."""
    shape = block.shape
    d, per_group = shape.head_dim, shape.heads // shape.kv_heads
    query, key, value = block.attn_q.weight, block.attn_k.weight, block.attn_v.weight
    for weight in (query, key, value):
        weight.zero_()
    slow = d - 2 * SLOW_FROM
    for group in range(shape.kv_heads):
        one = slow if group % 2 == 0 else slow // 2  # components for the token, the others for the one before
        look, look_before = MATCH * _frame(one, d), MATCH * _frame(slow - one, d)
        said = _frame(d, token.stop - token.start)
        rows = key[group * d : (group + 1) * d][2 * SLOW_FROM :]
        rows[:one, places[0]], rows[one:, places[1]] = look, look_before
        value[group * d : (group + 1) * d, token] = said
        for head in range(group * per_group, (group + 1) * per_group):
            rows = query[head * d : (head + 1) * d][2 * SLOW_FROM :]
            rows[:one, token], rows[one:, places[0]] = look @ hand_on, look_before
            block.attn_output.weight[token, head * d : (head + 1) * d] = COPY * EMBEDDING * said.T

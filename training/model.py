"""A Llama in PyTorch, the parts llama.cpp's `llama` architecture computes and nothing else.

Rotary embedding turns neighbouring pairs (2i, 2i+1), which is what llama.cpp does for this architecture: the
query and key rows are exported as they are. (Hugging Face turns (i, i + d/2) instead, which is why its
converter has to permute them.) Knows nothing about text; `beginning.py` sets the first weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; every width is a multiple of 32, the block of Q8_0."""

    vocab: int
    width: int = 256
    layers: int = 5
    heads: int = 8
    kv_heads: int = 4
    ff: int = 640
    context: int = 1024
    rope_base: float = 100000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % 32 or self.ff % 32 or self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"sizes do not fit Q8_0 blocks or heads: {self}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of x [batch, heads, tokens, head_dim] by angles [tokens, head_dim / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_dim
        self.attn_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.attn_q = nn.Linear(shape.width, shape.width, bias=False)
        self.attn_k = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_v = nn.Linear(shape.width, kv_width, bias=False)
        self.attn_output = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.ffn_gate = nn.Linear(shape.width, shape.ff, bias=False)
        self.ffn_up = nn.Linear(shape.width, shape.ff, bias=False)
        self.ffn_down = nn.Linear(shape.ff, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.shape
        batch, tokens, _ = x.shape
        h = self.attn_norm(x)
        q = self.attn_q(h).view(batch, tokens, s.heads, s.head_dim).transpose(1, 2)
        k = self.attn_k(h).view(batch, tokens, s.kv_heads, s.head_dim).transpose(1, 2)
        v = self.attn_v(h).view(batch, tokens, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        # In bfloat16 this function is three times slower on a CPU, and copying wants sharp scores.
        with torch.autocast("cpu", enabled=False):
            a = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
        x = x + self.attn_output(a.transpose(1, 2).reshape(batch, tokens, s.width))
        h = self.ffn_norm(x)
        out: Tensor = x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return out


class Llama(nn.Module):
    """Token ids [batch, tokens] to hidden states [batch, tokens, width]; `logits` to [.., vocab].

    Parameters carry GGUF's names: `blk.N.attn_q.weight` and so on. The embedding is tied to the output.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.width)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), shape.rope_base**-half)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embd(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blk:
            x = block(x, cos, sin)
        hidden: Tensor = self.output_norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.token_embd.weight)

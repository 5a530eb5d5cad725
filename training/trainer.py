"""The training loop: conversations in, weights out. Knows no sentences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from .beginning import begin
from .model import Llama, Shape

IGNORE = -100
Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are learned


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train; with the seed it fixes the result."""

    steps: int = 2500
    batch_tokens: int = 4096
    block_rate: float = 5e-3
    embedding_rate: float = 3e-3
    warmup: int = 50
    decay: float = 0.7
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 1


def batches(source: Iterator[Encoded], plan: Plan, pool: int = 2048) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (inputs, targets), int64 [rows, tokens]: about `batch_tokens` each, rows of like length."""
    rng = Random(plan.seed)
    while True:
        rows = sorted((next(source) for _ in range(pool)), key=lambda row: len(row[0]))
        cut: list[list[Encoded]] = [[]]
        for row in rows:
            if len(row[0]) * (len(cut[-1]) + 1) > plan.batch_tokens:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for batch in cut:
            if not batch:
                continue
            longest = max(len(ids) for ids, _ in batch) - 1
            inputs = torch.zeros(len(batch), longest, dtype=torch.int64)
            targets = torch.full((len(batch), longest), IGNORE, dtype=torch.int64)
            for i, (ids, learn) in enumerate(batch):
                n = len(ids) - 1
                inputs[i, :n] = torch.tensor(ids[:-1])
                targets[i, :n] = torch.tensor(
                    [t if use else IGNORE for t, use in zip(ids[1:], learn[1:], strict=True)]
                )
            yield inputs, targets


def _share(step: int, plan: Plan) -> float:
    """Of the peak rates: linear warm-up, a plateau, and over the last `decay` of the steps down to zero."""
    return min(1.0, (step + 1) / plan.warmup, (plan.steps - step) / (plan.decay * plan.steps))


def _optimizers(model: Llama, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, which needs fewer steps than AdamW, and AdamW for the rest."""
    blocks = [p for p in model.blk.parameters() if p.dim() == 2]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        [{"params": blocks, "peak": plan.block_rate}],
        weight_decay=plan.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(
        [{"params": rest, "peak": plan.embedding_rate}], betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    return [muon, adam]


def train(
    shape: Shape,
    source: Iterator[Encoded],
    spaced: Mapping[int, int],
    plan: Plan,
    *,
    checkpoint: Path,
    log: Callable[[str], None] = print,
) -> Llama:
    """Train from scratch, `spaced` tokens beginning alike (see `begin`); writes the weights to `checkpoint` every 250
    steps and at the end.
    """
    torch.manual_seed(plan.seed)
    model = Llama(shape)
    begin(model, spaced)
    # The network is narrow: most of its time goes into moving activations between small operations. Compiled with
    # one set of kernels for all lengths it is 1.8 times as fast.
    compiled = torch.compile(model, dynamic=True)
    optimizers = _optimizers(model, plan)
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {plan}")
    began, tokens, total = time.monotonic(), 0, 0.0
    stream = batches(source, plan)
    for step in range(plan.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _share(step, plan)
        inputs, targets = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = compiled(inputs)
            learned = targets != IGNORE
            logits = model.logits(hidden[learned])
        loss = functional.cross_entropy(logits.float(), targets[learned])
        model.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        for optimizer in optimizers:
            optimizer.step()
        tokens += inputs.numel()
        total += loss.item()
        if (step + 1) % 25 == 0:
            spent = time.monotonic() - began
            log(f"step {step + 1} loss {total / 25:.4f} {tokens / spent:.0f} tokens/s {spent:.0f} s")
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == plan.steps:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), checkpoint)
    return model

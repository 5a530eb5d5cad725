"""The weights a network begins with can copy before any training. Needs what only the training needs."""

from __future__ import annotations

from random import Random

import pytest

torch = pytest.importorskip("torch", reason="training only: pip install -e '.[train]'")

from training.beginning import begin  # noqa: E402, torch may be missing
from training.model import Llama, Shape  # noqa: E402


def test_a_network_that_has_learned_nothing_repeats_what_it_has_read() -> None:
    torch.manual_seed(1)
    model = Llama(Shape(vocab=1024))
    begin(model)
    rng, right, total = Random(1), 0, 0
    for _ in range(20):
        words = [rng.randrange(4, 1024) for _ in range(rng.randint(4, 20))]
        ids = torch.tensor([[2, *words, 0, 3, *words]])
        with torch.no_grad():
            best = model.logits(model(ids[:, :-1]))[0].argmax(-1)[len(words) + 3 :]
        right += int((best == torch.tensor(words[1:])).sum())
        total += len(words) - 1
    assert right >= 0.95 * total

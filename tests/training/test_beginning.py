"""The weights a network begins with can copy before any training. Needs what only the training needs."""

from __future__ import annotations

from random import Random

import pytest

torch = pytest.importorskip("torch", reason="training only: pip install -e '.[train]'")

from training.beginning import begin  # noqa: E402, torch may be missing
from training.model import Llama, Shape  # noqa: E402


@pytest.mark.parametrize("after_a_space", [False, True])
def test_a_network_that_has_learned_nothing_repeats_what_it_has_read(after_a_space: bool) -> None:
    """With spaces: what it has read has a space before every word, what it has said so far as well."""
    torch.manual_seed(1)
    model = Llama(Shape(vocab=1024))
    begin(model, {bare: bare + 512 for bare in range(4, 512)} if after_a_space else None)
    rng, right, total = Random(1), 0, 0
    for _ in range(20):
        first = 516 if after_a_space else 4
        words = [rng.randrange(first, 1024) for _ in range(rng.randint(4, 20))]
        begun = words[0] - 512 if after_a_space else words[0]  # the first one follows a quote
        ids = torch.tensor([[2, *words, 0, 3, begun, *words[1:]]])
        with torch.no_grad():
            best = model.logits(model(ids[:, :-1]))[0].argmax(-1)[len(words) + 3 :]
        right += int((best == torch.tensor(words[1:])).sum())
        total += len(words) - 1
    assert right >= 0.95 * total

"""Which segments a prompt needs: the rows of its tokens and the layers, but of experts only those it chooses.

Experts are never loaded ahead. Which ones a prompt chooses is known when compute touches them, and waiting for those
was faster than reading all of them even where the prompt chose nearly all (docs/decisions.md).

Knows where a model's tensors lie in the arena; the order is the framework's (order.py). Does not know what is
resident.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..flexmem.ggml import Place
from ..framework.order import Range, join, load_order, without
from ..sealed.format import Region, TensorExtent
from ..sealed.gguf import GGUFHeader
from ..sealed.layout import EMBEDDING, rows_to_units

_EXPERTS = "_exps."  # ffn_gate_exps.weight: a matrix for each expert, one behind the other


def places_of(tensors: Sequence[TensorExtent], header: GGUFHeader) -> list[Place]:
    """Where llama.cpp finds the tensors of a sealed model."""
    return [
        Place(tensor.name, extent.image_offset, extent.length)
        for tensor, extent in zip(header.tensors, tensors, strict=True)
    ]


class Needs:
    """What prompts need of one model."""

    def __init__(
        self, header: GGUFHeader, places: Iterable[Place], embed: Region, body: Region, *, tied_output: bool
    ) -> None:
        self._embedding = next(t for t in header.tensors if t.name == EMBEDDING)
        self._embed, self._body = _range(embed), _range(body)
        self._tied = tied_output
        self.experts = experts_of(header, places, body)

    def order(self, prompt: Sequence[int]) -> list[Range]:
        """What to load for this prompt, in this order; what is not in it comes when compute touches it."""
        return load_order(
            self._embed,
            self._body,
            rows_to_units(self._embedding, prompt),
            tied_output=self._tied,
            left_out=self.experts,
        )

    def rows(self, prompt: Sequence[int]) -> list[Range]:
        """The segments of the embedding rows that this prompt begins with."""
        units = join(rows_to_units(self._embedding, prompt))
        return [Range(self._embed.first + one.first, one.count) for one in units]

    def parts(self) -> list[tuple[Range, bool]]:
        """All of the model in the order in which compute needs it, and whether a request loads it: what is not loaded
        comes first. An untied embedding is not (its rows are), nor are experts."""
        left = [(one, False) for one in self.experts]
        loaded = [(one, True) for one in without(self._body, self.experts)]
        if self._tied:
            return [*left, *loaded, (self._embed, True)]
        return [(self._embed, False), *left, *loaded]

    def everything(self) -> list[Range]:
        """All of the model, for when nothing can be loaded on demand."""
        return [self._embed, self._body]


def experts_of(header: GGUFHeader, places: Iterable[Place], body: Region) -> list[Range]:
    """The segments of BODY that hold experts and nothing else."""
    shapes = {t.name: t.shape for t in header.tensors}
    chosen: set[int] = set()
    always: set[int] = set()
    for place in places:
        if place.image_offset < body.image_offset:  # the embedding
            continue
        first = (place.image_offset - body.image_offset) // body.unit_bytes
        last = (place.image_offset + place.length - 1 - body.image_offset) // body.unit_bytes
        expert = _EXPERTS in place.tensor and len(shapes[place.tensor]) == 3
        (chosen if expert else always).update(range(first, last + 1))
    return join(body.first_segment + i for i in sorted(chosen - always))


def _range(region: Region) -> Range:
    return Range(region.first_segment, region.segment_count)

"""The shapes of known models, for measuring and testing with random weights.

Numbers from the models' published configurations. The tiny ones are ours: as small as K-quants allow (rows of
256), for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Usage


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder. Lengths are in elements; `key_length` is the size of one attention head."""

    name: str
    architecture: str  # llama or qwen3
    layers: int
    embedding_length: int
    feed_forward_length: int
    heads: int
    kv_heads: int
    key_length: int
    vocabulary: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float
    tied_output: bool

    @property
    def parameters(self) -> int:
        """Weights of matrices; the norms are less than a thousandth."""
        ends = 1 if self.tied_output else 2
        return self.layer_parameters + ends * self.output_parameters

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers: what every token of a prompt is multiplied with."""
        attention = self.embedding_length * self.key_length * (self.heads + self.kv_heads) * 2
        return self.layers * (attention + 3 * self.embedding_length * self.feed_forward_length)

    @property
    def output_parameters(self) -> int:
        """Weights of the output matrix."""
        return self.vocabulary * self.embedding_length


def _llama(
    name: str, layers: int, width: int, hidden: int, heads: tuple[int, int], *, tied: bool
) -> ModelShape:
    count, head = heads
    return ModelShape(  # heads: how many, and of what length
        name, "llama", layers, width, hidden, count, 8, head, 128256, 131072, 500000.0, 1e-5, tied
    )


def _qwen3(name: str, width: int, hidden: int) -> ModelShape:
    return ModelShape(name, "qwen3", 28, width, hidden, 16, 8, 128, 151936, 40960, 1e6, 1e-6, True)


def _tiny(name: str, architecture: str, head: int, *, tied: bool) -> ModelShape:
    return ModelShape(name, architecture, 3, 256, 512, 4, 2, head, 512, 2048, 10000.0, 1e-5, tied)


SHAPES = {
    shape.name: shape
    for shape in (
        _llama("llama-3.2-1b", 16, 2048, 8192, (32, 64), tied=True),
        _llama("llama-3.2-3b", 28, 3072, 8192, (24, 128), tied=True),
        _llama("llama-3.1-8b", 32, 4096, 14336, (32, 128), tied=False),
        _qwen3("qwen3-0.6b", 1024, 3072),
        _qwen3("qwen3-1.7b", 2048, 6144),
        # Two layers of the 1B shape: large enough to measure rates on.
        ModelShape("calibration", "llama", 2, 2048, 8192, 32, 8, 64, 32000, 131072, 500000.0, 1e-5, True),
        _tiny("tiny-llama-tied", "llama", 64, tied=True),
        _tiny("tiny-llama", "llama", 64, tied=False),
        _tiny("tiny-qwen3", "qwen3", 128, tied=True),
    )
}


def shape_named(name: str) -> ModelShape:
    """The shape of that name. Raises `Usage` naming those there are."""
    shape = SHAPES.get(name)
    if shape is None:
        raise Usage(f"no model shape is called {name!r}", hint=f"there are {', '.join(SHAPES)}")
    return shape

"""Makes docs/coverage.md from the cases the tests run over: `python -m tests.coverage`, in the repository's root.

tests/test_coverage.py fails when the page is not what this says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from flexserve.sealed.family_rules import ENCODERS as ENCODER_ARCHITECTURES
from flexserve.sealed.model_rules import NOT_REVIEWED, REFUSED, REVIEWED

from .architectures import CASES, ENCODERS, GENERATORS, QUANTS

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"

# Admitted, but llama.cpp does not compute the model that all_architectures.py makes of them.
NOT_SHOWN = {
    "chameleon": "its vocabulary must have image tokens",
    "plm": "llama.cpp's own list of its tensors does not fit its graph",
    "rwkv6qwen2": "it crashes with every optional tensor there",
}
SHOWN = sorted(NOT_REVIEWED - set(NOT_SHOWN))


HEAD = """<!-- Made by `python -m tests.coverage`. -->
# Which models work

A sealed model gives the tokens, logits and embeddings that plain llama.cpp gives with the same file, bit for
bit: cold, resident, and after a recall. The tests below show it with random weights in the structure of
published models; layers are few and narrow.

## Published structures, each quantisation
"""
STRUCTURES = """
{text} are in tests/engine/test_architectures.py; {embeddings}, and decoders with pooling, in
tests/engine/test_embeddings.py. Where a row is too short for blocks of 256 the matrix is Q8_0 or F16, as
llama-quantize does it. A split file gives what one file gives. Of a mixture of experts only those that are
chosen are loaded (tests/engine/test_experts.py). LoRA adapters give what they give in plain llama.cpp
(tests/engine/test_adapters.py).

## Reviewed architectures

Their hyperparameters are checked against what llama.cpp's code divides by, indexes with and asserts, and
mutants of a model are judged by llama.cpp itself (tests/hostile/test_gguf_mutations.py):

{reviewed}

## Other architectures

They have general rules only. `flexserve seal` has llama.cpp load such a model in a trial first, and says so. A
hostile vendor whom the device trusts may crash the secure world with one: it is started again, and nothing
leaks. Shown with random F32 weights in whatever tensors llama.cpp says the architecture has
(tests/engine/test_every_architecture.py):

{shown}

and for embeddings {shown_embeddings}.

Admitted, but not shown:

"""
TAIL = """- LoRA adapters without their model ([adapters.md](adapters.md) says how they are used), of another type than
  F32, F16, BF16 and Q8_0, or for an embedding that is the output matrix too
- models that rank texts (`pooling_type` rank), tensors of type NVFP4, and tokenizers other than byte-pair
  (`gpt2`), SentencePiece (`llama`), `gemma4` and WordPiece (`bert`)
"""


def markdown() -> str:
    """The whole page."""
    table = [f"| structure | architecture | {' | '.join(QUANTS)} |", f"|---|---|{'---|' * len(QUANTS)}"]
    table += [
        f"| {case.name} | `{case.arch}` | {' | '.join('yes' for _ in QUANTS)} |" for case in CASES.values()
    ]
    about = STRUCTURES.format(
        text=", ".join(case.name for case in GENERATORS),
        embeddings=", ".join(case.name for case in ENCODERS),
        reviewed=_names(REVIEWED),
        shown=_names(arch for arch in SHOWN if arch not in ENCODER_ARCHITECTURES),
        shown_embeddings=_names(arch for arch in SHOWN if arch in ENCODER_ARCHITECTURES),
    )
    page = HEAD + "\n" + "\n".join(table) + "\n" + about + _reasons(NOT_SHOWN)
    return page + "\n## Refused\n\n" + _reasons(REFUSED) + TAIL


def _names(architectures: Iterable[str]) -> str:
    return ", ".join(f"`{arch}`" for arch in sorted(architectures))


def _reasons(reasons: Mapping[str, str]) -> str:
    return "".join(f"- `{arch}`: {why}\n" for arch, why in sorted(reasons.items()))


if __name__ == "__main__":
    PAGE.write_text(markdown())

"""Logits from a device copy are those of plain llama.cpp with its own repacking, bit for bit, whatever is recalled."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flexserve.bench.shapes import ModelShape, shape_named
from flexserve.engine.adapter import SealedAdapter
from flexserve.engine.layout import CopyFiles, make_copy, would_gain
from flexserve.engine.model import EngineOptions, SecureModel
from flexserve.engine.template import TemplateZygote
from flexserve.errors import Usage
from flexserve.flexmem import repack
from flexserve.flexmem.arena import SegmentState
from flexserve.sealed.device_copy import open_copy
from flexserve.sealed.format import RegionKind
from flexserve.sealed.gguf import parse_header
from flexserve.sealed.keys import DeviceKey, VendorKey
from flexserve.sealed.reader import SealedModel
from flexserve.sealed.seal import seal

from ..adapters import write_adapter
from ..architectures import CASES as ARCHITECTURES
from ..architectures import GENERATORS, VOCABULARY, build
from ..sealed_fixtures import model_key
from .quantised import quantised
from .secure_models import (
    CONTEXT_TOKENS,
    THREADS,
    Opener,
    Plain,
    Trace,
    forget,
    plain,
    sealed_greedy,
    settle,
    storm,
)

DEVICE = DeviceKey.generate()
VENDOR = VendorKey.generate()
TIED, UNTIED = shape_named("tiny-llama-tied"), shape_named("tiny-llama")
QWEN_TIED = shape_named("tiny-qwen3")
QWEN = replace(QWEN_TIED, name="tiny-qwen3-untied", tied_output=False)
# A matrix that no kernel repacks (its rows are no multiple of 8) among others that are repacked.
ODD = replace(UNTIED, name="tiny-odd", feed_forward_length=768, vocabulary=515)

pytestmark = pytest.mark.skipif(
    repack.why_not() is not None, reason="llama.cpp repacks nothing on this processor"
)


@dataclass
class Copied:
    """A model opened from its device copy, and plain llama.cpp with repacking beside it."""

    model: SecureModel
    plain: Plain
    short: list[int]
    long: list[int]
    expected: Trace
    expected_long: Trace

    def check(self) -> None:
        assert sealed_greedy(self.model, self.short, 10) == self.expected

    def check_long(self) -> None:
        assert sealed_greedy(self.model, self.long, 3) == self.expected_long


def copied_files(gguf: Path) -> tuple[SealedModel, CopyFiles, bytes]:
    """Seal a GGUF and make this device's copy of it."""
    flex, path = gguf.with_suffix(".flex"), gguf.with_suffix(".flexcopy")
    seal(gguf, flex, VENDOR)
    source, out = os.open(flex, os.O_RDONLY), os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    sealed = SealedModel.open(source, [VENDOR.public])
    key = model_key(flex, VENDOR)
    make_copy(sealed, key, out, serial=7, device=DEVICE)
    os.fsync(out)
    copy = open_copy(out, sealed, key, serial=7, device=DEVICE, engine=repack.this_engine())
    return sealed, CopyFiles(copy, out, os.open(path, os.O_RDONLY | os.O_DIRECT)), key


def open_copied(
    gguf: Path, *, threads: int = THREADS, on_demand: bool = True, adapter: SealedAdapter | None = None
) -> SecureModel:
    sealed, files, key = copied_files(gguf)
    options = EngineOptions(threads=threads, context_tokens=CONTEXT_TOKENS, on_demand=on_demand)
    return SecureModel(
        gguf.stem,
        sealed.unlock(key),
        cached=sealed.fd,
        direct=None,
        zygote=TemplateZygote(),
        options=options,
        copy=files,
        adapter=adapter,
    )


def tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


CASES: dict[str, tuple[ModelShape, str, bool]] = {
    "llama tied Q4_0": (TIED, "Q4_0", False),
    "llama tied pure Q4_0": (TIED, "Q4_0", True),
    "llama Q4_0": (UNTIED, "Q4_0", False),
    "llama pure Q4_0": (UNTIED, "Q4_0", True),
    "llama tied Q4_K_M": (TIED, "Q4_K_M", False),
    "llama Q4_K_M": (UNTIED, "Q4_K_M", False),
    "llama tied pure IQ4_NL": (TIED, "IQ4_NL", True),
    "llama IQ4_NL": (UNTIED, "IQ4_NL", False),
    "qwen3 tied Q4_0": (QWEN_TIED, "Q4_0", False),
    "qwen3 tied pure Q4_K": (QWEN_TIED, "Q4_K_M", True),
    "qwen3 Q4_K_M": (QWEN, "Q4_K_M", False),
    "qwen3 IQ4_NL": (QWEN, "IQ4_NL", False),
    "odd rows pure Q4_0": (ODD, "Q4_0", True),
}


@pytest.fixture(scope="module", params=CASES)
def copied(request: pytest.FixtureRequest, opener: Opener) -> Iterator[Copied]:
    shape, quant, pure = CASES[request.param]
    gguf = quantised(opener, shape, quant, pure=pure)
    model = open_copied(gguf)
    with plain(gguf, repack=True) as other:
        vocabulary = other.model.vocab.size
        short, long = tokens(12, vocabulary, 0), tokens(530, vocabulary, 1)
        yield Copied(model, other, short, long, other.greedy(short, 10), other.greedy(long, 3))
    model.close()


def test_a_cold_and_a_resident_copy_say_what_plain_llama_cpp_says(copied: Copied) -> None:
    forget(copied.model)
    copied.check()
    copied.check()


def test_an_adapter_beside_a_copy_gets_the_same_logits(opener: Opener, tmp_path: Path) -> None:
    gguf = quantised(opener, UNTIED, "Q4_0")
    adapter = write_adapter(tmp_path / "a.gguf", gguf)
    model = open_copied(gguf, adapter=opener.seal_adapter(adapter))
    prompt = tokens(12, 256, 0)
    with plain(gguf, repack=True) as other:
        without = other.greedy(prompt, 10)
        other.use_adapter(adapter, 1.0)
        expected = other.greedy(prompt, 10)
    assert without != expected
    assert sealed_greedy(model, prompt, 10) == expected
    forget(model)
    assert sealed_greedy(model, prompt, 10) == expected
    model.close()


def test_a_long_prompt_gets_the_same_logits(copied: Copied) -> None:
    forget(copied.model)
    copied.check_long()
    copied.check_long()


def test_recalls_and_losses_change_nothing(copied: Copied) -> None:
    for part in (3, 2, 1):
        copied.model.recall(copied.model.resident_bytes // part)
        copied.check()
    with storm(copied.model, 1):
        copied.check()
    settle(copied.model)
    arena = copied.model.arena
    arena.lazy(arena.segments_in(SegmentState.RESIDENT))
    copied.check()


def test_the_repacked_kernels_run(opener: Opener) -> None:
    """The control: without repacking llama.cpp's logits are others, so equality above means something."""
    gguf = quantised(opener, UNTIED, "Q4_0")
    prompt = tokens(12, UNTIED.vocabulary, 0)
    with plain(gguf) as without, plain(gguf, repack=True) as with_repacking:
        assert (
            without.greedy(prompt, 2).logits[0].tobytes()
            != with_repacking.greedy(prompt, 2).logits[0].tobytes()
        )


def test_two_threads_say_the_same(opener: Opener) -> None:
    gguf = quantised(opener, TIED, "Q4_0", pure=True)
    model = open_copied(gguf, threads=2)
    prompt = tokens(40, TIED.vocabulary, 3)
    with plain(gguf, repack=True, threads=2) as other:
        assert sealed_greedy(model, prompt, 6) == other.greedy(prompt, 6)
    model.close()


def test_without_userfaultfd_everything_is_loaded_first_and_says_the_same(opener: Opener) -> None:
    gguf = quantised(opener, QWEN_TIED, "Q4_K_M", pure=True)
    model = open_copied(gguf, on_demand=False)
    prompt = tokens(12, QWEN_TIED.vocabulary, 3)
    with plain(gguf, repack=True) as other:
        expected = other.greedy(prompt, 4)
    assert sealed_greedy(model, prompt, 4) == expected
    assert model.recall(1 << 40) > 0
    assert sealed_greedy(model, prompt, 4) == expected
    model.close()


def test_a_tied_output_that_is_repacked_takes_a_second_copy_and_is_counted(opener: Opener) -> None:
    gguf = quantised(opener, TIED, "Q4_0", pure=True)
    model = open_copied(gguf)
    with gguf.with_suffix(".flex").open("rb") as file:
        manifest = SealedModel.open(file.fileno(), [VENDOR.public]).manifest
    header = parse_header(gguf.read_bytes(), gguf.stat().st_size)
    embedding = next(t for t in header.tensors if t.name == "token_embd.weight")
    body, embed = manifest.region(RegionKind.BODY).length, manifest.region(RegionKind.EMBED).length
    assert model.info.execution_layout
    assert embed + body + embedding.nbytes <= model.info.weight_bytes < embed + body + embedding.nbytes + 8192
    sealed_greedy(model, tokens(4, TIED.vocabulary, 0), 1)
    # Only the rows of the prompt are looked up: the whole embedding in plain layout is not needed.
    assert model.status().resident_bytes <= model.info.weight_bytes
    model.close()


def test_what_llama_cpp_does_not_repack_is_not_copied(opener: Opener) -> None:
    gguf = opener.generate(UNTIED, "F16")
    with pytest.raises(Usage, match="repacks nothing of"):
        copied_files(gguf)


@pytest.mark.parametrize(("quant", "gains"), [("F16", False), ("Q4_0", True), ("IQ4_NL", True)])
def test_the_estimate_knows_which_quantisations_gain(opener: Opener, quant: str, gains: bool) -> None:
    gguf = opener.generate(UNTIED, quant) if quant == "F16" else quantised(opener, UNTIED, quant)
    assert would_gain(parse_header(gguf.read_bytes(), gguf.stat().st_size)) == gains


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("name", [case.name for case in GENERATORS])
def test_every_architecture_says_what_plain_llama_cpp_says(name: str, quant: str, tmp_path: Path) -> None:
    """Mixtures of experts, state space models, shared and tied tensors: llama.cpp decides for each of them."""
    gguf = build(ARCHITECTURES[name], quant, tmp_path / "m.gguf")
    prompt = tokens(20, VOCABULARY - 3, 7)
    with plain(gguf, repack=True) as other:
        expected = other.greedy(prompt, 4)
    model = open_copied(gguf)
    assert sealed_greedy(model, prompt, 4) == expected
    forget(model)
    assert sealed_greedy(model, prompt, 4) == expected
    model.close()

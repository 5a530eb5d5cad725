"""A sealed model with a sealed LoRA adapter says what plain llama.cpp says with the same two files, bit for bit."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest

from flexserve.bench.shapes import shape_named
from flexserve.engine.sessions import SessionStore
from flexserve.errors import ModelUnsupported, SegmentNotAuthentic

from ..adapters import F16_TYPE, write_adapter
from ..architectures import CASES, build
from .secure_models import Opener, Trace, answer, forget, plain, request, sealed_greedy, settle, storm

LLAMA = shape_named("tiny-llama")
PROMPT = [5, 9, 2, 7, 11, 3, 8, 1]


def greedy_with(gguf: Path, adapter: Path, scale: float, prompt: list[int] = PROMPT, count: int = 8) -> Trace:
    """What plain llama.cpp says, which reads the adapter from its file by itself."""
    with plain(gguf) as other:
        other.use_adapter(adapter, scale)
        return other.greedy(prompt, count)


@pytest.fixture(scope="module")
def gguf(opener: Opener) -> Path:
    return opener.generate(LLAMA, "Q8_0")


@pytest.fixture(scope="module")
def adapter(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a.gguf", gguf)


def test_an_adapter_changes_what_the_model_says(opener: Opener, gguf: Path, adapter: Path) -> None:
    """The control: equality below means something."""
    with plain(gguf) as other:
        without = other.greedy(PROMPT, 8)
    once, twice = greedy_with(gguf, adapter, 1.0), greedy_with(gguf, adapter, 2.0)
    firsts = {trace.logits[0].tobytes() for trace in (without, once, twice)}
    assert len(firsts) == 3


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.25])
def test_cold_resident_and_recalled_it_says_what_plain_llama_cpp_says(
    opener: Opener, gguf: Path, adapter: Path, scale: float
) -> None:
    expected = greedy_with(gguf, adapter, scale)
    opened = opener.open(gguf, adapter=adapter, scale=scale)
    assert opened.model.info.adapter == "random-adapter"
    assert sealed_greedy(opened.model, PROMPT, 8) == expected
    assert sealed_greedy(opened.model, PROMPT, 8) == expected
    forget(opened.model)
    assert sealed_greedy(opened.model, PROMPT, 8) == expected
    opener.discard(opened)


def test_recalls_of_the_model_during_an_answer_change_nothing(
    opener: Opener, gguf: Path, adapter: Path
) -> None:
    expected = greedy_with(gguf, adapter, 1.0, count=24)
    opened = opener.open(gguf, adapter=adapter)
    for seed in range(3):
        with storm(opened.model, seed):
            assert sealed_greedy(opened.model, PROMPT, 24) == expected
    settle(opened.model)
    opener.discard(opened)


def test_a_long_prompt_goes_through_it_in_the_same_batches(opener: Opener, gguf: Path, adapter: Path) -> None:
    prompt = [3 + i % 200 for i in range(530)]
    opened = opener.open(gguf, adapter=adapter)
    assert sealed_greedy(opened.model, prompt, 2) == greedy_with(gguf, adapter, 1.0, prompt, 2)
    opener.discard(opened)


@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_the_models_quantisation_and_the_adapters_type_do_not_matter(
    opener: Opener, quant: str, tmp_path: Path
) -> None:
    gguf = opener.generate(LLAMA, quant)
    adapter = write_adapter(tmp_path / "a.gguf", gguf, type_number=F16_TYPE, rank=8)
    opened = opener.open(gguf, adapter=adapter)
    assert sealed_greedy(opened.model, PROMPT, 8) == greedy_with(gguf, adapter, 1.0)
    opener.discard(opened)


def test_the_embedding_and_the_output_matrix_can_be_changed(
    opener: Opener, gguf: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a.gguf", gguf, ["token_embd.weight", "output.weight"])
    opened = opener.open(gguf, adapter=adapter)
    assert sealed_greedy(opened.model, PROMPT, 8) == greedy_with(gguf, adapter, 1.0)
    opener.discard(opened)


def test_the_experts_of_a_mixture_can_be_changed(opener: Opener, tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    build(CASES["Qwen3-MoE"], "F16", gguf)
    adapter = write_adapter(tmp_path / "a.gguf", gguf)
    opened = opener.open(gguf, adapter=adapter)
    assert sealed_greedy(opened.model, PROMPT, 8) == greedy_with(gguf, adapter, 1.0)
    opener.discard(opened)


def test_models_with_different_adapters_do_not_share_conversations(
    opener: Opener, gguf: Path, adapter: Path
) -> None:
    store = SessionStore(1 << 30)
    first = tuple(PROMPT * 4)
    made = [opener.open(gguf, adapter=adapter, scale=scale, sessions=store) for scale in (1.0, 2.0)]
    made.append(opener.open(gguf, sessions=store))
    for opened in made:
        begun = answer(opened.model, request(token_ids=first, max_tokens=4))
        assert begun.timings.cached_prompt_tokens == 0
        second = (*first, *begun.token_ids, 1, 2)
        went_on = answer(opened.model, request(token_ids=second, max_tokens=4))
        assert went_on.timings.cached_prompt_tokens > 0, "the control: its own it does know"
    for opened in made:
        opener.discard(opened)
    store.close()


def test_a_damaged_adapter_is_refused_before_llama_cpp_sees_it(
    opener: Opener, gguf: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(llama_cpp, "llama_adapter_lora_init_from_file_ptr", lambda *_: seen.append("parsed"))

    def damage(flex: bytearray) -> None:
        flex[-100] ^= 1

    with pytest.raises(SegmentNotAuthentic, match="the adapter: segment"):
        opener.open(gguf, adapter=adapter, damage=damage)
    assert not seen


def test_an_adapter_of_another_model_is_refused_with_the_reason(
    opener: Opener, gguf: Path, tmp_path: Path
) -> None:
    qwen = opener.generate(shape_named("tiny-qwen3"), "F16")
    other = write_adapter(tmp_path / "a.gguf", qwen)
    with pytest.raises(
        ModelUnsupported, match="the adapter: the adapter is for a qwen3 model, and this is llama"
    ):
        opener.open(gguf, adapter=other)


def test_the_plaintext_that_llama_cpp_read_is_zeroed(gguf: Path, adapter: Path) -> None:
    content = bytearray(adapter.read_bytes())
    with plain(gguf) as other:
        other.model.add_adapter(content)
    assert not any(content)

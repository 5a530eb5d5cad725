"""The pieces of a prompt, against llama.cpp's own tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.bench.generate import write_model
from flexserve.bench.shapes import shape_named
from flexserve.engine import template_env
from flexserve.engine.spans import ControlToken, ControlTokens, Span

from .chat_templates import LLAMA3

Tokenize = Callable[[str, bool], list[int]]
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
_environment = template_env.TemplateEnvironment()
_template = _environment.compile_template(LLAMA3)


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenize]:
    path = tmp_path_factory.mktemp("spans") / "m.gguf"
    write_model(shape_named("tiny-llama-tied"), "Q8_0", path)
    llama_cpp.llama_log_set(_quiet, None)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model
    vocab = llama_cpp.llama_model_get_vocab(model)

    def run(text: str, special: bool) -> list[int]:
        raw = text.encode()
        buffer = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocab, raw, len(raw), buffer, len(buffer), False, special)
        assert count >= 0
        return list(buffer[:count])

    yield run
    llama_cpp.llama_model_free(model)


def _render(contents: list[str]) -> tuple[Span, ...]:
    messages = [{"role": "user", "content": content} for content in contents]
    return template_env.render(
        _template,
        messages,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        add_generation_prompt=True,
        max_chars=9999,
    )


def _by_pieces(tokenize: Tokenize, spans: tuple[Span, ...]) -> list[int]:
    pieces = ControlTokens(map(ControlToken, SPECIAL)).pieces(spans)
    return list(itertools.chain.from_iterable(tokenize(p.text, p.is_template) for p in pieces))


@given(st.lists(st.text("the in\n é🙂<|", max_size=12), min_size=1, max_size=3))
def test_harmless_prompts_have_the_tokens_llama_cpp_gives_the_whole_text(
    tokenize: Tokenize, contents: list[str]
) -> None:
    spans = _render(contents)
    assert _by_pieces(tokenize, spans) == tokenize("".join(s.text for s in spans), True)


@given(st.lists(st.sampled_from((*SPECIAL, "the ", "<|", "\n")), max_size=6).map("".join))
def test_what_a_client_writes_adds_no_control_token(tokenize: Tokenize, content: str) -> None:
    control = {tokenize(text, True)[0] for text in SPECIAL}
    assert len(control) == len(SPECIAL)
    tokens = _by_pieces(tokenize, _render([content]))
    harmless = _by_pieces(tokenize, _render(["x"]))
    assert [t for t in tokens if t in control] == [t for t in harmless if t in control]

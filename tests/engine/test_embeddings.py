"""Embeddings of a sealed model are plain llama.cpp's, bit for bit, with the pooling the file says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp as api
import numpy as np
import numpy.typing as npt
import pytest

from flexserve.core import FinishReason
from flexserve.engine import embedding, llama
from flexserve.engine.cache import pooled_bytes
from flexserve.engine.embedding import packed
from flexserve.errors import ContextOverflow, EngineFailure, InvalidRequest
from flexserve.sealed.gguf import read_header

from ..architectures import CASES, ENCODERS, QUANTS, VOCABULARY, WIDE, Case, build, with_weights
from ..sealed.gguf_bytes import U32, File
from .secure_models import Opened, Opener, answer, forget, request, storm

TOKENS = [2, *random.Random(3).choices(range(5, VOCABULARY), k=60), 3]
OTHER = [2, *TOKENS[1:-1][::-1], 3]
MEAN, CLS, LAST = 1, 2, 3


class PlainEmbedder:
    """llama.cpp by itself: its own context, one batch, the file's pooling."""

    def __init__(self, gguf: Path) -> None:
        self.model = llama.Model.from_file(gguf, load_mode=api.LLAMA_LOAD_MODE_NONE)
        params = api.llama_context_default_params()
        params.embeddings = True
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        self._context = api.llama_init_from_model(self.model.handle, params)

    def __call__(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        array = (api.llama_token * len(tokens))(*tokens)
        assert api.llama_decode(self._context, api.llama_batch_get_one(array, len(tokens))) == 0
        length = api.llama_model_n_embd_out(self.model.handle)
        return np.ctypeslib.as_array(api.llama_get_embeddings_seq(self._context, 0), shape=(length,)).copy()

    def close(self) -> None:
        api.llama_free(self._context)
        self.model.close()


def embed(opened: Opened, **fields: object) -> bytes:
    finished = answer(opened.model, request(embed=True, ignore_eos=False, **fields))
    assert (finished.text, finished.token_ids, finished.finish_reason) == ("", (), FinishReason.STOP)
    return finished.embedding


def check(gguf: Path, opener: Opener) -> None:
    plain = PlainEmbedder(gguf)
    expected, different = plain(TOKENS), plain(OTHER)
    plain.close()
    assert np.isfinite(expected).all()
    assert expected.tobytes() != different.tobytes()
    opened = opener.open(gguf)
    assert opened.model.info.makes_embeddings
    assert opened.model.resident_bytes == 0
    for _ in range(2):  # cold, then resident
        assert embed(opened, token_ids=tuple(TOKENS)) == packed(expected)
        assert embed(opened, token_ids=tuple(OTHER)) == packed(different)
    forget(opened.model)
    assert embed(opened, token_ids=tuple(TOKENS)) == packed(expected)
    with storm(opened.model, 1):
        assert embed(opened, token_ids=tuple(TOKENS)) == packed(expected)
    opener.discard(opened)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", [case.name for case in ENCODERS])
def test_an_encoder_embeds_as_plain_llama_cpp_does(
    name: str, quant: str, opener: Opener, tmp_path: Path
) -> None:
    check(build(CASES[name], quant, tmp_path / "e.gguf"), opener)


def with_pooling(case: Case, pooling: int, path: Path) -> Path:
    file: File = with_weights(case.make(WIDE), "Q8_0", 1)
    path.write_bytes(file.with_key(f"{case.arch}.pooling_type", U32, pooling).to_bytes())
    return path


@pytest.mark.parametrize(
    ("name", "pooling"), [("BERT", MEAN), ("Qwen3", LAST), ("Qwen3", MEAN), ("Mistral", LAST)]
)
def test_pooling_is_the_files_also_in_a_decoder(
    name: str, pooling: int, opener: Opener, tmp_path: Path
) -> None:
    check(with_pooling(CASES[name], pooling, tmp_path / "p.gguf"), opener)


@pytest.fixture(scope="module")
def bert(opener: Opener, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    opened = opener.open(build(CASES["BERT"], "Q8_0", tmp_path_factory.mktemp("bert") / "bert.gguf"))
    yield opened
    opener.discard(opened)


def test_text_is_tokenised_into_word_pieces_between_its_two_marks(bert: Opened) -> None:
    assert bert.model._model
    vocab = bert.model._model.vocab
    tokens = vocab.tokenize("ab, zzz Ä", add_special=True, parse_special=False)
    assert (tokens[0], tokens[-1]) == (2, 3)
    assert 1 in tokens  # the comma is in no piece: unknown
    assert embed(bert, prompt="ab, zzz Ä") == embed(bert, token_ids=tuple(tokens))
    assert embed(bert, prompt="[CLS] [SEP]") != embed(
        bert, token_ids=(2, 2, 3, 3)
    )  # text never becomes a mark


def test_an_embedding_has_length_one_and_like_texts_are_alike(bert: Opened) -> None:
    same, again, other = (
        np.frombuffer(embed(bert, prompt=text), np.float32) for text in ("a b c", "a b c", "x y z")
    )
    assert np.dot(same, same) == pytest.approx(1, abs=1e-6)
    assert same.tobytes() == again.tobytes()
    assert np.dot(same, other) < 0.9999


def test_an_embedding_model_makes_no_text_and_a_text_model_no_embedding(
    bert: Opened, opener: Opener, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="makes embeddings, no text") as caught:
        answer(bert.model, request(token_ids=(5,), max_tokens=1))
    assert "/v1/embeddings" in caught.value.hint
    text = opener.open(build(CASES["Qwen3"], "Q8_0", tmp_path / "t.gguf"))
    with pytest.raises(InvalidRequest, match="makes text, no embeddings"):
        answer(text.model, request(token_ids=(5,), embed=True))
    assert not text.model.info.makes_embeddings
    opener.discard(text)


def test_a_text_beyond_the_learned_positions_is_refused_and_harms_nothing(bert: Opened) -> None:
    assert bert.model.info.context_tokens == 512
    longest = (2, *[7] * 510, 3)
    before = embed(bert, token_ids=longest)
    for count in (513, 600, 5000):
        with pytest.raises(ContextOverflow, match=f"{count} tokens .* holds 512"):
            embed(bert, token_ids=(7,) * count)
    assert embed(bert, token_ids=longest) == before


def test_a_context_that_llama_cpp_rounds_up_is_not_used_beyond_its_positions(
    opener: Opener, tmp_path: Path
) -> None:
    """llama.cpp would look up a row of the position matrix that is not there, and abort."""
    path = tmp_path / "odd.gguf"
    file = CASES["BERT"].make(WIDE)
    rows = 300
    weights = tuple(
        replace(w, shape=(w.shape[0], rows)) if w.name == "position_embd.weight" else w for w in file.weights
    )
    file = replace(file, weights=weights).with_key("bert.context_length", U32, rows)
    path.write_bytes(with_weights(file, "F16", 0).to_bytes())
    opened = opener.open(path)
    assert opened.model.info.context_tokens == rows
    embed(opened, token_ids=(7,) * rows)
    with pytest.raises(ContextOverflow):
        embed(opened, token_ids=(7,) * (rows + 1))
    opener.discard(opened)


def test_cancelling_before_it_starts_gives_no_embedding(bert: Opened) -> None:
    finished = answer(bert.model, request(token_ids=(5,), embed=True), cancelled=lambda: True)
    assert (finished.finish_reason, finished.embedding) == (FinishReason.CANCELLED, b"")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(EngineFailure, match="not finite"):
        packed(np.full(4, bad, np.float32))
    assert packed(np.zeros(4, np.float32)) == bytes(16)


def test_the_memory_for_computing_is_bounded_before_it_is_taken(tmp_path: Path) -> None:
    encoder = read_header(build(CASES["BERT"], "Q8_0", tmp_path / "b.gguf"))[1]
    assert pooled_bytes(encoder, 512) == 4 * 512 * 512 * 4
    decoder = read_header(build(CASES["Qwen3"], "Q8_0", tmp_path / "d.gguf"))[1]
    assert pooled_bytes(decoder, 512) == VOCABULARY * 512 * 4
    assert embedding.most_tokens(decoder) < embedding.most_tokens(encoder)

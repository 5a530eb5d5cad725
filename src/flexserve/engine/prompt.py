"""From a request to token ids: chat template, then tokeniser, with user text never becoming a control token.

Knows the model's vocabulary and template; does not know how tokens are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core import Request
from ..errors import TemplateFailure
from .llama import Vocabulary, check_tokens
from .spans import Span
from .template import TemplateZygote


def prompt_tokens(
    request: Request, vocab: Vocabulary, template: str | None, zygote: TemplateZygote
) -> list[int]:
    """The token ids of a request's prompt.

    Raises `InvalidRequest` (ids outside the vocabulary) and `TemplateFailure` (no template, or it refuses).
    """
    if request.token_ids is not None:
        check_tokens(request.token_ids, vocab)
        return list(request.token_ids)
    if request.prompt is not None:
        return vocab.tokenize(request.prompt, add_special=True, parse_special=False)
    assert request.messages is not None
    if template is None:
        raise TemplateFailure(f"model {request.model!r} has no chat template")
    spans = zygote.render(template, request.messages, bos=vocab.bos_text, eos=vocab.eos_text)
    return tokenize_spans(spans, vocab)


def tokenize_spans(spans: Sequence[Span], vocab: Vocabulary) -> list[int]:
    """Token ids of a rendered chat: what the template writes as a control token is one, what a user writes is text.

    Without control-token texts in the user's part these are llama.cpp's own tokens for the whole text.
    """
    pieces = vocab.control_tokens.pieces(spans)
    tokens: list[int] = []
    # A template that writes the BOS token itself must not get a second one.
    if vocab.adds_bos and not (pieces and pieces[0].is_template and pieces[0].text == vocab.bos_text):
        tokens.append(vocab.bos)
    for piece in pieces:
        tokens += vocab.tokenize(piece.text, add_special=False, parse_special=piece.is_template)
    return tokens

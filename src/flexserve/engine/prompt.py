"""From a request to token ids: chat template, then tokeniser, with user text never becoming a control token.

Knows the model's vocabulary and template; does not know how tokens are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core import Request
from ..errors import TemplateFailure
from .llama import Vocabulary, check_tokens
from .template import Span, TemplateZygote


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
    """Token ids of a rendered chat: control tokens in the template's text are tokens, in the user's they are text.

    When no special text reaches into a user's span, the whole is tokenised in one go, exactly as llama.cpp
    does; otherwise span by span, the user's without special tokens.
    """
    text = "".join(s.text for s in spans)
    # A template that writes the BOS token itself must not get a second one.
    add_special = not (vocab.adds_bos and vocab.bos_text and text.startswith(vocab.bos_text))
    if not _special_in_user_text(spans, text, vocab.special_texts):
        return vocab.tokenize(text, add_special=add_special, parse_special=True)
    tokens: list[int] = []
    for span in spans:
        first = add_special and not tokens
        tokens += vocab.tokenize(span.text, add_special=first, parse_special=span.is_template)
    return tokens


def _special_in_user_text(spans: Sequence[Span], text: str, specials: Sequence[str]) -> bool:
    """Whether any special token's text overlaps a user's span, be it by a single character."""
    user: list[tuple[int, int]] = []
    at = 0
    for span in spans:
        if not span.is_template and span.text:
            user.append((at, at + len(span.text)))
        at += len(span.text)
    if not user:
        return False
    for special in specials:
        found = text.find(special)
        while found >= 0:
            if any(found < end and found + len(special) > start for start, end in user):
                return True
            found = text.find(special, found + 1)
    return False

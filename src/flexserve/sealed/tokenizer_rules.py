"""What a model's vocabulary must satisfy before llama.cpp may build a tokenizer from it.

The rules prevent the aborts and the exceptions that llama.cpp raises while it tokenises, where nobody
catches them (src/llama-vocab.cpp of the pinned version): duplicate tokens, missing byte tokens, special
tokens it is told to add but does not have. Kinds of tokenizer that were not reviewed are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelMalformed, ModelUnsupported
from .string_array import StringArray

if TYPE_CHECKING:
    from .gguf import GGUFHeader

_PREFIX = "tokenizer.ggml."
MAX_TOKENS = 1 << 20
MAX_TOKEN_BYTES = 4096
MAX_SPECIAL_TOKENS = 32768  # llama.cpp searches a prompt for each of them

# Kinds, and the ids they take for (bos, eos) when the file names none.
_DEFAULTS: dict[str, tuple[int | None, int | None]] = {
    "llama": (1, 2),
    "gpt2": (11, 11),
    "gemma4": (None, None),
    "bert": (101, None),
}
# What llama.cpp takes for the others of a WordPiece vocabulary, which it uses without asking whether they exist.
_WORDPIECE_IDS = {"unknown": 100, "seperator": 102, "padding": 0}
MAX_PIECE_BYTES = 256  # of WordPiece: llama.cpp tries every length up to the longest at every character
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")  # sic: seperator
_FILL_IDS = ("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle")

_CONTROL, _USER_DEFINED, _UNKNOWN, _BYTE, _LAST_TYPE = 3, 4, 2, 6, 6


def check_tokenizer(header: GGUFHeader) -> int:
    """Check the vocabulary; returns its size in tokens. Raises `ModelMalformed`, `ModelUnsupported`."""
    kind = header.metadata.get(_PREFIX + "model")
    if not isinstance(kind, str):
        raise ModelMalformed(f"key '{_PREFIX}model' must be a string")
    if kind not in _DEFAULTS:
        raise ModelUnsupported(f"key '{_PREFIX}model': tokenizers of kind {kind[:64]!r} are not supported")
    tokens = header.metadata.get(_PREFIX + "tokens")
    if not isinstance(tokens, StringArray):
        raise ModelMalformed(f"key '{_PREFIX}tokens' must be an array of strings")
    count = len(tokens)
    if not 1 <= count <= MAX_TOKENS:
        raise ModelMalformed(f"a vocabulary of {count} tokens: 1 to {MAX_TOKENS} are possible")
    if tokens.max_bytes > MAX_TOKEN_BYTES:
        raise ModelMalformed(f"key '{_PREFIX}tokens' has a token longer than {MAX_TOKEN_BYTES} bytes")
    known = _check_distinct(tokens)
    types = _numbers(header, "token_type", "i", count)
    _check_types(tokens, types)
    scores = _numbers(header, "scores", "fi", count)
    if scores is not None and scores.dtype.kind == "f" and np.isnan(scores).any():
        raise ModelMalformed(f"key '{_PREFIX}scores' has an element that is not a number")
    if kind == "bert":
        _check_wordpiece(header, tokens, types)
    elif kind == "llama":
        for byte in range(256):
            if b"<0x%02X>" % byte not in known and bytes((byte,)) not in known:
                raise ModelMalformed(f"the vocabulary has no token for byte {byte}")
    else:
        _check_merges(header)
    _check_special_ids(header, kind, count)
    return count


def _check_distinct(tokens: StringArray) -> set[bytes]:
    # llama.cpp names empty tokens so, and then asserts that no two tokens are equal
    seen: set[bytes] = set()
    for index, token in enumerate(tokens.raws()):
        word = token or b"[EMPTY_%d]" % index
        if word in seen:
            raise ModelMalformed(f"token {index} of key '{_PREFIX}tokens' occurs twice")
        seen.add(word)
    return seen


def _numbers(header: GGUFHeader, name: str, kinds: str, count: int) -> npt.NDArray[Any] | None:
    value = header.metadata.get(_PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.dtype.itemsize != 4:
        raise ModelMalformed(f"key '{_PREFIX}{name}' must be an array of 4-byte numbers")
    if len(value) != count:
        raise ModelMalformed(f"key '{_PREFIX}{name}' has {len(value)} elements for {count} tokens")
    return value


def _check_types(tokens: StringArray, types: npt.NDArray[Any] | None) -> None:
    if types is None:
        return
    if int(types.min()) < 0 or int(types.max()) > _LAST_TYPE:
        raise ModelMalformed(f"key '{_PREFIX}token_type' has an element outside 0 to {_LAST_TYPE}")
    special = int(np.isin(types, (_CONTROL, _USER_DEFINED, _UNKNOWN)).sum())
    if special > MAX_SPECIAL_TOKENS:
        raise ModelMalformed(f"{special} special tokens, at most {MAX_SPECIAL_TOKENS} are allowed")
    for index in np.flatnonzero(types == _BYTE):
        token = tokens.raw(int(index))
        if len(token) != 6 or not token.startswith(b"<0x") or not token.endswith(b">"):
            raise ModelMalformed(f"token {index} is marked as a byte, but is not written like '<0x0A>'")
        try:
            int(token[3:5], 16)
        except ValueError:
            raise ModelMalformed(f"token {index} is marked as a byte, but names none") from None


def _check_wordpiece(header: GGUFHeader, tokens: StringArray, types: npt.NDArray[Any] | None) -> None:
    if tokens.max_bytes > MAX_PIECE_BYTES:
        raise ModelMalformed(
            f"key '{_PREFIX}tokens' has a piece of a word longer than {MAX_PIECE_BYTES} bytes"
        )
    if types is not None and (types == _BYTE).any():
        raise ModelMalformed(
            f"key '{_PREFIX}token_type' has bytes, which a vocabulary of word pieces has not"
        )
    count = header.metadata.get(_PREFIX + "token_type_count")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1 << 16:
        raise ModelMalformed(f"key '{_PREFIX}token_type_count' must be 1 to 65536")


def _check_merges(header: GGUFHeader) -> None:
    merges = header.metadata.get(_PREFIX + "merges")
    if not isinstance(merges, StringArray):
        raise ModelMalformed(f"key '{_PREFIX}merges' must be an array of strings")
    for index, merge in enumerate(merges.raws()):
        space = merge.find(b" ", 1)
        if space < 0 or space == len(merge) - 1:
            raise ModelMalformed(f"element {index} of key '{_PREFIX}merges' is not two parts with a space")


def _check_special_ids(header: GGUFHeader, kind: str, count: int) -> None:
    present: dict[str, int | None] = dict(zip(("bos", "eos"), _DEFAULTS[kind], strict=True))
    if kind == "bert":
        present |= _WORDPIECE_IDS
    for name in _SPECIAL_IDS + _FILL_IDS:
        key = f"{_PREFIX}{name}_token_id"
        value = header.metadata.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise ModelMalformed(f"key {key!r} is {value!r}: it must be the id of one of {count} tokens")
        present[name] = value
    for name in ("bos", *_WORDPIECE_IDS) if kind == "bert" else ():
        token = present[name]
        assert token is not None
        if token >= count:
            raise ModelMalformed(
                f"key '{_PREFIX}{name}_token_id' is missing, and token {token} does not exist"
            )
    for name, adds in (("bos", True), ("eos", False), ("seperator", False)):
        # without the key, whether a token is added depends on the kind of pre-tokenizer: assume it for bos
        key = f"{_PREFIX}add_{'sep' if name == 'seperator' else name}_token"
        wanted = header.metadata.get(key, adds)
        if not isinstance(wanted, bool):
            raise ModelMalformed(f"key {key!r} must be a bool")
        token = present.get(name)
        if wanted and (token is None or token >= count):
            raise ModelMalformed(f"key {key!r}: the vocabulary has no such token to add")

"""OpenAI's request bodies, checked and turned into `core.Request`; answers turned into OpenAI's objects.

Every field that would change the answer is either honoured or refused by name; what cannot change it is
ignored. Messages of errors name fields, never their content: a prompt must not end up in a log.

It knows no sockets and no world.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from ..core import MAX_CLIENT_CHARS, Finished, FinishReason, Message, ModelInfo, Request, Sampling
from ..errors import FlexServeError, InvalidRequest

# Fields that would change the answer, and the values that ask for nothing. Everything else is refused.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    # Names of other servers for things we do not do.
    "repetition_penalty": (1,),
    "typical_p": (1,),
    "mirostat": (0,),
    "grammar": ("",),
    "json_schema": (),
    "min_tokens": (0,),
}
_REFUSED_HINTS = {
    "repetition_penalty": "it is called repeat_penalty here",
    "tools": "describe the tools in the system message",
    "response_format": "ask for the format in the prompt",
}


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _ChatMessage(msgspec.Struct):
    role: str
    content: str | list[_Part]
    tool_calls: list[msgspec.Raw] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Hints(msgspec.Struct, forbid_unknown_fields=True):
    """Ours: who asks, what is asked next, how urgent it is (docs/workflows.md)."""

    client: str | None = None
    next_model: str | None = None
    priority: int | None = None


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    session: str | None = None
    user: Any = None
    flexserve: _Hints | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_ChatMessage]


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]


B = TypeVar("B", bound=_Body)


@dataclass(frozen=True)
class Wanted:
    """A checked request and how its answer is to be sent."""

    request: Request
    chat: bool
    stream: bool
    include_usage: bool


def decode_chat(body: bytes) -> Wanted:
    """The body of /v1/chat/completions. Raises `InvalidRequest`."""
    data = _decode(body, _ChatBody)
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(data.messages))
    return _wanted(data, chat=True, messages=messages)


def decode_completion(body: bytes) -> Wanted:
    """The body of /v1/completions. Raises `InvalidRequest`."""
    data = _decode(body, _CompletionBody)
    prompt = data.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # type: ignore[assignment]  # a list of one prompt: that prompt
    if isinstance(prompt, str):
        return _wanted(data, chat=False, prompt=prompt)
    if not all(isinstance(t, int) for t in prompt):
        raise InvalidRequest(
            "prompt must be one string or one list of token ids", hint="send one request for each prompt"
        )
    return _wanted(data, chat=False, token_ids=tuple(prompt))


def _decode(body: bytes, cls: type[B]) -> B:
    fields = parse(body, dict[str, msgspec.Raw])
    for name in _REFUSED.keys() & fields.keys():
        value = parse(fields[name], Any)
        if value is not None and value not in _REFUSED[name]:
            raise InvalidRequest(
                f"{name} is not supported", hint=_REFUSED_HINTS.get(name, f"leave {name} out")
            )
    decoded: B = parse(body, cls)
    return decoded


def parse(data: bytes | msgspec.Raw, cls: Any) -> Any:
    """JSON of exactly that type. Raises `InvalidRequest`, which names types and paths, never content."""
    try:
        return msgspec.json.decode(data, type=cls)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request body is wrong: {error}") from None  # names types and paths only
    except msgspec.DecodeError:
        raise InvalidRequest("the request body is not well-formed JSON") from None
    except UnicodeDecodeError:
        raise InvalidRequest("the request body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the request body is nested too deeply") from None


def _message(message: _ChatMessage, where: str) -> Message:
    if message.tool_calls:
        raise InvalidRequest(f"{where}.tool_calls is not supported")
    content = message.content
    if not isinstance(content, str):
        for i, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequest(f"{where}.content[{i}] must be a text part: only text is supported")
        content = "\n".join(part.text or "" for part in content)
    return Message(message.role, content)


def _wanted(data: _Body, *, chat: bool, **prompt: Any) -> Wanted:
    if (
        None not in (data.max_tokens, data.max_completion_tokens)
        and data.max_tokens != data.max_completion_tokens
    ):
        raise InvalidRequest("max_tokens and max_completion_tokens must agree", hint="send only one of them")
    if data.stream_options is not None and not data.stream:
        raise InvalidRequest("stream_options is for streams only", hint="send stream: true with it")
    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")
    given = {name: value for name in names if (value := getattr(data, name)) is not None}
    hints = data.flexserve or _Hints()
    stop = (data.stop,) if isinstance(data.stop, str) else tuple(data.stop or ())
    request = Request(
        id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        model=data.model,
        max_tokens=data.max_tokens if data.max_completion_tokens is None else data.max_completion_tokens,
        stop=stop,
        ignore_eos=bool(data.ignore_eos),
        sampling=Sampling(**given),
        session=data.session,
        client=hints.client if hints.client is not None else _client_of(data.user),
        next_model=hints.next_model,
        priority=hints.priority or 0,
        **prompt,
    )
    usage = data.stream_options is not None and bool(data.stream_options.include_usage)
    return Wanted(request, chat=chat, stream=bool(data.stream), include_usage=usage)


def _client_of(user: Any) -> str | None:
    """OpenAI's `user` tells clients apart where it can; whatever it is, it never makes a request wrong."""
    fits = isinstance(user, str) and 1 <= len(user) <= MAX_CLIENT_CHARS and user.isprintable()
    return user if fits else None


# Answers


class Shape:
    """Writes one answer as OpenAI's objects: whole, or chunk by chunk."""

    def __init__(self, wanted: Wanted, now: Callable[[], float] = time.time) -> None:
        self._chat = wanted.chat
        self._usage = wanted.include_usage
        name = "chat.completion" if wanted.chat else "text_completion"
        self._base = {
            "id": wanted.request.id,
            "object": name,
            "created": int(now()),
            "model": wanted.request.model,
        }
        self._chunk = dict(self._base)
        if wanted.chat:
            self._chunk["object"] = "chat.completion.chunk"

    def whole(self, finished: Finished) -> bytes:
        """The answer of a request that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finished.finish_reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": finished.text, "refusal": None}
        else:
            choice["text"] = finished.text
        return msgspec.json.encode(
            self._base | {"choices": [choice], "usage": _usage(finished), "flexserve": _details(finished)}
        )

    def first(self) -> bytes:
        """The event before any text: a chat stream begins with the role."""
        if not self._chat:
            return b""
        return self._event(self._choice({"role": "assistant", "content": ""}, "", None))

    def piece(self, text: str) -> bytes:
        """The event for some generated text."""
        return self._event(self._choice({"content": text}, text, None))

    def last(self, finished: Finished) -> bytes:
        """The events that end the stream."""
        choice = self._choice({}, "", finished.finish_reason)
        end = self._event(choice, {"flexserve": _details(finished)})
        if self._usage:
            end += self._event(None, {"usage": _usage(finished)})
        return end + b"data: [DONE]\n\n"

    def error(self, error: FlexServeError) -> bytes:
        """The event for an answer that fails after its first event was sent; nothing follows it."""
        return b"data: " + error_body(error) + b"\n\n"

    def _choice(self, delta: dict[str, str], text: str, reason: FinishReason | None) -> dict[str, Any]:
        what = {"delta": delta} if self._chat else {"text": text}
        return {"index": 0, **what, "logprobs": None, "finish_reason": reason}

    def _event(self, choice: dict[str, Any] | None, more: dict[str, Any] | None = None) -> bytes:
        usage = {"usage": None} if self._usage else {}
        data = {**self._chunk, "choices": [choice] if choice else [], **usage, **(more or {})}
        return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _usage(finished: Finished) -> dict[str, Any]:
    t = finished.timings
    return {
        "prompt_tokens": t.prompt_tokens,
        "completion_tokens": t.output_tokens,
        "total_tokens": t.prompt_tokens + t.output_tokens,
        "prompt_tokens_details": {"cached_tokens": t.cached_prompt_tokens},
    }


def _details(finished: Finished) -> dict[str, Any]:
    return {"token_ids": finished.token_ids, "timings": finished.timings}


def error_body(error: FlexServeError) -> bytes:
    """OpenAI's error object, with our code and hint."""
    status = error.http_status
    kind = {401: "authentication_error", 403: "permission_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return msgspec.json.encode({"error": {**error.as_dict(), "type": kind}})


def model_object(info: ModelInfo, created: int) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "flexserve",
        "flexserve": info,
    }

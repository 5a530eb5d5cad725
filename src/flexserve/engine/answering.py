"""One answer: from a request to its last token, on a model that is ready. Used once, by one thread.

Knows the model's context, sampler and text, and asks a guide (guide.py) at its turning points. Does not know who else
asks, nor where the weights come from.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..core import Finished, FinishReason, Request, Timings, Token
from ..errors import ContextOverflow, EngineFailure, InvalidRequest
from ..flexmem.arena import SegmentState
from ..flexmem.loader import Loader
from .embedding import check_kind, packed
from .guide import Beginning, Guide, Step
from .llama import Context, Model, Sampler
from .model_sessions import ModelSessions
from .needs import Needs
from .prompt import prompt_tokens
from .template import TemplateZygote
from .text import StopStrings, Utf8Stream


@dataclass(frozen=True)
class Equipment:
    """What a model answers with."""

    model: Model
    context: Context
    loader: Loader
    needs: Needs
    sessions: ModelSessions | None
    template: str | None
    zygote: TemplateZygote
    context_tokens: int
    embeds: bool  # makes embeddings instead of text


class Answering:
    """One answer in progress."""

    def __init__(
        self,
        equipment: Equipment,
        request: Request,
        emit: Callable[[Token], None],
        cancelled: Callable[[], bool],
        *,
        accepted_at: float,
        guide: Guide | None = None,
    ) -> None:
        """`emit` gets each token, of which an embedding has none. `accepted_at`: time.perf_counter() when the request
        arrived. Without a guide nothing but the loader limits it."""
        self._on = equipment
        self._request = request
        self._emit = emit
        self._cancelled = cancelled
        self._accepted_at = accepted_at
        self._guide = guide
        self._beginning: Beginning | None = None
        self._away = 0  # tokens that were put away, and not brought back

    def run(self) -> Finished:
        """Answer. Raises `ContextOverflow`, `TemplateFailure`, `InvalidRequest`, `SegmentNotAuthentic`,
        `EngineFailure`, and what the guide raises."""
        on, request = self._on, self._request
        started = time.perf_counter()
        on.loader.check()
        check_kind(embeds=on.embeds, wanted=request.embed, model=request.model)
        prompt = self._prompt()
        tokenized = time.perf_counter()
        before = on.loader.times()
        on.context.stop.set(False)
        if not self._begin(prompt):
            return self._not_begun(prompt, started, tokenized)
        if request.embed:
            return self._embedding(prompt, (started, tokenized))
        sampler = Sampler(request.sampling, _seed(request), on.model.vocab.size)
        try:
            on.context.clear()
            # While the loader's threads bring in weights.
            kept, restore_s = self._resume(prompt)
            parts = on.sessions.parts(prompt, kept) if on.sessions else [prompt]
            alive = all(self._decode(part) for part in parts)
            prefilled = time.perf_counter()
            sampler.accept(prompt)
            loaded = on.loader.times().since(before)
            output = _Output(request, on.model, self._emit)
            room = request.max_tokens or on.context_tokens - len(prompt)
            reason, first = (
                self._generate(room, sampler, output) if alive else (FinishReason.CANCELLED, prefilled)
            )
            ended = time.perf_counter()
            self._keep()
        finally:
            sampler.close()
            on.context.clear()
        text, ids = output.finish()
        decode_s = ended - first
        return Finished(
            text,
            ids,
            reason,
            Timings(
                queue_s=started - self._accepted_at,
                tokenize_s=tokenized - started,
                prefill_s=prefilled - tokenized,
                ttft_s=first - self._accepted_at,
                decode_s=decode_s,
                total_s=ended - self._accepted_at,
                prompt_tokens=len(prompt),
                output_tokens=len(ids),
                prefill_tokens_per_s=(len(prompt) - kept) / (prefilled - tokenized),
                decode_tokens_per_s=(len(ids) - 1) / decode_s if len(ids) > 1 else 0.0,
                cached_prompt_tokens=kept,
                restore_s=restore_s,
                **asdict(loaded),
            ),
        )

    def _prompt(self) -> list[int]:
        on, request = self._on, self._request
        prompt = prompt_tokens(request, on.model.vocab, on.template, on.zygote)
        answer_tokens = 0 if request.embed else request.max_tokens or 1
        if on.context_tokens - len(prompt) < answer_tokens:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and the answer may have {answer_tokens}, "
                f"but the context of model {request.model!r} holds {on.context_tokens}",
                hint="send a shorter text" if request.embed else None,
            )
        if not prompt:
            raise InvalidRequest(
                "the prompt is empty: a model needs at least one token", hint="send some text"
            )
        return prompt

    def _not_begun(self, prompt: list[int], started: float, tokenized: float) -> Finished:
        ended = time.perf_counter()
        timings = Timings(
            queue_s=started - self._accepted_at,
            tokenize_s=tokenized - started,
            total_s=ended - self._accepted_at,
            prompt_tokens=len(prompt),
        )
        return Finished("", (), FinishReason.CANCELLED, timings)

    def _embedding(self, prompt: list[int], times: tuple[float, float]) -> Finished:
        """`times`: when it started and when it was tokenised."""
        on = self._on
        started, tokenized = times
        before = on.loader.times()
        try:
            on.context.clear()
            alive = self._decode(prompt)
            embedding = packed(on.context.embedding()) if alive else b""
        finally:
            on.context.clear()
        ended = time.perf_counter()
        return Finished(
            "",
            (),
            FinishReason.STOP if alive else FinishReason.CANCELLED,
            Timings(
                queue_s=started - self._accepted_at,
                tokenize_s=tokenized - started,
                prefill_s=ended - tokenized,
                ttft_s=ended - self._accepted_at,
                total_s=ended - self._accepted_at,
                prompt_tokens=len(prompt),
                prefill_tokens_per_s=len(prompt) / (ended - tokenized),
                **asdict(on.loader.times().since(before)),
            ),
            embedding,
        )

    # Memory: what the guide decides, or nobody

    def _begin(self, prompt: list[int]) -> bool:
        """See that weights come, in the order this prompt needs them; False when it was cancelled."""
        loader, needs = self._on.loader, self._on.needs
        if self._guide is not None:
            match = self._on.sessions.match(prompt) if self._on.sessions else None
            rows = needs.rows(prompt)
            self._beginning = self._guide.begin(prompt, match, rows)
            if self._beginning is None:
                return False
            loader.wait_for_rows(rows)
        else:
            loader.arena.pin(loader.arena.segments_in(SegmentState.LAZY))
        if not loader.on_demand:
            loader.load(needs.everything())
            loader.wait()
            loader.check()
        elif self._guide is None:
            loader.load(needs.order(prompt))
        return True

    def _resume(self, prompt: list[int]) -> tuple[int, float]:
        """Put what there is of the prompt into the empty context: of how many tokens, and the seconds it took."""
        sessions, beginning = self._on.sessions, self._beginning
        if sessions is None:
            return 0, 0.0
        if beginning is None:
            return sessions.resume(self._on.context, prompt)
        began, kept = time.perf_counter(), 0
        if beginning.source is not None and beginning.reuse_tokens:
            if sessions.go_on(self._on.context, beginning.source, beginning.reuse_tokens):
                kept = beginning.reuse_tokens
            else:
                self._on.context.clear()
        sessions.drop(beginning.session)  # the context has its tokens, or will have others
        return kept, time.perf_counter() - began if kept else 0.0

    def _may_go_on(self, tokens: int) -> bool:
        """Whether the context may hold so many tokens; waits for it. False when it was cancelled."""
        if self._cancelled():
            return False
        if self._guide is None:
            return True
        while (step := self._guide.before(tokens)) is Step.PAUSE:
            step = self._pause(self._guide)
            if step is Step.CANCELLED:
                break
        return step is Step.GO

    def _pause(self, guide: Guide) -> Step:
        """Take the KV out of the context until there is memory for it again."""
        sessions, context = self._on.sessions, self._on.context
        assert self._beginning is not None
        session, name, used = self._beginning.session, self._request.session or "", context.used
        put_away = sessions is not None and used > 0 and sessions.put_away(context, name, session)
        self._away = used if put_away else 0
        guide.kept(self._away)
        step = guide.paused(put_away=put_away)
        if put_away and step is Step.GO:
            assert sessions is not None
            if not sessions.bring_back(context, session):
                raise EngineFailure(
                    "the keys and values of this answer could not be brought back into memory",
                    hint="send the request again",
                )
            self._away = 0
            guide.kept(0)
        return step

    def _keep(self) -> None:
        """Keep the KV for the next turn."""
        if self._on.sessions is None or self._away:
            return
        name, context = self._request.session or "", self._on.context
        if self._guide is None:
            self._on.sessions.keep(context, name)
        elif self._beginning is not None and self._on.sessions.keep(context, name, self._beginning.session):
            self._guide.kept(context.used)

    # Compute

    def _decode(self, tokens: list[int]) -> bool:
        """Decode, batch by batch; False when cancelled. Whatever was computed on unauthentic pages is never used."""
        context = self._on.context
        for at in range(0, len(tokens), context.batch_tokens):
            part = tokens[at : at + context.batch_tokens]
            if not self._may_go_on(context.used + len(part)):
                return False
            try:
                if not context.decode(part):
                    return False
            finally:
                self._on.loader.check()
        return True

    def _generate(self, limit: int, sampler: Sampler, output: _Output) -> tuple[FinishReason, float]:
        first = 0.0
        for count in range(1, limit + 1):
            token = sampler.sample(self._on.context)
            if not first:
                first = time.perf_counter()
                if self._guide is not None:
                    self._guide.first_token()
            if output.is_end(token):
                return FinishReason.STOP, first
            if output.add(token):
                return FinishReason.STOP, first
            if count == limit:
                break
            if not self._decode([token]):
                return FinishReason.CANCELLED, first
        return FinishReason.LENGTH, first


class _Output:
    """The answer so far: ids, and text that is complete and free of stop strings."""

    def __init__(self, request: Request, model: Model, emit: Callable[[Token], None]) -> None:
        self._vocab = model.vocab
        self._ignore_eos = request.ignore_eos
        self._emit = emit
        self._utf8 = Utf8Stream()
        self._stops = StopStrings(request.stop)
        self._ids: list[int] = []
        self._text: list[str] = []

    def is_end(self, token: int) -> bool:
        return not self._ignore_eos and self._vocab.is_end(token)

    def add(self, token: int) -> bool:
        """Take a token; True when a stop string is complete."""
        self._ids.append(token)
        text = self._stops.feed(self._utf8.feed(self._vocab.piece(token)))
        self._text.append(text)
        self._emit(Token(token, text))
        return self._stops.matched is not None

    def finish(self) -> tuple[str, tuple[int, ...]]:
        """The whole answer, with what was held back."""
        self._text += [self._stops.feed(self._utf8.flush()), self._stops.flush()]
        return "".join(self._text), tuple(self._ids)


def _seed(request: Request) -> int:
    return secrets.randbits(32) if request.sampling.seed is None else request.sampling.seed

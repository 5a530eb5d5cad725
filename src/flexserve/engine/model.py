"""A sealed model ready to answer: its arena, its loader, llama.cpp's model and context, and one request at a time.

This is where plaintext lives. Knows nothing of worlds, channels or queues. `open` leaves no weight resident;
the first request brings them in, in execution order, while llama.cpp already computes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..core import Finished, FinishReason, ModelInfo, ModelStatus, Request, Timings, Token
from ..errors import ContextOverflow, InvalidRequest, ModelUnsupported
from ..flexmem import ggml, repack
from ..flexmem.arena import Arena, SegmentState
from ..flexmem.loader import WORKERS, Loader, SpanTrace
from ..flexmem.source import SealedSource
from ..flexmem.uffd import Userfaultfd
from ..sealed.format import RegionKind
from ..sealed.layout import LEARNED_POSITIONS
from ..sealed.reader import UnlockedModel
from ..sealed.session_file import MadeBy
from ..sealed.verify import check_inside
from .cache import cache_bytes, pooled_bytes
from .embedding import check_kind, makes_embeddings, most_tokens, packed
from .layout import CopyFiles, would_gain
from .layout import places as copy_places
from .llama import BATCH_TOKENS, Context, ContextOptions, Model, Sampler
from .needs import Needs, places_of
from .prompt import prompt_tokens
from .sessions import ModelSessions, SessionStore, Sums
from .template import TemplateZygote
from .text import StopStrings, Utf8Stream

DEFAULT_CONTEXT_TOKENS = 4096
_names = itertools.count()


@dataclass(frozen=True)
class EngineOptions:
    """Choices of the one who starts the engine."""

    threads: int
    context_tokens: int | None = None  # None: the model's own, at most DEFAULT_CONTEXT_TOKENS
    load_workers: int = WORKERS
    on_demand: bool = True  # False: no userfaultfd; everything is loaded before compute starts
    hide_from_dumps: bool = True
    trace: Callable[[SpanTrace], None] | None = None  # for measuring only (loader.py)


class SecureModel:
    """One registered model. `answer` and `recall` may be called from different threads."""

    def __init__(
        self,
        name: str,
        unlocked: UnlockedModel,
        *,
        cached: int,
        direct: int | None,
        zygote: TemplateZygote,
        options: EngineOptions,
        copy: CopyFiles | None = None,
        sessions: SessionStore | None = None,
    ) -> None:
        """`cached` and `direct` are descriptors of the sealed file (source.py); the caller closes them. With a
        `copy`, weights come from there, in execution layout, and everything else from the sealed file. Without
        `sessions`, every prompt is computed from its first token.

        Raises `NotAuthentic` when META or its content is not what it should be, `ModelUnsupported`.
        """
        self._zygote = zygote
        self._answering = threading.Lock()
        self._requests = 0
        self._last_used: float | None = None
        manifest = unlocked.manifest
        meta = unlocked.gguf_header()
        header = check_inside(manifest, meta)
        weights = manifest if copy is None else copy.copy.manifest
        self._embed, self._body = weights.region(RegionKind.EMBED), weights.region(RegionKind.BODY)
        # Whether the embedding is the output matrix too. In a copy that is so only while it is not repacked.
        self._tied = manifest.description.tied_output and len(weights.tensors) == len(manifest.tensors)
        places = (
            places_of(manifest.tensors, header)
            if copy is None
            else copy_places(copy.copy.manifest.tensors, header)
        )
        self._needs = Needs(header, places, self._embed, self._body, tied_output=self._tied)
        template = header.metadata.get("tokenizer.chat_template")
        self._template = template if isinstance(template, str) else None
        self._embeds = makes_embeddings(header)
        self._faults = Userfaultfd() if options.on_demand else None
        self.arena = Arena((self._embed, self._body), self._faults, hide_from_dumps=options.hide_from_dumps)
        self._loader: Loader | None = None
        self._buffer_type: ggml.ArenaBufferType | None = None
        self._model: Model | None = None
        self._context: Context | None = None
        try:
            self._buffer_type = ggml.ArenaBufferType(
                f"flexmem-{next(_names)}",
                self.arena.base,
                places,
            )
            self._model = Model.from_skeleton(
                meta, manifest.gguf_bytes, self._buffer_type, repacked=copy is not None
            )
            trained = self._model.context_tokens or DEFAULT_CONTEXT_TOKENS
            most = most_tokens(header) if self._embeds else DEFAULT_CONTEXT_TOKENS
            context_tokens = options.context_tokens or min(trained, most)
            learned = any(t.name == LEARNED_POSITIONS for t in header.tensors)
            if learned:  # there is no row for a later token
                context_tokens = min(context_tokens, trained)
            _ = self._model.vocab.control_tokens  # made now, not while the first client waits
            self._kv_bytes = cache_bytes(header, context_tokens)
            needed = self._kv_bytes + (pooled_bytes(header, context_tokens) if self._embeds else 0)
            if needed > kv_limit_bytes():
                raise ModelUnsupported(
                    f"{context_tokens} tokens of this model take {needed >> 20} MiB to remember, "
                    f"and this machine allows {kv_limit_bytes() >> 20} MiB",
                    hint="choose a smaller context",
                )
            self._context = Context(
                self._model,
                ContextOptions(context_tokens, options.threads, embeddings=self._embeds, gives_back=True),
            )
            # llama.cpp rounds the context up: room that these cannot use.
            exact = learned or self._embeds
            self._context_tokens = context_tokens if exact else self._context.context_tokens
            self._loader = Loader(
                self.arena,
                SealedSource(unlocked, cached, direct)
                if copy is None
                else SealedSource(copy.copy, copy.cached, copy.direct),
                self._faults,
                workers=options.load_workers,
                name=name,
                trace=options.trace,
            )
        except BaseException:
            self.close()
            raise
        description = manifest.description
        self.info = ModelInfo(
            name=name,
            model_id=manifest.model_id,
            model_version=manifest.model_version,
            architecture=description.architecture,
            quantization=description.quantization,
            parameters=description.parameters,
            context_tokens=self._context_tokens,
            weight_bytes=self._embed.length + self._body.length,
            has_chat_template=self._template is not None,
            execution_layout=copy is not None,
            makes_embeddings=self._embeds,
        )
        self._sessions: ModelSessions | None = None
        if sessions is not None and not self._embeds:
            made_by = _made_by(
                unlocked.sealed.digest, self._context.context_tokens, options, copied=copy is not None
            )
            self._sessions = ModelSessions(sessions, made_by, whole_only=self._model.keeps_state)
        self.would_gain = copy is None and would_gain(header)
        self._kv_bytes = cache_bytes(header, self._context.context_tokens)

    # Answering

    def answer(
        self,
        request: Request,
        emit: Callable[[Token], None],
        cancelled: Callable[[], bool],
        accepted_at: float,
    ) -> Finished:
        """Answer one request; `emit` gets each token, of which an embedding has none. One call at a time.

        `accepted_at`: time.perf_counter() when the request arrived. Raises `ContextOverflow`,
        `TemplateFailure`, `InvalidRequest`, `SegmentNotAuthentic`, `EngineFailure`.
        """
        with self._answering:
            return self._answer(request, emit, cancelled, accepted_at)

    def _answer(
        self,
        request: Request,
        emit: Callable[[Token], None],
        cancelled: Callable[[], bool],
        accepted_at: float,
    ) -> Finished:
        assert self._model and self._context and self._loader
        started = time.perf_counter()
        self._loader.check()
        check_kind(embeds=self._embeds, wanted=request.embed, model=request.model)
        self._requests += 1
        vocab = self._model.vocab
        prompt = prompt_tokens(request, vocab, self._template, self._zygote)
        room = self._context_tokens - len(prompt)
        answer_tokens = 0 if request.embed else request.max_tokens or 1
        if room < answer_tokens:
            raise ContextOverflow(
                f"the prompt has {len(prompt)} tokens and the answer may have {answer_tokens}, "
                f"but the context of model {request.model!r} holds {self._context_tokens}",
                hint="send a shorter text" if request.embed else None,
            )
        if not prompt:
            raise InvalidRequest(
                "the prompt is empty: a model needs at least one token", hint="send some text"
            )
        tokenized = time.perf_counter()
        before = self._loader.times()
        self._context.stop.set(False)
        if request.embed:
            return self._embedding(prompt, cancelled, (accepted_at, started, tokenized))
        sampler = Sampler(request.sampling, _seed(request), vocab.size)
        try:
            self._start_loading(prompt)
            self._context.clear()
            # While the loader's threads bring in weights.
            kept, restore_s = self._sessions.resume(self._context, prompt) if self._sessions else (0, 0.0)
            parts = self._sessions.parts(prompt, kept) if self._sessions else [prompt]
            alive = all(self._decode(part, cancelled) for part in parts)
            prefilled = time.perf_counter()
            sampler.accept(prompt)
            loaded = self._loader.times().since(before)
            output = _Output(request, self._model, emit)
            reason, first = (
                self._generate(request.max_tokens or room, sampler, output, cancelled)
                if alive
                else (FinishReason.CANCELLED, prefilled)
            )
            ended = time.perf_counter()
            if self._sessions:
                self._sessions.keep(self._context, request.session or "")
        finally:
            sampler.close()
            self._context.clear()
            self._last_used = time.perf_counter()
        text, ids = output.finish()
        decode_s = ended - first
        return Finished(
            text,
            ids,
            reason,
            Timings(
                queue_s=started - accepted_at,
                tokenize_s=tokenized - started,
                prefill_s=prefilled - tokenized,
                ttft_s=first - accepted_at,
                decode_s=decode_s,
                total_s=ended - accepted_at,
                prompt_tokens=len(prompt),
                output_tokens=len(ids),
                prefill_tokens_per_s=(len(prompt) - kept) / (prefilled - tokenized),
                decode_tokens_per_s=(len(ids) - 1) / decode_s if len(ids) > 1 else 0.0,
                cached_prompt_tokens=kept,
                restore_s=restore_s,
                **asdict(loaded),
            ),
        )

    def _embedding(
        self, prompt: list[int], cancelled: Callable[[], bool], times: tuple[float, float, float]
    ) -> Finished:
        """`times`: when the request was accepted, started and tokenised."""
        assert self._context and self._loader
        accepted_at, started, tokenized = times
        before = self._loader.times()
        try:
            self._start_loading(prompt)
            self._context.clear()
            alive = self._decode(prompt, cancelled)
            embedding = packed(self._context.embedding()) if alive else b""
        finally:
            self._context.clear()
            self._last_used = time.perf_counter()
        ended = time.perf_counter()
        return Finished(
            "",
            (),
            FinishReason.STOP if alive else FinishReason.CANCELLED,
            Timings(
                queue_s=started - accepted_at,
                tokenize_s=tokenized - started,
                prefill_s=ended - tokenized,
                ttft_s=ended - accepted_at,
                total_s=ended - accepted_at,
                prompt_tokens=len(prompt),
                prefill_tokens_per_s=len(prompt) / (ended - tokenized),
                **asdict(self._loader.times().since(before)),
            ),
            embedding,
        )

    def _start_loading(self, prompt: list[int]) -> None:
        """Bring lazy segments back and plan the absent ones, in the order this prompt needs them."""
        assert self._loader
        self.arena.pin(self.arena.segments_in(SegmentState.LAZY))
        if self._loader.on_demand:
            self._loader.load(self._needs.order(prompt))
            return
        self._loader.load(self._needs.everything())
        self._loader.wait()
        self._loader.check()

    def _decode(self, tokens: list[int], cancelled: Callable[[], bool]) -> bool:
        """One decode; False when cancelled. Whatever it computed on unauthentic pages is never used."""
        assert self._context and self._loader
        if cancelled():
            return False
        try:
            return self._context.decode(tokens)
        finally:
            self._loader.check()

    def _generate(
        self, limit: int, sampler: Sampler, output: _Output, cancelled: Callable[[], bool]
    ) -> tuple[FinishReason, float]:
        assert self._context and self._model
        first = 0.0
        for count in range(1, limit + 1):
            token = sampler.sample(self._context)
            first = first or time.perf_counter()
            if output.is_end(token):
                return FinishReason.STOP, first
            if output.add(token):
                return FinishReason.STOP, first
            if count == limit:
                break
            if not self._decode([token], cancelled):
                return FinishReason.CANCELLED, first
        return FinishReason.LENGTH, first

    def cancel(self) -> None:
        """End the decode that is running, if one is: `answer` then finishes as cancelled."""
        context = self._context  # `close` may come from another thread
        if context:
            context.stop.set()

    # Memory

    def recall(self, nbytes: int) -> int:
        """Give back up to `nbytes` of weights, last needed first; returns the bytes given back."""
        loader = self._loader
        if loader is None:  # closed
            return 0
        if loader.on_demand:
            return self._recall(nbytes)
        # Without userfaultfd nothing could wait for a page that is gone: only between requests.
        if not self._answering.acquire(blocking=False):
            return 0
        try:
            return self._recall(nbytes)
        finally:
            self._answering.release()

    def _recall(self, nbytes: int) -> int:
        chosen: list[int] = []
        total = 0
        # From the end of the execution order: a tied embedding is the output matrix, needed last.
        for region in (self._embed, self._body) if self._tied else (self._body, self._embed):
            for index in reversed(range(region.first_segment, region.first_segment + region.segment_count)):
                if total >= nbytes:
                    break
                if self.arena.state(index) >= SegmentState.RESIDENT:
                    chosen.append(index)
                    total += self.arena.span(index).length
        return self.arena.recall(sorted(chosen))

    @property
    def last_used(self) -> float:
        """time.perf_counter() at the end of the last answer; 0 before the first."""
        return self._last_used or 0.0

    @property
    def resident_bytes(self) -> int:
        return self.arena.bytes_in(SegmentState.RESIDENT) + self.arena.bytes_in(SegmentState.LAZY)

    def status(self) -> ModelStatus:
        """What `flexserve ps` shows of this model."""
        sums = self._sessions.sums() if self._sessions else Sums()
        return ModelStatus(
            info=self.info,
            resident_bytes=self.resident_bytes,
            lazy_bytes=self.arena.bytes_in(SegmentState.LAZY),
            kv_bytes=self._kv_bytes,
            poisoned=self.arena.poisoned is not None,
            requests=self._requests,
            last_used_s_ago=None if self._last_used is None else time.perf_counter() - self._last_used,
            sessions=sums.sessions,
            session_bytes=sums.memory_bytes,
            saved_sessions=sums.saved,
        )

    def close(self) -> None:
        """Free everything, zeroed. No request may be running."""
        for part in (self._context, self._model, self._buffer_type, self._loader, self.arena, self._faults):
            if part is not None:
                part.close()
        self._context = self._model = self._buffer_type = self._loader = self._faults = None


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


def _made_by(digest: bytes, context_tokens: int, options: EngineOptions, *, copied: bool) -> MadeBy:
    """Everything that decides the bits of a token's KV, but for the tokens themselves."""
    here = repack.this_engine()
    cpu = hashlib.sha256(f"{here.cpu}\n{options.threads}".encode()).hexdigest()[:16]
    layout = "execution" if copied else "sealed"
    return MadeBy(digest, here.engine, f"ctx={context_tokens} batch={BATCH_TOKENS} {layout} {cpu}")


def kv_limit_bytes() -> int:
    """What one model's KV cache may take: half of the machine's memory. llama.cpp would ask for any amount, and
    a few megabytes of narrow weights can declare hundreds of gigabytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

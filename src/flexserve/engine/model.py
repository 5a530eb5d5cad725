"""A sealed model ready to answer: its arena, its loader, llama.cpp's model and context, and one request at a time.

This is where plaintext lives. Knows nothing of worlds, channels or queues. `open` leaves no weight resident;
the first request brings them in, in execution order, while llama.cpp already computes.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..core import Finished, ModelInfo, ModelStatus, Request, Token
from ..errors import ModelUnsupported
from ..flexmem import ggml, repack
from ..flexmem.arena import Arena, SegmentState
from ..flexmem.loader import WORKERS, Listener, Loader, SpanTrace
from ..flexmem.source import SealedSource
from ..flexmem.uffd import Userfaultfd
from ..framework.weights import Part
from ..sealed.format import RegionKind
from ..sealed.layout import LEARNED_POSITIONS
from ..sealed.reader import UnlockedModel
from ..sealed.session_file import MadeBy
from ..sealed.verify import check_inside
from .adapter import SealedAdapter
from .answering import Answering, Equipment
from .cache import cache_bytes, pooled_bytes
from .embedding import makes_embeddings, most_tokens
from .guide import Guide
from .layout import CopyFiles, would_gain
from .layout import places as copy_places
from .llama import BATCH_TOKENS, Context, ContextOptions, Model
from .model_sessions import ModelSessions
from .needs import Needs, places_of
from .sessions import SessionStore, Sums
from .template import TemplateZygote

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
    memory_locked: bool = False  # this process locks its memory (mlockall)
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
        listener: Listener | None = None,
        adapter: SealedAdapter | None = None,
    ) -> None:
        """`cached` and `direct` are descriptors of the sealed file (source.py); the caller closes them. With a
        `copy`, weights come from there, in execution layout, and everything else from the sealed file. Without
        `sessions`, every prompt is computed from its first token. A `listener` hears what happens to segments.

        Raises `NotAuthentic` when META or its content is not what it should be, `ModelUnsupported`.
        """
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
        self.arena = Arena(
            (self._embed, self._body),
            self._faults,
            hide_from_dumps=options.hide_from_dumps,
            journal=listener is not None,
            locked=options.memory_locked,
        )
        self._equipment: Equipment | None = None
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
            added = None if adapter is None else adapter.load(self._model, header)
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
            if adapter is not None:
                self._context.use_adapter(added, adapter.scale)
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
                listener=listener,
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
            adapter="" if adapter is None else adapter.unlocked.manifest.model_id,
        )
        self._sessions: ModelSessions | None = None
        if sessions is not None and not self._embeds:
            digest = unlocked.sealed.digest
            made_by = _made_by(
                digest if adapter is None else adapter.digest_with(digest),
                self._context.context_tokens,
                options,
                copied=copy is not None,
            )
            self._sessions = ModelSessions(sessions, made_by, whole_only=self._model.keeps_state)
        self._equipment = Equipment(
            self._model,
            self._context,
            self._loader,
            self._needs,
            self._sessions,
            self._template,
            zygote,
            self._context_tokens,
            self._embeds,
        )
        self.adapter_bytes = 0 if adapter is None else adapter.memory_bytes
        self.would_gain = copy is None and would_gain(header)
        self._kv_bytes = cache_bytes(header, self._context.context_tokens)

    # Answering

    def answer(
        self,
        request: Request,
        emit: Callable[[Token], None],
        cancelled: Callable[[], bool],
        accepted_at: float,
        guide: Guide | None = None,
    ) -> Finished:
        """Answer one request, one call at a time; see `Answering`."""
        with self._answering:
            assert self._equipment is not None
            self._requests += 1
            try:
                answering = Answering(
                    self._equipment, request, emit, cancelled, accepted_at=accepted_at, guide=guide
                )
                return answering.run()
            finally:
                self._last_used = time.perf_counter()

    def cancel(self) -> None:
        """End the decode that is running, if one is: `answer` then finishes as cancelled."""
        context = self._context  # `close` may come from another thread
        if context:
            context.stop.set()

    # What the Framework has to know

    @property
    def loader(self) -> Loader:
        assert self._loader is not None
        return self._loader

    @property
    def sessions(self) -> ModelSessions | None:
        """None: this model keeps no conversations."""
        return self._sessions

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its segments in the order in which compute needs them."""
        parts = []
        for one, fill in self._needs.parts():
            unit = self.arena.span(one.first).length
            parts.append(Part(one.first, one.count, unit, self.arena.span(one.first, one.count).length, fill))
        return tuple(parts)

    @property
    def kv_bytes_per_token(self) -> int:
        assert self._context is not None
        return -(-self._kv_bytes // self._context.context_tokens)

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

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
            adapter_bytes=self.adapter_bytes,
        )

    def close(self) -> None:
        """Free everything, zeroed. No request may be running."""
        for part in (self._context, self._model, self._buffer_type, self._loader, self.arena, self._faults):
            if part is not None:
                part.close()
        self._context = self._model = self._buffer_type = self._loader = self._faults = self._equipment = None


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

"""The secure world's process: keys, plaintext, prompts and KV live here and nowhere else.

    main thread      receives messages; cancels, recalls and reports at once
    compute thread   registers models and answers requests, one after the other
    loader threads   one set per model (flexmem.loader)

It reads two things by itself, before anything else: the device's key and whom the device trusts. Models come
as descriptors, licences and the device state as bytes; it opens no other file. It ends when the channel does.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

# Imported when first used, when no file can be opened any more.
from cryptography.hazmat.backends.openssl import backend as _backend  # noqa: F401

from ...core import Finished, FinishReason, Request, Timings, Token, WorldStatus
from ...engine import llama
from ...engine.layout import CopyFiles, copy_info, make_copy
from ...engine.model import EngineOptions, SecureModel
from ...engine.sessions import DEFAULT_LIMIT_BYTES, SessionStore
from ...engine.template import TemplateZygote
from ...errors import (
    DeviceCopyRefused,
    EngineFailure,
    FlexServeError,
    ModelNotFound,
    ModelUnsupported,
    SessionRefused,
)
from ...flexmem import repack
from ...flexmem.uffd import UffdDeniedError, Userfaultfd
from ...sealed.crypto import rest_ciphers
from ...sealed.device_copy import open_copy
from ...sealed.keyfile import load_device_key, read_passphrase_file
from ...sealed.keys import DeviceKey, VendorPublicKey
from ...sealed.licence import Licence, open_licence
from ...sealed.reader import SealedModel
from ...sealed.secret import is_secret, wipe
from ...sealed.trust import TrustStore, read_public_key
from .channel import (
    Cancel,
    Channel,
    ChannelBroken,
    Configure,
    Ended,
    Failed,
    Generate,
    Measures,
    OfferSession,
    Optimize,
    Optimized,
    Progressed,
    Ready,
    Recall,
    Recalled,
    Register,
    Registered,
    Reported,
    SaveSession,
    SessionOffered,
    SessionSaved,
    Status,
    Tokens,
    ToSecure,
    failed,
)

PROGRESS_PERIOD_S = 0.1
_Call = Register | Optimize | OfferSession | SaveSession


class SecureWorld:
    """The process's state. Made after `Configure`."""

    def __init__(
        self,
        channel: Channel,
        configure: Configure,
        zygote: TemplateZygote,
        confine: Callable[[], Measures],
    ) -> None:
        """`confine` is called when nothing needs a file any more. Raises `KeyProblem`, `EngineIncompatible`."""
        self._channel = channel
        self._zygote = zygote
        self._started = time.perf_counter()
        self.device = _device_key(configure)
        self._trusted = _trusted(configure)
        llama.start()
        self.measures = confine()
        self.measures.secret_memory = is_secret()
        self.flexmem = "userfaultfd"
        if configure.on_demand:
            try:
                Userfaultfd().close()
            except UffdDeniedError as error:
                self.flexmem = f"none: {error.message}; models load fully before they compute"
        else:
            self.flexmem = "none: switched off"
        self._options = EngineOptions(
            threads=configure.threads,
            context_tokens=configure.context_tokens,
            on_demand=self.flexmem == "userfaultfd",
            hide_from_dumps=configure.hardened,
        )
        usual_bytes = DEFAULT_LIMIT_BYTES
        self._sessions = SessionStore(
            usual_bytes if configure.session_bytes is None else configure.session_bytes
        )
        self._models: dict[str, SecureModel] = {}
        self._descriptors: dict[str, list[int]] = {}  # of the models' files
        self._work: queue.SimpleQueue[tuple[_Call, list[int]] | tuple[Request, float]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: set[str] = set()  # requests that wait or run
        self._cancelled: set[str] = set()
        self._running: tuple[str, SecureModel] | None = None
        usual = threading.stack_size(llama.STACK_BYTES)  # address space: memory only where it is used
        threading.Thread(target=self._compute, name="compute", daemon=True).start()
        threading.stack_size(usual)

    # Main thread

    def handle(self, message: ToSecure) -> None:
        """Act on one message. Raises `ChannelBroken` for one that makes no sense here."""
        match message:
            case Register():
                descriptors = self._channel.take_descriptors(message.descriptors)
                descriptors += self._channel.take_descriptors(message.copy_descriptors or 0)
                self._work.put((message, descriptors))
            case Optimize():
                self._work.put((message, self._channel.take_descriptors(2)))
            case OfferSession() | SaveSession():
                self._work.put((message, self._channel.take_descriptors(1)))
            case Generate(request):
                with self._lock:
                    if request.id in self._pending:
                        raise ChannelBroken(f"two requests have the id {request.id!r}")
                    self._pending.add(request.id)
                self._work.put((request, time.perf_counter()))
            case Cancel(request_id):
                with self._lock:
                    if request_id in self._pending:
                        self._cancelled.add(request_id)
                    if self._running is not None and self._running[0] == request_id:
                        self._running[1].cancel()
            case Recall(call, nbytes):
                self._channel.send(Recalled(call, self._recall(nbytes)))
            case Status(call):
                self._channel.send(Reported(call, self._status()))
            case Configure():
                raise ChannelBroken("the secure world is configured once")

    def _recall(self, nbytes: int) -> int:
        """Cheapest first: sessions that are saved already, weights, then sessions that will have to be computed again.
        What a running answer computes on is none of these."""
        freed = self._sessions.recall(nbytes, saved=True)
        with self._lock:
            models = sorted(self._models.values(), key=lambda m: m.last_used)  # least recently used first
        for model in models:
            freed += model.recall(max(nbytes - freed, 0))
        return freed + self._sessions.recall(nbytes - freed, saved=False)

    def _status(self) -> WorldStatus:
        with self._lock:
            models, active = list(self._models.values()), self._running is not None
            waiting = len(self._pending) - int(active)
        return WorldStatus(
            world="linux",
            pid=os.getpid(),
            uptime_s=time.perf_counter() - self._started,
            active_requests=int(active),
            waiting_requests=max(waiting, 0),
            restarts=0,  # the supervisor knows
            flexmem=self.flexmem,
            models=tuple(m.status() for m in models),
        )

    # Compute thread

    def _compute(self) -> None:
        while True:
            first, second = self._work.get()
            try:
                if isinstance(first, _Call):
                    assert isinstance(second, list)
                    self._call(first, second)
                else:
                    assert isinstance(second, float)
                    self._answer(first, second)
            except OSError:
                return  # the channel is gone; the main thread ends the process
            except BaseException:
                self._channel.shut()  # nobody would compute any more: let the normal world start another
                raise

    def _call(self, message: _Call, descriptors: list[int]) -> None:
        answer: Registered | Optimized | SessionOffered | SessionSaved | Failed
        what = {Register: "registering", Optimize: "optimizing"}.get(type(message), "saving sessions")
        try:
            match message:
                case Register():
                    answer = self._register(message, descriptors)
                case Optimize():
                    answer = self._optimize(message, descriptors)
                case OfferSession(call):
                    answer = SessionOffered(call, self._believed(descriptors.pop()))
                case SaveSession(call):
                    saved = self._sessions.save_one(self.device, descriptors.pop())
                    answer = SessionSaved(call, saved, self._sessions.gone())
        except FlexServeError as error:
            _close(descriptors)
            answer = failed(error, call=message.call)
        except Exception as error:
            _close(descriptors)
            answer = failed(EngineFailure(f"{what} failed: {type(error).__name__}"), call=message.call)
        self._channel.send(answer)

    def _believed(self, fd: int) -> bool:
        try:
            self._sessions.add_saved(self.device, fd)
        except SessionRefused:
            return False
        return True

    def _open(self, fd: int, licence: bytes, state: bytes | None) -> tuple[SealedModel, Licensed]:
        sealed = SealedModel.open(fd, self._trusted)
        key, new_state = open_licence(licence, sealed, self.device, state, time.time())
        return sealed, Licensed(key, Licence.parse(licence).serial, new_state)

    def _register(self, message: Register, descriptors: list[int]) -> Registered:
        if not message.descriptors:
            raise ChannelBroken("a model without a descriptor")
        sealed, licensed = self._open(descriptors[0], message.licence, message.state)
        try:
            model = self._load(message, sealed, licensed, descriptors)
        finally:
            wipe(licensed.model_key)
            rest_ciphers()
        with self._lock:
            old = self._models.get(message.name)
            self._models[message.name] = model
        if old is not None:
            old.close()
            _close(self._descriptors[message.name])
        self._descriptors[message.name] = descriptors
        return Registered(message.call, model.info, licensed.state)

    def _load(
        self, message: Register, sealed: SealedModel, licensed: Licensed, descriptors: list[int]
    ) -> SecureModel:
        """From the device's own copy when it fits, otherwise from the sealed model; then `info` says why."""
        unlocked = sealed.unlock(licensed.model_key)
        files, copies = descriptors[: message.descriptors], descriptors[message.descriptors :]

        def load(copy: CopyFiles | None) -> SecureModel:
            return SecureModel(
                message.name,
                unlocked,
                cached=files[0],
                direct=files[1] if len(files) > 1 else None,
                zygote=self._zygote,
                options=self._options,
                copy=copy,
                sessions=self._sessions,
            )

        why = ""
        if copies:
            try:
                copy = open_copy(
                    copies[0],
                    sealed,
                    licensed.model_key,
                    serial=licensed.serial,
                    device=self.device,
                    engine=repack.this_engine(),
                )
                return load(CopyFiles(copy, copies[0], copies[1] if len(copies) > 1 else None))
            except (DeviceCopyRefused, ModelUnsupported) as error:
                why = f"{error.message}: make it again with `flexserve optimize`"
        model = load(None)
        if message.copy_descriptors is not None and not why and model.would_gain:
            why = (
                f"{model.info.quantization} is faster in execution layout: make this device's own copy "
                "with `flexserve optimize`"
            )
        model.info = dataclasses.replace(model.info, layout_hint=why)
        return model

    def _optimize(self, message: Optimize, descriptors: list[int]) -> Optimized:
        source, out = descriptors
        sealed, licensed = self._open(source, message.licence, message.state)
        told = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told
            if time.perf_counter() - told > PROGRESS_PERIOD_S:
                told = time.perf_counter()
                self._channel.send(Progressed(message.call, done, total))

        try:
            manifest = make_copy(
                sealed, licensed.model_key, out, serial=licensed.serial, device=self.device, progress=progress
            )
        finally:
            wipe(licensed.model_key)
            rest_ciphers()
        _close(descriptors)
        return Optimized(message.call, copy_info(sealed, manifest), licensed.state)

    def _answer(self, request: Request, accepted_at: float) -> None:
        with self._lock:
            model = self._models.get(request.model)
            cancelled = request.id in self._cancelled
            if model is not None and not cancelled:
                self._running = (request.id, model)
        try:
            if model is None:
                raise ModelNotFound(f"no model {request.model!r} is registered")
            if cancelled:
                finished = Finished("", (), FinishReason.CANCELLED, Timings())
            else:
                finished = model.answer(
                    request,
                    lambda token: self._channel.send(_tokens(request.id, token)),
                    lambda: request.id in self._cancelled,
                    accepted_at,
                )
            end = Ended(request.id, finished)
        except FlexServeError as error:
            end = failed(error, request=request.id)  # type: ignore[assignment]
        except Exception as error:  # its text may quote a prompt: the type must do
            end = failed(EngineFailure(f"answering failed: {type(error).__name__}"), request=request.id)  # type: ignore[assignment]
        rest_ciphers()
        with self._lock:
            self._running = None
            self._pending.discard(request.id)
            self._cancelled.discard(request.id)
        self._channel.send(end)


@dataclasses.dataclass(frozen=True)
class Licensed:
    """What an accepted licence gives: `state` is the device's new one."""

    model_key: bytes
    serial: int
    state: bytes


def _tokens(request_id: str, token: Token) -> Tokens:
    return Tokens(request_id, token.id, token.text)


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _device_key(configure: Configure) -> DeviceKey:
    def passphrase(source: str) -> bytes:
        if configure.passphrase_file is not None:
            return read_passphrase_file(Path(configure.passphrase_file))
        import getpass

        return getpass.getpass(
            f"passphrase of {source}: "
        ).encode()  # from the terminal, past the normal world

    return load_device_key(configure.device_key, passphrase)


def _trusted(configure: Configure) -> Collection[VendorPublicKey]:
    if configure.vendor_pub is not None:
        return (read_public_key(Path(configure.vendor_pub)),)
    return TrustStore(Path(configure.trust_dir)).vendors()


def serve(channel: Channel, zygote: TemplateZygote, confine: Callable[[], Measures]) -> None:
    """Be the secure world until the channel closes. Raises `ChannelBroken`, `OSError`."""
    configure = channel.receive()
    if not isinstance(configure, Configure):
        raise ChannelBroken("the first message must configure the secure world")
    try:
        world = SecureWorld(channel, configure, zygote, confine)
    except FlexServeError as error:
        channel.send(failed(error, call=0))
        return
    channel.send(Ready(world.device.key_id, world.flexmem, world.measures))
    while (message := channel.receive()) is not None:
        world.handle(message)

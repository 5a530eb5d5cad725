"""The secure world's process: keys, plaintext, prompts and KV live here and nowhere else.

    main thread      receives messages, and posts them to the Framework (runner.py)
    compute thread   registers models and answers requests, one after the other
    storage thread   sessions, to files and from files (saving.py)
    loader threads   one set per model (flexmem.loader)

It reads two things by itself, before anything else: the device's key and whom the device trusts. Models come
as descriptors, licences and the device state as bytes; it opens no other file. It ends when the channel does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
import time
from collections.abc import Callable

# Imported when first used, when no file can be opened any more.
from cryptography.hazmat.backends.openssl import backend as _backend  # noqa: F401

from ...core import Finished, FinishReason, Timings, Token
from ...engine import llama
from ...engine.adapter import SealedAdapter, of_the_adapter
from ...engine.layout import CopyFiles, copy_info, make_copy
from ...engine.model import EngineOptions, SecureModel
from ...engine.sessions import SessionStore
from ...engine.template import TemplateZygote
from ...errors import (
    DeviceCopyRefused,
    EngineFailure,
    FlexServeError,
    ModelUnsupported,
)
from ...flexmem import repack
from ...flexmem.loader import WORKERS
from ...flexmem.uffd import UffdDeniedError, Userfaultfd
from ...framework import events as ev
from ...sealed.crypto import rest_ciphers
from ...sealed.device_copy import open_copy
from ...sealed.licence import Licence, open_licence
from ...sealed.reader import SealedModel
from ...sealed.secret import is_secret, wipe
from .channel import (
    AdapterUse,
    Cancel,
    CannotSave,
    Channel,
    ChannelBroken,
    Configure,
    DeclareWorkflow,
    Ended,
    Failed,
    ForgetWorkflows,
    Generate,
    Measures,
    Offer,
    OfferSession,
    OfferWorkflows,
    Optimize,
    Optimized,
    Progressed,
    Ready,
    Recall,
    RecallAnswered,
    RecallBegan,
    RecallEnded,
    Register,
    Registered,
    Reported,
    SaveSession,
    SavesWanted,
    SaveWorkflows,
    SessionOffered,
    SessionSaved,
    SetBudget,
    Status,
    Tokens,
    ToNormal,
    ToSecure,
    Trace,
    Traced,
    Workflows,
    failed,
)
from .configured import device_key, framework_settings, trusted_vendors
from .outside import ModelListener, Outside
from .reporting import set_budget, status
from .run import Run
from .runner import Runner
from .saving import Saver
from .workflow_calls import WorkflowCalls
from .workflow_seal import Digests

PROGRESS_PERIOD_S = 0.1
_Call = Register | Optimize
_Saving = OfferSession | SaveSession


class SecureWorld(Outside):
    """The process's state. Made after `Configure`."""

    def __init__(
        self,
        channel: Channel,
        configure: Configure,
        zygote: TemplateZygote,
        confine: Callable[[], Measures],
    ) -> None:
        """`confine` is called when nothing needs a file any more. Raises `KeyProblem`, `EngineIncompatible`."""
        self.failed = False
        self._channel = channel
        self._zygote = zygote
        self._started = time.perf_counter()
        self.device = device_key(configure)
        self._trusted = trusted_vendors(configure)
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
            load_workers=WORKERS if configure.load_workers is None else configure.load_workers,
            context_tokens=configure.context_tokens,
            on_demand=self.flexmem == "userfaultfd",
            hide_from_dumps=configure.hardened,
            memory_locked=self.measures.memory_locked,
        )
        self._runner = Runner(framework_settings(configure, on_demand=self._options.on_demand), self)
        self._sessions = SessionStore(None)
        self._keeps = configure.session_bytes != 0
        self._saver = self._runner.saver = Saver(
            self._sessions,
            self.device,
            self._runner,
            saves=configure.saves,
            tell=lambda: self._tell(SavesWanted()),
        )
        digests = self._runner.digests = Digests(self.device)
        self._workflows = WorkflowCalls(self._runner, self.device, digests)
        self._names: dict[str, str] = {}  # of the models: ours -> the Framework's
        self._descriptors: dict[str, list[int]] = {}  # of the models' files, by the Framework's name
        self._work: queue.SimpleQueue[tuple[_Call, list[int]] | tuple[Run, None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: tuple[Run, SecureModel] | None = None
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
                descriptors += self._channel.take_descriptors(int(message.adapter is not None))
                self._work.put((message, descriptors))
            case Optimize():
                self._work.put((message, self._channel.take_descriptors(2)))
            case OfferSession() | SaveSession():
                (fd,) = self._channel.take_descriptors(1)
                self._saver.do(lambda: self._save(message, fd))
            case CannotSave():
                self._saver.cannot()
            case Generate(request):
                with self._lock:
                    model = self._names.get(request.model, request.model)
                if not self._runner.arrive(request, model, time.perf_counter()):
                    raise ChannelBroken(f"two requests have the id {request.id!r}")
            case Cancel(request_id):
                run = self._runner.cancel(request_id)
                with self._lock:
                    if run is not None and self._running is not None and self._running[0] is run:
                        self._running[1].cancel()
            case Recall(call, nbytes, deadline_s):
                self._runner.post(ev.PressureRecall(call, max(nbytes, 0), deadline_s))
            case Offer(nbytes):
                self._runner.post(ev.Offer(max(nbytes, 0)))
            case SetBudget():
                self._tell(set_budget(self._runner, message))
            case Trace(call, after):
                self._runner.settle()
                self._tell(Traced(call, self._runner.trace(after)))
            case Status(call):
                uptime_s = time.perf_counter() - self._started
                with self._lock:
                    names = list(self._names.values())
                self._tell(
                    Reported(call, status(self._runner, names, uptime_s=uptime_s, flexmem=self.flexmem))
                )
            case OfferWorkflows() | SaveWorkflows() | Workflows() | DeclareWorkflow() | ForgetWorkflows():
                self._tell(self._workflows.answer(message))
            case Configure():
                raise ChannelBroken("the secure world is configured once")

    # What the runner tells (runner.Outside), on any thread

    def compute(self, run: Run) -> None:
        self._work.put((run, None))

    def ended(self, run: Run, error: FlexServeError | None) -> None:
        if error is None:
            self._tell(Ended(run.name, Finished("", (), FinishReason.CANCELLED, Timings())))
        else:
            self._tell(failed(error, request=run.name))

    def answered(self, call: int, chosen_bytes: int, later_bytes: int) -> None:
        self._tell(RecallAnswered(call, chosen_bytes, later_bytes))

    def began(self, call: int) -> None:
        self._tell(RecallBegan(call))

    def finished(self, call: int, freed_bytes: int) -> None:
        self._tell(RecallEnded(call, freed_bytes))

    def fails(self) -> None:
        self.failed = True
        self._channel.shut()  # the normal world starts another process

    def _tell(self, message: ToNormal) -> None:
        with contextlib.suppress(OSError):  # the channel is gone; the main thread ends the process
            self._channel.send(message)

    # Storage thread

    def _save(self, message: _Saving, fd: int) -> None:
        try:
            match message:
                case OfferSession(call):
                    self._tell(SessionOffered(call, self._saver.believe(fd)))
                case SaveSession(call, everything):
                    saved = self._saver.save_next(fd, everything=everything)
                    self._tell(SessionSaved(call, saved, self._sessions.gone()))
        except FlexServeError as error:
            self._tell(failed(error, call=message.call))
        except Exception as error:
            failure = EngineFailure(f"saving sessions failed: {type(error).__name__}")
            self._tell(failed(failure, call=message.call))

    # Compute thread

    def _compute(self) -> None:
        while True:
            first, second = self._work.get()
            try:
                if isinstance(first, Run):
                    self._answer(first)
                else:
                    assert second is not None
                    self._call(first, second)
            except OSError:
                return  # the channel is gone; the main thread ends the process
            except BaseException:
                self.fails()  # nobody would compute any more
                raise

    def _call(self, message: _Call, descriptors: list[int]) -> None:
        answer: Registered | Optimized | Failed
        try:
            match message:
                case Register():
                    answer = self._register(message, descriptors)
                case Optimize():
                    answer = self._optimize(message, descriptors)
        except FlexServeError as error:
            _close(descriptors)
            answer = failed(error, call=message.call)
        except Exception as error:
            _close(descriptors)
            what = "registering" if isinstance(message, Register) else "optimizing"
            answer = failed(EngineFailure(f"{what} failed: {type(error).__name__}"), call=message.call)
        self._channel.send(answer)

    def _open(self, fd: int, licence: bytes, state: bytes | None) -> tuple[SealedModel, Licensed]:
        sealed = SealedModel.open(fd, self._trusted)
        key, new_state = open_licence(licence, sealed, self.device, state, time.time())
        return sealed, Licensed(key, Licence.parse(licence).serial, new_state)

    def _with_adapter(self, licensed: Licensed, use: AdapterUse, fd: int) -> Licensed:
        """The same, with an adapter that is licensed too."""
        try:
            sealed, its = self._open(fd, use.licence, licensed.state)
            try:
                adapter = SealedAdapter(sealed.unlock(its.model_key), use.scale)
            finally:
                wipe(its.model_key)
        except FlexServeError as error:
            wipe(licensed.model_key)
            raise of_the_adapter(error) from error
        return dataclasses.replace(licensed, state=its.state, adapter=adapter)

    def _register(self, message: Register, descriptors: list[int]) -> Registered:
        if not message.descriptors:
            raise ChannelBroken("a model without a descriptor")
        sealed, licensed = self._open(descriptors[0], message.licence, message.state)
        if message.adapter is not None:
            licensed = self._with_adapter(licensed, message.adapter, descriptors[-1])
        name = self._runner.new_name(message.name)
        try:
            model = self._load(message, sealed, licensed, descriptors, ModelListener(self._runner, name))
        finally:
            wipe(licensed.model_key)
            rest_ciphers()
        with self._lock:
            old = self._names.get(message.name)
            self._names[message.name] = name
            self._descriptors[name] = descriptors
        self._runner.add(name, model)
        if old is not None:
            self._runner.remove(old)
        return Registered(message.call, model.info, licensed.state)

    def closed(self, name: str) -> None:
        """A model that was replaced is closed: its files are not read any more."""
        with self._lock:
            descriptors = self._descriptors.pop(name)
        _close(descriptors)

    def _load(
        self,
        message: Register,
        sealed: SealedModel,
        licensed: Licensed,
        descriptors: list[int],
        listener: ModelListener,
    ) -> SecureModel:
        """From the device's own copy when it fits, otherwise from the sealed model; then `info` says why."""
        unlocked = sealed.unlock(licensed.model_key)
        files = descriptors[: message.descriptors]
        copies = descriptors[message.descriptors :][: message.copy_descriptors or 0]

        def load(copy: CopyFiles | None) -> SecureModel:
            return SecureModel(
                message.name,
                unlocked,
                cached=files[0],
                direct=files[1] if len(files) > 1 else None,
                zygote=self._zygote,
                options=self._options,
                copy=copy,
                adapter=licensed.adapter,
                sessions=self._sessions if self._keeps else None,
                listener=listener,
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

    def _answer(self, run: Run) -> None:
        request, model = run.request, self._runner.models()[run.model]
        with self._lock:
            self._running = run, model
        end: Ended | Failed
        try:
            if run.cancelled:
                finished = Finished("", (), FinishReason.CANCELLED, Timings())
            else:
                finished = model.answer(
                    request,
                    lambda token: self._channel.send(_tokens(request.id, token)),
                    lambda: run.cancelled,
                    run.accepted_at,
                    run,
                )
            end = Ended(request.id, run.with_times(finished))
        except FlexServeError as error:
            end = failed(error, request=request.id)
        except Exception as error:  # its text may quote a prompt: the type must do
            end = failed(EngineFailure(f"answering failed: {type(error).__name__}"), request=request.id)
        rest_ciphers()
        with self._lock:
            self._running = None
        self._runner.done(run)
        self._channel.send(end)


@dataclasses.dataclass(frozen=True)
class Licensed:
    """What an accepted licence gives: `state` is the device's new one."""

    model_key: bytes
    serial: int
    state: bytes
    adapter: SealedAdapter | None = None


def _tokens(request_id: str, token: Token) -> Tokens:
    return Tokens(request_id, token.id, token.text)


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def serve(channel: Channel, zygote: TemplateZygote, confine: Callable[[], Measures]) -> None:
    """Be the secure world until the channel closes. Raises `ChannelBroken`, `OSError`, `EngineFailure` for a mistake of
    ours."""
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
    if world.failed:
        raise EngineFailure("the secure world made a mistake")

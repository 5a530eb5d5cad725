"""The normal side of the linux world: a `World` whose work is done by another process.

Knows paths, ciphertext and how to start a process; holds no key and no plaintext weight. When the secure
process dies, whoever waits gets `WorldCrashed`, and the process is started again with the same models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...core import Budget, DeviceCopyInfo, Event, Finished, ModelInfo, Request, Token, WorldStatus
from ...errors import (
    Busy,
    EngineFailure,
    FlexServeError,
    InvalidRequest,
    ModelNotFound,
    ModelUnsupported,
    WorldCrashed,
)
from ...flexmem.processors import PROCESSORS
from ...framework.settings import Settings
from ...sealed import statefile
from ...sealed.trust import default_trust_dir
from ..base import RECALL_DEADLINE_S, ModelSource
from .calls import CALL_TIMEOUT_S, Calls
from .channel import (
    CallAnswer,
    Cancel,
    CannotSave,
    ChannelBroken,
    Configure,
    Ended,
    Failed,
    Generate,
    Offer,
    Ready,
    RecallAnswered,
    RecallBegan,
    RecallEnded,
    Reported,
    SavesWanted,
    Status,
    Tokens,
)
from .generation import LinuxGeneration
from .model_calls import ModelCalls
from .process import SecureProcess
from .recalling import LinuxRecalling, MemoryCalls, check_bytes
from .session_storage import SessionKeeper
from .starter import Starter
from .storage import Storage, given_away
from .users import become
from .workflows import WorkflowMethods

_Answer = TypeVar("_Answer")

MAX_IN_FLIGHT = 64
START_TIMEOUT_S = 120.0  # the passphrase of a key may have to be typed
RESTARTS_IN_A_ROW = 3  # without one answer in between


class _EndedDuringCall(WorldCrashed):
    """`WorldCrashed` for whoever had something in flight, not for who came later."""


class _EndedLoading(ModelUnsupported):
    """`ModelUnsupported` because the process ended, which may have had another reason."""


class _NotStarted(EngineFailure):
    """The process ended before it was ready, and gave no reason."""


class LinuxWorld(WorkflowMethods):
    """`worlds.base.World` on stock Linux. Thread-safe."""

    name = "linux"

    def __init__(
        self,
        device_key: str,
        *,
        vendor_pub: Path | None = None,
        trust_dir: Path | None = None,
        passphrase_file: Path | None = None,
        threads: int | None = None,
        load_workers: int | None = None,
        context_tokens: int | None = None,
        on_demand: bool = True,
        hardened: bool = True,
        session_dir: Path | None = None,
        session_bytes: int | None = None,
        settings: Settings | None = None,
        lazy: bool = True,
        prefetch: bool = True,
        pinned: Sequence[str] = (),
    ) -> None:
        """`device_key`: a path, or `credential:NAME`. `vendor_pub` replaces the trust store. `session_dir`: where
        conversations are saved, encrypted; None: nowhere. `session_bytes`: of memory for them; 0: keep none.

        `threads` compute (None: one for each processor), `load_workers` load (None: the usual number).
        `settings`: the Framework's; None: the usual, with three quarters of this machine's memory as budget.
        `lazy` off: idle weights are never handed to the kernel, whatever `settings` say; `prefetch` off: nothing is
        loaded for a request that has not come. `pinned`: names of models whose weights go last.
        `on_demand` off: no userfaultfd, models load fully before they compute. `hardened` off is for the
        tests that show what hardening is worth.
        """
        self._configure = Configure(
            device_key=device_key
            if device_key.startswith("credential:")
            else str(Path(device_key).absolute()),
            passphrase_file=None if passphrase_file is None else str(passphrase_file.absolute()),
            vendor_pub=None if vendor_pub is None else str(vendor_pub.absolute()),
            trust_dir=str((trust_dir or default_trust_dir()).absolute()),
            threads=threads or len(PROCESSORS),
            load_workers=load_workers,
            context_tokens=context_tokens,
            on_demand=on_demand,
            hardened=hardened,
            session_bytes=session_bytes,
            settings=settings,
            saves=session_dir is not None,
            lazy=lazy,
            prefetch=prefetch,
            pinned=tuple(pinned),
        )
        self._lock = threading.Condition()
        self._registering = threading.Lock()
        self._process: SecureProcess | None = None
        self._device_key_id = b""
        self._failure: FlexServeError | None = None  # why there is no secure world and will be none
        self._sources: dict[str, ModelSource] = {}
        self._refused: dict[str, FlexServeError] = {}  # registered once, but not after a restart
        self._suspects: set[str] = set()  # the process ended while it loaded them again
        self._answers: dict[str, LinuxGeneration] = {}
        self._calls = Calls()
        self._memory = MemoryCalls(self._call)
        self._restarts = 0
        self._restarts_in_a_row = 0
        self._serving = False  # the process runs and has its models
        self._closing = False
        self._thread: threading.Thread | None = None
        self._storage = Storage()
        self._models = ModelCalls(self._storage, self._state_path, self._call)
        self._state_directory: Path | None = None  # None: where this user keeps it
        self._starter: Starter | None = None
        self._keeper = (
            None if session_dir is None else SessionKeeper(session_dir, self._call, self._cannot_save)
        )

    # Two users: for a server that is started as root

    def start_through_another(self) -> None:
        """Have secure processes started by a process that stays root, since this one will not. Before `start`."""
        self._starter = Starter(self._configure)

    def leave_root(self, uid: int, gid: int) -> None:
        """Become this user for good, keeping what restarts need. After `start_through_another` and registering.

        Raises `EngineFailure`, `StorageFailure`.
        """
        assert self._starter is not None
        with self._registering:
            for source in self._sources.values():
                self._storage.keep(source)
            self._state_directory = given_away(self._state_path(), uid, gid)
            if self._keeper is not None:
                self._keeper.storage.give_away(uid, gid)
            become(uid, gid)

    def _state_path(self) -> Path:
        path = statefile.state_path(self._device_key_id)
        return path if self._state_directory is None else self._state_directory / path.name

    # The World protocol

    def start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closing:
                return
        self._begin()
        self._serving = True
        self._thread = threading.Thread(target=self._supervise, name="supervise", daemon=True)
        self._thread.start()
        if self._keeper is not None:
            self._keeper.offer(self._process)
            self._keeper.start()

    def register(self, source: ModelSource) -> ModelInfo:
        while True:
            with self._lock:
                process = self._running()  # before `_registering`, which a restart needs itself
            with self._registering:
                if process is not self._process:
                    continue  # it was started again meanwhile
                info = self._register(source, process)
                with self._lock:
                    self._sources[source.name] = source
                    self._refused.pop(source.name, None)
                return info

    def generate(self, request: Request) -> LinuxGeneration:
        generation = LinuxGeneration(request.id, self._cancel)
        with self._lock:
            process = self._running()
            if request.model in self._refused:
                raise self._refused[request.model]
            if request.model not in self._sources:
                raise ModelNotFound(f"no model {request.model!r} is registered")
            if request.id in self._answers:
                raise InvalidRequest(f"a request with id {request.id!r} is in flight already")
            if len(self._answers) >= MAX_IN_FLIGHT:
                raise Busy(f"{len(self._answers)} requests are in flight already")
            self._answers[request.id] = generation
        try:
            with contextlib.suppress(OSError):  # the process died: whoever supervises it ends this answer
                process.channel.send(Generate(request))
        except BaseException as error:  # it cannot be sent at all
            with self._lock:
                self._answers.pop(request.id, None)
            if isinstance(error, UnicodeEncodeError):
                raise InvalidRequest("the request has half a character (a lone surrogate)") from None
            raise
        return generation

    def recall(self, nbytes: int, *, deadline_s: float = RECALL_DEADLINE_S) -> LinuxRecalling:
        return self._memory.recall(nbytes, deadline_s)

    def offer(self, nbytes: int) -> None:
        check_bytes(nbytes)
        with self._lock:
            process = self._running()
        with contextlib.suppress(OSError):  # the process died: the next one has what it was configured with
            process.channel.send(Offer(nbytes))

    def budget(
        self, soft_bytes: int | None = None, hard_bytes: int | None = None, floor_bytes: int | None = None
    ) -> Budget:
        return self._memory.budget(soft_bytes, hard_bytes, floor_bytes)

    def trace(self, after: int = 0) -> list[str]:
        return self._memory.trace(after)

    def status(self) -> WorldStatus:
        status = self._call(Reported, Status).status
        return dataclasses.replace(status, restarts=self._restarts)

    def save_sessions(self) -> int:
        """Have all sessions saved that are not, where there is a place for them; how many were.

        Raises `StorageFailure`, `WorldCrashed`.
        """
        return 0 if self._keeper is None else self._keeper.save()

    def close(self) -> None:
        if self._keeper is not None and self._serving:
            self._keeper.finish()
        with self._lock:
            self._closing = True
            process = self._process
            self._lock.notify_all()
        if process is not None:
            process.channel.shut()
        if self._thread is not None:
            self._thread.join()
        if self._starter is not None:
            self._starter.close()
        self._storage.close()
        if self._keeper is not None:
            self._keeper.storage.close()

    @property
    def pid(self) -> int | None:
        """The secure process, while there is one."""
        with self._lock:
            return None if self._process is None else self._process.popen.pid

    # Talking to the process

    def _running(self) -> SecureProcess:
        """The process; waits while it is being started again. Call with the lock held."""
        if self._thread is None and not self._closing:
            raise EngineFailure("the world was not started")
        self._lock.wait_for(lambda: self._serving or self._closing or self._failure, CALL_TIMEOUT_S)
        if self._closing:
            raise WorldCrashed("the world is closed", hint="")
        if self._failure is not None:
            raise self._failure
        if not self._serving or self._process is None:
            raise WorldCrashed("the secure world does not start")
        return self._process

    def _call(
        self,
        kind: type[_Answer],
        make: Callable[[int], Any],
        descriptors: tuple[int, ...] = (),
        process: SecureProcess | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> _Answer:
        """Send a message and wait for its answer. Raises what the secure world says, or `WorldCrashed`."""
        with self._lock:
            process = process or self._running()
            if process is not self._process:
                raise WorldCrashed("the secure world has ended")
            number = self._calls.open()

        def send() -> None:
            with contextlib.suppress(OSError):  # the process died: the supervisor answers
                process.channel.send(make(number), descriptors)

        return self._calls.wait(number, kind, send, progress)

    def optimize(
        self, source: ModelSource, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> DeviceCopyInfo:
        """Make the device's own copy of a model, in execution layout, and put it at `out` when it is whole.

        `progress` gets (bytes done, bytes in total) in this thread. Raises what `register` raises, `Usage` where
        there is nothing to repack, `StorageFailure`; then `out` is as it was.
        """
        return self._models.optimize(source, out, progress)

    def _register(self, source: ModelSource, process: SecureProcess) -> ModelInfo:
        try:
            return self._models.register(source, process)
        except _EndedDuringCall as error:
            if self._closing:
                raise
            raise _EndedLoading(
                f"the secure world ended while it loaded {source.sealed}: {error.message}"
            ) from error

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            process = self._process
            if process is None or request_id not in self._answers:
                return
        with contextlib.suppress(OSError):
            process.channel.send(Cancel(request_id))

    # Supervision

    def _begin(self) -> None:
        """Start the process and configure it. Raises what keeps it from running."""
        if self._starter is None:
            process = SecureProcess(self._configure.hardened)
        else:
            process = SecureProcess(self._configure.hardened, starter=self._starter)
        timer = threading.Timer(START_TIMEOUT_S, process.popen.kill)
        timer.start()
        try:
            if self._starter is None:
                process.channel.send(self._configure)
            answer = process.channel.receive()
        except (OSError, ChannelBroken):
            answer = None
        finally:
            timer.cancel()
        if not isinstance(answer, Ready):
            how = process.end()
            if isinstance(answer, Failed):
                raise answer.error()
            raise _NotStarted(f"the secure world did not start ({how})")
        self._device_key_id = answer.device_key_id
        with self._lock:
            self._process = process
            if self._closing:  # `close` came while there was none to shut
                process.channel.shut()

    def _supervise(self) -> None:
        while True:
            process = self._process
            assert process is not None
            try:
                while (message := process.channel.receive()) is not None:
                    self._handle(message)
            except Exception:  # noqa: S110 - whatever it sent or did not: it is ended and started again
                pass
            how = process.end()
            with self._lock:
                self._process = None
                self._serving = False
            error = _EndedDuringCall(
                "the world was closed" if self._closing else f"the secure world ended unexpectedly ({how})",
                hint="" if self._closing else None,
            )
            self._end_all(error)
            if self._closing:
                return
            try:
                self._begin_again(how)
            except FlexServeError as failure:
                with self._lock:
                    self._failure = failure
                    self._lock.notify_all()
                return
            threading.Thread(
                target=self._register_again, args=(self._process,), name="register-again", daemon=True
            ).start()

    def _begin_again(self, how: str) -> None:
        """Start another process; `how` the last one ended. Raises what keeps it from running."""
        while True:
            self._restarts += 1
            self._restarts_in_a_row += 1
            if self._restarts_in_a_row > RESTARTS_IN_A_ROW:
                raise EngineFailure(
                    f"the secure world ended {self._restarts_in_a_row} times in a row ({how})"
                )
            try:
                return self._begin()
            except _NotStarted as error:  # killed before it was ready, maybe
                how = error.message

    def _register_again(self, process: SecureProcess) -> None:
        """Give the models to a fresh process; requests that arrive meanwhile wait in `_running`."""
        with self._registering:
            self._memory.set_again(process)
            if self._keeper is not None:
                with contextlib.suppress(FlexServeError):
                    self._keeper.offer(process)
            for name, source in list(self._sources.items()):
                if name in self._refused:
                    continue
                try:
                    self._register(source, process)
                except _EndedLoading as error:
                    # The model's fault or not: it gets a second chance, in the process that comes next.
                    if name in self._suspects:
                        with self._lock:
                            self._refused[name] = error
                    self._suspects.add(name)
                    return
                except FlexServeError as error:
                    if type(error) is WorldCrashed:
                        return  # it ended again, and whoever starts the next one begins anew
                    with self._lock:
                        self._refused[name] = error
                else:
                    self._suspects.discard(name)
            with self._lock:
                self._serving = process is self._process
                self._lock.notify_all()

    def _end_all(self, error: FlexServeError) -> None:
        with self._lock:
            answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            answer.push(error)
        self._memory.end_all(error)
        self._calls.end_all(error)

    def _handle(self, message: Any) -> None:
        match message:
            case Tokens(request_id, token, text):
                self._push(request_id, Token(token, text))
            case Ended(request_id, finished):
                self._restarts_in_a_row = 0
                self._push(request_id, finished)
            case Failed(id=str(request_id)):
                self._push(request_id, message.error())
            case Failed(call=int(call)):
                self._calls.reply(call, message.error())
            case RecallAnswered(call):
                self._memory.tell(message)
                self._calls.reply(call, message)
            case RecallBegan() | RecallEnded():
                self._memory.tell(message)
            case SavesWanted():
                if self._keeper is not None:
                    self._keeper.wanted()
            case _ if isinstance(message, CallAnswer):
                self._calls.reply(message.call, message)
            case _:
                raise ChannelBroken("the secure world sent a message out of turn")

    def _cannot_save(self) -> None:
        with self._lock:
            process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                process.channel.send(CannotSave())

    def _push(self, request_id: str, item: Event | FlexServeError) -> None:
        with self._lock:
            answer = self._answers.get(request_id)
            if isinstance(item, Finished | FlexServeError):
                self._answers.pop(request_id, None)
        if answer is not None:
            answer.push(item)

"""The channel between the worlds: typed messages over a socket pair, and descriptors beside them.

A frame is a 4-byte little-endian length and that many bytes of MessagePack, decoded against the union of the
messages the other side may send: whatever does not fit exactly is refused, and ends the channel. Descriptors
travel with the first byte of the message that announces them (SCM_RIGHTS).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections import deque
from typing import Annotated, Any

import msgspec

from ...core import (
    MAX_WORKFLOW_STEPS,
    Budget,
    DeviceCopyInfo,
    Finished,
    ModelInfo,
    Request,
    WorkflowReport,
    WorldStatus,
)
from ...errors import EngineFailure, FlexServeError, by_code
from ...framework.settings import Settings
from ..base import MAX_ADAPTER_SCALE

MAX_FRAME = 64 << 20
MAX_WORKFLOW_BYTES = 8 << 20
MAX_DESCRIPTORS = 5  # of one message: a model and its copy, both past the page cache too, and an adapter
_LENGTH = struct.Struct("<I")

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class _Message(msgspec.Struct, forbid_unknown_fields=True, array_like=True, tag=True):
    """Base of all messages; the class's name is the tag."""


# Normal world to secure world


class Configure(_Message):
    """The first message: where the secure world finds its own key and trust, and how to compute."""

    device_key: Text
    passphrase_file: Text | None
    vendor_pub: Text | None
    trust_dir: Text
    threads: int
    context_tokens: int | None
    on_demand: bool
    hardened: bool
    session_bytes: int | None = (
        None  # of memory for sessions between their turns; None: the usual, 0: keep none
    )
    settings: Settings | None = None  # the Framework's; None: the usual, its limits by this machine's memory
    saves: bool = False  # there is a storage for sessions
    load_workers: int | None = None  # None: the usual number
    lazy: bool = True  # idle weights are handed to the kernel, unless the Framework's settings say otherwise
    prefetch: bool = True  # the same: what the next request needs is loaded before it comes
    pinned: tuple[Text, ...] = ()  # models whose weights go last, beside those in the settings


class AdapterUse(msgspec.Struct, forbid_unknown_fields=True, array_like=True):
    """A LoRA adapter's licence, and how much of it is added."""

    licence: bytes
    scale: Annotated[float, msgspec.Meta(ge=-MAX_ADAPTER_SCALE, le=MAX_ADAPTER_SCALE)]


class Register(_Message):
    """Make a model ready. Descriptors: the sealed file through the page cache and, maybe, past it; then the same of
    the device's own copy: none where there is no such file. None: do not speak of copies. Then the adapter's file."""

    call: int
    name: Text
    licence: bytes
    state: bytes | None
    descriptors: int
    copy_descriptors: int | None = None
    adapter: AdapterUse | None = None


class Optimize(_Message):
    """Make the device's own copy of a model. Descriptors: the sealed file, and an empty one for the copy."""

    call: int
    licence: bytes
    state: bytes | None


class Generate(_Message):
    """Answer a request; everything about it then carries `request.id`."""

    request: Request


class Cancel(_Message):
    """Stop a request that waits or runs."""

    id: Text


class Recall(_Message):
    """Give back up to `nbytes` (rsmem_reclaim)."""

    call: int
    nbytes: int
    deadline_s: Seconds


class Offer(_Message):
    """Hold `nbytes` more (rsmem_alloc)."""

    nbytes: int


class SetBudget(_Message):
    """Set limits; None leaves one as it is."""

    call: int
    soft_bytes: int | None
    hard_bytes: int | None
    floor_bytes: int | None


class Trace(_Message):
    """Tell of the Framework's events above this number."""

    call: int
    after: int


class Status(_Message):
    """Report."""

    call: int


class OfferSession(_Message):
    """Know of a saved session, if it is this device's. Descriptor: its file."""

    call: int


class SaveSession(_Message):
    """Save the next session that is to be saved. Descriptor: an empty file. `everything`: also one that is not."""

    call: int
    everything: bool = False


class OfferWorkflows(_Message):
    """Go on with a saved workflow log, if it is this device's."""

    call: int
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_WORKFLOW_BYTES)]


class SaveWorkflows(_Message):
    """Seal the workflow log, if it has changed since it was sealed last."""

    call: int


class Workflows(_Message):
    """Report what is known of workflows."""

    call: int


class DeclareWorkflow(_Message):
    """A client says which models it will ask, one after the other."""

    call: int
    client: Text | None
    name: Text
    models: Annotated[list[Text], msgspec.Meta(min_length=2, max_length=MAX_WORKFLOW_STEPS)]


class ForgetWorkflows(_Message):
    """Forget one workflow, those of a client, those of the clients that gave no name (`anonymous`), or all."""

    call: int
    client: Text | None
    anonymous: bool
    id: Text | None


class CannotSave(_Message):
    """The storage has no room, or refuses."""


# Secure world to normal world


class Measures(_Message):
    """What the secure process did to itself, as far as it cannot be seen from outside (doctor)."""

    landlock: int = 0  # the kernel's version of it; 0: not used
    file_refused: bool = False  # opening a file was tried, in vain
    memory_locked: bool = False  # none of its pages is ever swapped
    secret_memory: bool = False  # keys at rest are in memfd_secret


class Ready(_Message):
    """The answer to `Configure`."""

    device_key_id: bytes
    flexmem: str
    measures: Measures = msgspec.field(default_factory=Measures)


class Registered(_Message):
    """The answer to `Register`; `state` is to be stored."""

    call: int
    info: ModelInfo
    state: bytes


class Progressed(_Message):
    """So much of a call is done; its answer is still to come."""

    call: int
    done: int
    total: int


class Optimized(_Message):
    """The answer to `Optimize`; `state` is to be stored."""

    call: int
    copy: DeviceCopyInfo
    state: bytes


class Tokens(_Message):
    """One token of an answer."""

    id: Text
    token: int
    text: str


class Ended(_Message):
    """The end of an answer."""

    id: Text
    finished: Finished


class Failed(_Message):
    """A request (by id) or a call (by number; 0 is `Configure`) ended with an error."""

    id: Text | None
    call: int | None
    code: Text
    message: str
    hint: str

    def error(self) -> FlexServeError:
        """The exception it stands for."""
        return by_code(self.code)(self.message, hint=self.hint)


class RecallAnswered(_Message):
    """The answer to `Recall`: so much will be given back, `later_bytes` of it when it is saved."""

    call: int
    chosen_bytes: int
    later_bytes: int


class RecallBegan(_Message):
    """The first bytes of a recall are back."""

    call: int


class RecallEnded(_Message):
    """All bytes that a recall chose are back."""

    call: int
    freed_bytes: int


class SavesWanted(_Message):
    """Sessions are to be saved, or files of saved ones not needed any more."""


class BudgetReported(_Message):
    """The answer to `SetBudget`."""

    call: int
    budget: Budget


class Traced(_Message):
    """The answer to `Trace`: JSON lines."""

    call: int
    lines: list[str]


class Reported(_Message):
    """The answer to `Status`."""

    call: int
    status: WorldStatus


class SessionOffered(_Message):
    """The answer to `OfferSession`: whether it is believed."""

    call: int
    believed: bool


class SessionSaved(_Message):
    """The answer to `SaveSession`: the file's id, None when there is nothing to save; and ids of files that are not
    needed any more."""

    call: int
    id: bytes | None
    gone: list[bytes]


class WorkflowsOffered(_Message):
    """The answer to `OfferWorkflows`: why the log is not believed; empty: it is."""

    call: int
    why: str


class WorkflowsSaved(_Message):
    """The answer to `SaveWorkflows`; None: it is as it was."""

    call: int
    data: bytes | None


class WorkflowsReported(_Message):
    """The answer to `Workflows`."""

    call: int
    report: WorkflowReport


class WorkflowsForgotten(_Message):
    """The answer to `ForgetWorkflows`, and with 0 to `DeclareWorkflow`."""

    call: int
    count: int


ToSecure = (
    Configure
    | Register
    | Optimize
    | Generate
    | Cancel
    | Recall
    | Offer
    | SetBudget
    | Trace
    | Status
    | OfferSession
    | SaveSession
    | OfferWorkflows
    | SaveWorkflows
    | Workflows
    | DeclareWorkflow
    | ForgetWorkflows
    | CannotSave
)
CallAnswer = (
    Registered
    | Progressed
    | Optimized
    | RecallAnswered
    | BudgetReported
    | Traced
    | Reported
    | SessionOffered
    | SessionSaved
    | WorkflowsOffered
    | WorkflowsSaved
    | WorkflowsReported
    | WorkflowsForgotten
)
ToNormal = Ready | Tokens | Ended | Failed | RecallBegan | RecallEnded | SavesWanted | CallAnswer


def failed(error: FlexServeError, *, request: str | None = None, call: int | None = None) -> Failed:
    """An error as a message."""
    return Failed(request, call, error.code, error.message[:4000], error.hint[:4000])


class ChannelBroken(EngineFailure):
    """The other side sent something that is no message."""

    code = "channel_broken"


class Channel:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        """`incoming`: the union of messages the other side may send."""
        self._sock = sock
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()
        self._descriptors: deque[int] = deque()
        self._buffer = bytearray()

    def send(self, message: _Message, descriptors: tuple[int, ...] = ()) -> None:
        """Raises `OSError` when the other side is gone."""
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME:
            raise ChannelBroken(f"a message of {len(body)} bytes is too long")
        frame = memoryview(_LENGTH.pack(len(body)) + body)
        with self._sending:
            if descriptors:
                sent = socket.send_fds(self._sock, [frame], list(descriptors))
                frame = frame[sent:]
            self._sock.sendall(frame)

    def receive(self) -> Any:
        """The next message; None when the other side has closed. Raises `ChannelBroken`."""
        head = self._take(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > MAX_FRAME:
            raise ChannelBroken(f"the other world announces a message of {length} bytes")
        body = self._take(length)
        if body is None:
            return None
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError, MemoryError, FlexServeError) as error:
            raise ChannelBroken(f"the other world sent no valid message: {type(error).__name__}") from None

    def take_descriptors(self, count: int) -> list[int]:
        """The descriptors that came with the message just received. Raises `ChannelBroken`."""
        if not 0 <= count <= len(self._descriptors):
            raise ChannelBroken("the other world sent fewer descriptors than announced")
        return [self._descriptors.popleft() for _ in range(count)]

    def _take(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            try:
                data, fds, flags, _ = socket.recv_fds(self._sock, 1 << 18, MAX_DESCRIPTORS)
            except ConnectionError:
                return None
            for fd in fds:
                os.set_inheritable(fd, False)
            self._descriptors.extend(fds)
            if flags & socket.MSG_CTRUNC or len(self._descriptors) > 4 * MAX_DESCRIPTORS:
                raise ChannelBroken("the other world sent too many descriptors")
            if not data:
                return None
            self._buffer += data
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def shut(self) -> None:
        """End both directions: whoever receives gets None."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
        while self._descriptors:  # that nobody asked for
            os.close(self._descriptors.popleft())

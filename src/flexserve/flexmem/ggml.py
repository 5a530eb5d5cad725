"""Python's side of ggml_arena.c: a ggml buffer type over an arena, and the check that it fits this ggml.

Knows ggml's functions and the image offsets of a model's tensors; knows nothing of segments or keys.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.metadata
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EngineIncompatible
from . import uffd

PINNED_BINDING = "0.3.36"
_redirecting = threading.Lock()


class _Api(ctypes.Structure):
    _fields_ = (
        ("buffer_init", ctypes.c_void_p),
        ("tensor_name", ctypes.c_void_p),
        ("tensor_nbytes", ctypes.c_void_p),
        ("data_at", ctypes.c_size_t),
    )


class _InitParams(ctypes.Structure):  # struct ggml_init_params, public
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def ggml_base() -> Any:
    """ggml as llama.cpp uses it, with the prototypes used here.

    Found through libllama: the wheel has a copy of each library under every name, and `libggml-base.so` would be
    a second ggml, with buffer types of its own.
    """
    import llama_cpp

    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libllama.so"))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_1d", pointer, [pointer, ctypes.c_int, ctypes.c_int64]),
        ("ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 4]),
        ("ggml_set_name", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_get_name", pointer, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_version", ctypes.c_char_p, []),
        ("ggml_commit", ctypes.c_char_p, []),
        ("ggml_backend_cpu_buffer_type", pointer, []),
        ("ggml_backend_buft_alloc_buffer", pointer, [pointer, size]),
        ("ggml_backend_dev_by_type", pointer, [ctypes.c_int]),
        ("ggml_backend_dev_backend_reg", pointer, [pointer]),
        ("ggml_backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        ("ggml_backend_buffer_get_base", pointer, [pointer]),
        ("ggml_backend_buffer_get_size", size, [pointer]),
        ("ggml_backend_buffer_get_alignment", size, [pointer]),
        ("ggml_backend_buffer_is_host", ctypes.c_bool, [pointer]),
        ("ggml_backend_buffer_get_type", pointer, [pointer]),
        ("ggml_backend_buffer_free", None, [pointer]),
        ("ggml_backend_buft_name", ctypes.c_char_p, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
        ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@cache
def _native() -> Any:
    """Our own shared object."""
    here = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = here / f"_ggml_arena{suffix}"
        if path.exists():
            break
    else:
        raise EngineIncompatible("FlexServe's C part is not built")
    lib = ctypes.CDLL(str(path))
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    for name, result, arguments in (
        ("flex_type_new", pointer, [ctypes.c_char_p, pointer, ctypes.POINTER(_Api), ctypes.c_size_t]),
        ("flex_type_place", None, [pointer, ctypes.c_char_p, ctypes.c_uint32, u64, u64]),
        ("flex_type_sort", None, [pointer]),
        ("flex_type_loaded", None, [pointer]),
        ("flex_type_seen", ctypes.c_size_t, [pointer]),
        ("flex_type_has_seen", ctypes.c_int, [pointer, ctypes.c_char_p, ctypes.c_uint32]),
        ("flex_redirect", ctypes.c_int, [pointer, pointer, pointer]),
        ("flex_redirect_end", None, []),
        ("flex_remember", ctypes.c_int, [pointer, ctypes.POINTER(_Api)]),
        ("flex_remember_end", None, []),
        ("flex_type_free", ctypes.c_int, [pointer]),
        ("flex_skeleton_open", pointer, [pointer, u64, u64]),
        ("flex_skeleton_close", ctypes.c_int, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


class AbortFlag:
    """A flag that llama.cpp looks at while it computes: setting it ends a decode early."""

    def __init__(self) -> None:
        self._value = ctypes.c_int(0)
        self.address = ctypes.addressof(self._value)
        self.callback = _address(_native().flex_flag_is_set)

    def set(self, value: bool = True) -> None:
        self._value.value = int(value)


def _api() -> _Api:
    return _Api(
        _address(ggml_base().ggml_backend_buffer_init),
        _address(ggml_base().ggml_get_name),
        _address(ggml_base().ggml_nbytes),
        _data_offset(),
    )


@contextmanager
def giving_back() -> Iterator[None]:
    """Within the block, make one llama.cpp context, or load an adapter. What a context remembers then takes memory only
    for the tokens that are there, and gives it back, zeroed, when it is cleared; an adapter does when it is freed.
    Nothing else may allocate a ggml buffer meanwhile."""
    with _redirecting:
        if _native().flex_remember(ggml_base().ggml_backend_cpu_buffer_type(), ctypes.byref(_api())) != 0:
            raise AssertionError("two contexts are being made at once")
        try:
            yield
        finally:
            _native().flex_remember_end()


class Place(NamedTuple):
    """Where a tensor goes: bytes in the image. `repacked`: for ggml's repacked kernels (repack.py)."""

    tensor: str
    image_offset: int
    length: int
    repacked: bool = False


class ArenaBufferType:
    """A ggml buffer type that puts each named tensor at `base` + its image offset.

    `handle` goes into llama.cpp's tensor_buft_overrides. Keep the object until the model is freed, then
    `close` it.
    """

    def __init__(self, name: str, base: int, places: Iterable[Place | tuple[str, int, int]]) -> None:
        """`name` must be unique in this process. A tuple is a `Place` that is not repacked."""
        rows = [Place(*place) for place in places]
        handle = _native().flex_type_new(name.encode(), base, ctypes.byref(_api()), len(rows))
        if not handle:
            raise MemoryError
        self.handle = int(handle)
        self.tensors = len(rows)
        for tensor, offset, nbytes, repacked in rows:
            _native().flex_type_place(handle, tensor.encode(), repacked, offset, nbytes)
        _native().flex_type_sort(handle)

    def loaded(self) -> int:
        """End the load: from now on this is host memory. Returns how many tensors were placed."""
        _native().flex_type_loaded(self.handle)
        return int(_native().flex_type_seen(self.handle))

    def has_seen(self, tensor: str, *, repacked: bool) -> bool:
        """Whether llama.cpp asked for this place."""
        return bool(_native().flex_type_has_seen(self.handle, tensor.encode(), repacked))

    @contextmanager
    def redirected(self, donor: int) -> Iterator[None]:
        """Within the block, llama.cpp's own buffer types put weights where this one does.

        For a model in execution layout: llama.cpp then chooses the tensors to repack as it always does. `donor`
        is a buffer of the repacking type. Nothing else may allocate a ggml buffer meanwhile.
        """
        with _redirecting:
            if _native().flex_redirect(self.handle, ggml_base().ggml_backend_cpu_buffer_type(), donor) != 0:
                raise AssertionError("two models are loading at once")
            try:
                yield
            finally:
                _native().flex_redirect_end()

    def close(self) -> None:
        """Free it; every buffer of the type must be gone."""
        if self.handle:
            if _native().flex_type_free(self.handle) != 0:
                raise AssertionError("a model still uses this buffer type")
            self.handle = 0


class Skeleton:
    """A C FILE with a GGUF header's bytes and the whole model's size, but no data: it is read as anything."""

    def __init__(self, header: bytes | bytearray, size: int) -> None:
        """A `bytearray` is not copied, and zeroed at the end; with the whole file in it, nothing is missing."""
        self._header = (
            (ctypes.c_char * len(header)).from_buffer(header)
            if isinstance(header, bytearray)
            else ctypes.create_string_buffer(header, len(header))
        )
        self.file = _native().flex_skeleton_open(ctypes.addressof(self._header), len(header), size)
        if not self.file:
            raise MemoryError

    def __enter__(self) -> Skeleton:
        return self

    def __exit__(self, *_: object) -> None:
        _native().flex_skeleton_close(self.file)
        ctypes.memset(self._header, 0, len(self._header))


@cache
def _data_offset() -> int:
    """Where ggml_tensor keeps `data`: found by looking, since a wrong guess would corrupt memory."""
    base = ggml_base()
    memory = ctypes.create_string_buffer(4096)
    context = base.ggml_init(_InitParams(len(memory), ctypes.addressof(memory), False))
    tensor = base.ggml_new_tensor_1d(context, 0, 8)
    data = base.ggml_get_data(tensor)
    words = (ctypes.c_uint64 * 40).from_address(tensor)
    hits = [i * 8 for i, word in enumerate(words) if word == data]
    base.ggml_free(context)
    if len(hits) != 1:
        raise EngineIncompatible("cannot find the data field of ggml_tensor in this ggml")
    return hits[0]


def self_test() -> None:
    """Check our declarations of ggml's internal structures against the loaded library.

    Raises `EngineIncompatible` naming what differs. Called once at start-up, before any model is loaded.
    """
    found = importlib.metadata.version("llama-cpp-python")
    if found != PINNED_BINDING:
        raise EngineIncompatible(
            f"llama-cpp-python {found} is installed, this FlexServe needs {PINNED_BINDING}"
        )
    base = ggml_base()
    length = 1 << 16
    address = uffd.reserve(length)
    buft = ArenaBufferType("flexmem-self-test", address, [Place("one", 128, 64), Place("two", 4096, 32)])
    context = base.ggml_init(_InitParams(1 << 14, None, True))
    try:
        tensors = []
        for name, count in (("one", 16), ("two", 8)):
            tensor = base.ggml_new_tensor_1d(context, 0, count)
            base.ggml_set_name(tensor, name.encode())
            tensors.append(tensor)
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, buft.handle)
        word = ctypes.create_string_buffer(b"flexserve-check-")
        got = ctypes.create_string_buffer(16)
        checks = {"alloc_buffer": bool(buffer)}
        if buffer:
            checks["get_base"] = base.ggml_backend_buffer_get_base(buffer) == address
            checks["get_alignment"] = base.ggml_backend_buffer_get_alignment(buffer) == 64
            checks["size"] = base.ggml_backend_buffer_get_size(buffer) >= 96
            checks["type"] = base.ggml_backend_buffer_get_type(buffer) == buft.handle
            checks["get_name"] = base.ggml_backend_buft_name(buft.handle) == b"flexmem-self-test"
            checks["init_tensor"] = [base.ggml_get_data(t) for t in tensors] == [
                address + 128,
                address + 4096,
            ]
            checks["not host while loading"] = not base.ggml_backend_buffer_is_host(buffer)
            base.ggml_backend_tensor_set(tensors[0], word, 0, 16)
            checks["set_tensor drops"] = ctypes.string_at(address + 128, 16) == bytes(16)
            ctypes.memmove(address + 4096, word, 16)
            base.ggml_backend_tensor_get(tensors[1], got, 0, 16)
            checks["get_tensor"] = got.raw == word.raw[:16]
            checks["all placed"] = buft.loaded() == 2
            checks["host after loading"] = bool(base.ggml_backend_buffer_is_host(buffer))
            base.ggml_backend_buffer_free(buffer)
        wrong = [name for name, ok in checks.items() if not ok]
        if wrong:
            raise EngineIncompatible(
                f"this ggml differs from the one FlexServe was written for: {', '.join(wrong)}"
            )
        buft.close()
    finally:
        base.ggml_free(context)
        uffd.release(address, length)

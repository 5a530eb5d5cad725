"""What ggml repacks, and that rows repacked a few at a time are the whole matrix repacked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexserve.errors import ModelUnsupported
from flexserve.flexmem import ggml, repack
from flexserve.flexmem.ggml import ggml_base

pytestmark = pytest.mark.skipif(
    repack.why_not() is not None, reason="llama.cpp repacks nothing on this processor"
)
F32, F16, Q4_0, Q4_K, IQ4_NL = 0, 1, 2, 12, 20


def repacked(kind: int, elements: int, rows: int, data: bytes) -> bytes:
    repacker = repack.Repacker(kind, elements, rows)
    out = bytearray(repacker.nbytes)
    repacker.repack(memoryview(bytearray(data)), memoryview(out))
    repacker.close()
    return bytes(out)


def weights(kind: int, elements: int, rows: int) -> bytes:
    repacker = repack.Repacker(kind, elements, rows)
    data = random.Random(rows).randbytes(repacker.nbytes)
    repacker.close()
    return data


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([Q4_0, Q4_K, IQ4_NL]),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 40).map(lambda n: 8 * n),
    chunk=st.integers(1, 3).map(lambda n: n * repack.CHUNK_ROWS),
)
def test_rows_in_chunks_are_the_whole_matrix(kind: int, blocks: int, rows: int, chunk: int) -> None:
    elements = 256 * blocks
    data = weights(kind, elements, rows)
    row = len(data) // rows
    pieces = [
        repacked(kind, elements, min(chunk, rows - at), data[at * row : (at + chunk) * row])
        for at in range(0, rows, chunk)
    ]
    whole = repacked(kind, elements, rows, data)
    assert b"".join(pieces) == whole


def test_repacking_changes_the_bytes() -> None:
    data = weights(Q4_0, 256, 64)
    assert repacked(Q4_0, 256, 64, data) != data


def test_what_has_no_kernels_is_not_repacked() -> None:
    assert not repack.repacks(F32, 256, 64)
    assert not repack.repacks(F16, 256, 64)
    assert not repack.repacks(Q4_0, 256, 3)
    assert not repack.repacks(Q4_0, 256, 0)
    with pytest.raises(ModelUnsupported, match="3 rows"):
        repack.Repacker(Q4_0, 256, 3)


def test_the_engine_names_itself_the_same_every_time() -> None:
    assert repack.this_engine() == repack.this_engine.__wrapped__()
    assert len(repack.this_engine().engine) <= 64
    assert len(repack.this_engine().layout_digest) == 32


def test_llama_cpps_own_buffers_are_its_own_again_after_a_load_that_failed() -> None:
    base = ggml_base()
    buffer_type = ggml.ArenaBufferType("flexmem-redirected", 1 << 40, [ggml.Place("one", 0, 64)])

    def base_of_new_buffer() -> int:
        buffer = base.ggml_backend_buft_alloc_buffer(base.ggml_backend_cpu_buffer_type(), 4096)
        address = int(base.ggml_backend_buffer_get_base(buffer))
        host = bool(base.ggml_backend_buffer_is_host(buffer))
        base.ggml_backend_buffer_free(buffer)
        assert host == (address != 1 << 40)
        return address

    with (
        pytest.raises(RuntimeError, match="as it fails"),
        repack.donor() as donor,
        buffer_type.redirected(donor),
    ):
        assert base_of_new_buffer() == 1 << 40
        raise RuntimeError("as it fails")
    assert base_of_new_buffer() != 1 << 40
    assert repack.repacks(Q4_0, 256, 64)
    buffer_type.close()

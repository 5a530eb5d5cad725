from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexserve.errors import SealedMalformed
from flexserve.sealed.format import (
    Description,
    Manifest,
    RegionKind,
    TensorExtent,
    decode_manifest,
    decode_name,
    encode_manifest,
    encode_name,
    is_name,
    plan,
)
from flexserve.sealed.reader import SegmentTable

pages = st.integers(0, 2000).map(lambda n: n * 4096)


def manifest_for(meta: int, embed: int, body: int, tensors: tuple[TensorExtent, ...]) -> Manifest:
    layout = plan(meta, embed, body, len(tensors))
    return Manifest(
        vendor_key_id=b"v" * 32,
        vendor_point=b"p" * 64,
        model_id="m",
        model_version=1,
        sealing_id=b"s" * 16,
        sealed_at=0,
        gguf_bytes=meta,
        description=Description("llama", "Q8_0", 1, 1, 0, tied_output=True, has_chat_template=False),
        key_commitment=b"c" * 32,
        vendor_wrap=b"w" * 113,
        plan=layout,
        tensors=tensors,
        segment_table=bytes(48 * layout.segment_count),
    )


@given(st.integers(1, 64 << 20), pages, pages.filter(bool), st.integers(1, 50))
def test_a_plan_is_aligned_contiguous_and_its_own_inverse(
    meta: int, embed: int, body: int, count: int
) -> None:
    layout = plan(meta, embed, body, count)
    body_offset = layout.regions[2].image_offset
    tensors = tuple(TensorExtent(body_offset + 64 * i, 64) for i in range(min(count, body // 64)))
    manifest = manifest_for(meta, embed, body, tensors)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    end = layout.data_offset
    for region in layout.regions:
        assert region.file_offset == end
        assert region.file_offset % 4096 == 0
        assert 0 <= region.segment_count * region.unit_bytes - region.length < region.unit_bytes
        end += region.padded_bytes
    assert end == layout.file_bytes
    assert body_offset % (1 << 20) == 0
    assert embed <= body_offset
    assert layout.image_bytes == body_offset + body


@given(st.integers(1, 3 << 20), pages, pages.filter(bool), st.data())
def test_every_byte_of_the_image_belongs_to_the_segment_that_arithmetic_says(
    meta: int, embed: int, body: int, data: st.DataObject
) -> None:
    layout = plan(meta, embed, body, 1)
    table = SegmentTable(layout)
    region = data.draw(st.sampled_from([r for r in layout.regions[1:] if r.length]))
    at = region.image_offset + data.draw(st.integers(0, region.length - 1))
    segment = table[region.first_segment + (at - region.image_offset) // region.unit_bytes]
    assert segment.kind is region.kind
    assert segment.image_offset <= at < segment.image_offset + segment.length
    assert segment.file_offset - region.file_offset == segment.image_offset - region.image_offset


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 40000)), min_size=1, max_size=6))
def test_a_tensor_map_is_accepted_only_if_no_two_tensors_touch_and_all_lie_in_their_region(
    drawn: list[tuple[int, int]],
) -> None:
    embed, body = 8192, 16384
    body_offset = 1 << 20
    starts = [n * 64 if n < 200 else body_offset + (n - 200) * 64 for n, _ in drawn]
    tensors = tuple(TensorExtent(start, length) for start, (_, length) in zip(starts, drawn, strict=True))
    used: set[int] = set()
    fine = True
    for start, length in tensors:
        here = set(range(start, start + length))
        inside = start + length <= embed or (start >= body_offset and start + length <= body_offset + body)
        fine = fine and length > 0 and inside and not here & used
        used |= here
    data = encode_manifest(manifest_for(1, embed, body, tensors))
    if fine:
        assert decode_manifest(data).tensors == tensors
    else:
        with pytest.raises(SealedMalformed, match="tensor"):
            decode_manifest(data)


@given(st.text(max_size=70))
def test_names_survive_their_field_and_nothing_else_passes(text: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    right = 1 <= len(text) <= 64 and set(text) <= allowed and text[0] not in "._-"
    assert is_name(text) == right
    if right:
        assert decode_name(encode_name(text)) == text


@pytest.mark.parametrize(
    "field", [b"", bytes(64), b"a\0b".ljust(64, b"\0"), b"a\n".ljust(64, b"\0"), b"\xe9" * 64]
)
def test_fields_that_are_no_names_are_told(field: bytes) -> None:
    assert decode_name(field) is None


def test_flags_are_kept_and_an_image_without_embedding_starts_with_its_body() -> None:
    manifest = manifest_for(10, 0, 4096, (TensorExtent(0, 64),))
    swapped = replace(
        manifest,
        description=replace(manifest.description, tied_output=False, has_chat_template=True),
    )
    for m in (manifest, swapped):
        assert decode_manifest(encode_manifest(m)).description == m.description
    assert manifest.region(RegionKind.BODY).image_offset == 0

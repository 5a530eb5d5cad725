"""Opens a sealed model: signature first, then everything else, then segments one by one.

Knows which bytes are authentic and when. Does not know where a model key comes from (licence.py) nor what
the plaintext means (gguf.py). After `SealedModel.open` no size or offset is taken from the file again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Sequence
from typing import NamedTuple, overload

from cryptography.exceptions import InvalidTag

from ..errors import (
    KeyProblem,
    LicenceNotAuthentic,
    ManifestNotAuthentic,
    SealedMalformed,
    SealedTruncated,
    SegmentNotAuthentic,
    StorageFailure,
    VendorNotTrusted,
)
from .crypto import SIGNATURE_BYTES, TAG_BYTES, SegmentCipher, commits_to, id_of
from .format import (
    PREFIX,
    SEGMENT_ENTRY_BYTES,
    Manifest,
    Plan,
    Prefix,
    Region,
    RegionKind,
    SegmentRef,
    decode_manifest,
    decode_prefix,
    encode_name,
)
from .keys import VendorPublicKey


def pread_exact(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `fd` at `offset`, through short reads.

    Raises `SealedTruncated` at the end of the file, `StorageFailure` when the read fails.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise StorageFailure(
                f"cannot read the sealed model at {offset + done}: {error.strerror}"
            ) from error
        if count == 0:
            raise SealedTruncated(f"the sealed model ends at byte {offset + done}: it became shorter")
        done += count


class SegmentTable(Sequence[SegmentRef]):
    """Where every segment is, computed when asked."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return self._plan.segment_count

    @overload
    def __getitem__(self, index: int) -> SegmentRef: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SegmentRef]: ...
    def __getitem__(self, index: int | slice) -> SegmentRef | Sequence[SegmentRef]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        for region in self._plan.regions:
            if 0 <= index - region.first_segment < region.segment_count:
                start = (index - region.first_segment) * region.unit_bytes
                return SegmentRef(
                    index,
                    region.kind,
                    region.file_offset + start,
                    min(region.unit_bytes, region.padded_bytes - start),
                    region.image_offset + start,
                )
        raise IndexError(f"segment {index} of {len(self)}")


class SignedManifest(NamedTuple):
    """A manifest whose signature fits the key it names. Whose key that is, is another question."""

    manifest: Manifest
    digest: bytes
    vendor: VendorPublicKey


def read_manifest(fd: int) -> SignedManifest:
    """Read a manifest and check its signature against the key inside it: for `inspect`, which trusts nobody.

    Raises `SealedMalformed`, `SealedTruncated`, `ManifestNotAuthentic`, `StorageFailure`.
    """
    prefix = _read_prefix(fd)
    return _read_signed(fd, prefix, _embedded_key(prefix))


def _read_prefix(fd: int) -> Prefix:
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise StorageFailure(f"cannot read the sealed model: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise SealedMalformed("the sealed model is not a regular file")
    data = bytearray(min(PREFIX.size, info.st_size))
    pread_exact(fd, memoryview(data), 0)
    return decode_prefix(bytes(data), info.st_size)


def _embedded_key(prefix: Prefix) -> VendorPublicKey:
    if id_of(prefix.vendor_point) != prefix.vendor_key_id:
        raise SealedMalformed("the sealed model's vendor_key_id is not the id of its vendor_key")
    try:
        return VendorPublicKey.from_point(prefix.vendor_point)
    except KeyProblem:
        raise SealedMalformed("the sealed model's vendor_key is not a point of P-256") from None


def _read_signed(fd: int, prefix: Prefix, vendor: VendorPublicKey) -> SignedManifest:
    data = bytearray(prefix.data_offset)
    pread_exact(fd, memoryview(data), 0)
    end = prefix.manifest_bytes + SIGNATURE_BYTES
    message = bytes(data[: prefix.manifest_bytes])
    if not vendor.signed(bytes(data[prefix.manifest_bytes : end]), message):
        raise ManifestNotAuthentic(f"the signature of vendor {vendor.key_id.hex()} does not fit the manifest")
    if any(data[end:]):
        raise SealedMalformed("the sealed model has bytes between its signature and its data")
    manifest = decode_manifest(message)
    return SignedManifest(manifest, hashlib.sha256(message).digest(), vendor)


class SealedModel:
    """An authentic sealed model from a trusted vendor, still encrypted.

    Keeps `fd` (the caller closes it) for `UnlockedModel.gguf_header` only.
    """

    def __init__(self, fd: int, signed: SignedManifest) -> None:
        """Use `SealedModel.open`."""
        self.fd = fd
        self.manifest = signed.manifest
        self.digest = signed.digest
        self.vendor = signed.vendor
        self.segments: Sequence[SegmentRef] = SegmentTable(signed.manifest.plan)

    @classmethod
    def open(cls, fd: int, trusted: Collection[VendorPublicKey]) -> SealedModel:
        """Check everything that can be checked without a key.

        Raises `SealedMalformed`, `SealedTruncated`, `VendorNotTrusted`, `ManifestNotAuthentic`,
        `StorageFailure`. Source: docs/sealed-format.md, "Reading a sealed model", steps 1 to 4.
        """
        prefix = _read_prefix(fd)
        vendor = _embedded_key(prefix)
        if vendor not in trusted:
            raise VendorNotTrusted(f"the model is signed by vendor {vendor.key_id.hex()}, who is not trusted")
        # The key that verifies is the trusted one, not the file's, although they are equal by now.
        trusted_vendor = next(key for key in trusted if key == vendor)
        return cls(fd, _read_signed(fd, prefix, trusted_vendor))

    def region(self, kind: RegionKind) -> Region:
        return self.manifest.region(kind)

    def unlock(self, model_key: bytes) -> UnlockedModel:
        """Raises `LicenceNotAuthentic` when the key is not the one the manifest commits to."""
        m = self.manifest
        if not commits_to(m.key_commitment, model_key, m.sealing_id):
            raise LicenceNotAuthentic(f"the key in the licence does not open {m.model_id}")
        return UnlockedModel(self, model_key)


class UnlockedImage:
    """Segments and the key to them. All methods may be called from any thread."""

    def __init__(self, plan: Plan, table: bytes, entry_bytes: int, cipher: SegmentCipher) -> None:
        """`table`: authentic entries of `entry_bytes`, one for each segment, which begin with its tag."""
        self.segments: Sequence[SegmentRef] = SegmentTable(plan)
        self._table = table
        self._entry_bytes = entry_bytes
        self._cipher = cipher
        # (kind, first index after it, its last segment's length, the others'): plain numbers, because a
        # segment of EMBED takes 2 microseconds to decrypt and building a SegmentRef would take as long.
        self._regions = [
            (
                int(r.kind),
                r.first_segment + r.segment_count,
                r.padded_bytes - (r.segment_count - 1) * r.unit_bytes,
                r.unit_bytes,
            )
            for r in plan.regions
        ]

    def _kind_and_length(self, index: int) -> tuple[int, int]:
        for kind, end, last, unit in self._regions:
            if index < end:
                if index < 0:
                    break
                return kind, last if index == end - 1 else unit
        raise IndexError(f"segment {index} of {len(self.segments)}")

    def decrypt_into(self, index: int, ciphertext: memoryview, out: memoryview) -> None:
        """Authenticate and decrypt one segment; the interpreter lock is free meanwhile.

        `ciphertext` is a writable buffer of `segments[index].length` + 16 bytes: the segment as read from the
        file, then room for the tag, which is put there from the signed manifest (the library wants both in
        one piece; this saves copying the segment). `out` is `length` bytes of *private* memory: it holds
        unauthenticated plaintext during the call, and zeros when the call fails.

        Raises `SegmentNotAuthentic`; `ValueError` when a buffer has another size.
        """
        self.decrypt_run_into(index, 1, ciphertext, out)

    def decrypt_run_into(self, first: int, count: int, ciphertext: memoryview, out: memoryview) -> None:
        """The same for `count` segments of one region, one behind the other in both buffers; `ciphertext` has room
        for one tag at its end. All in one loop, because a segment of EMBED takes 2 microseconds to decrypt.

        When one of them fails, those behind it are in `out` as plaintext already.
        """
        kind, unit = self._kind_and_length(first)
        _, length = self._kind_and_length(first + count - 1)
        at = (count - 1) * unit
        if len(ciphertext) != at + length + TAG_BYTES or len(out) != at + length:
            raise ValueError(
                f"segments {first} to {first + count - 1} have {at + length} bytes: wrong buffers"
            )
        table, entry, decrypt = self._table, self._entry_bytes, self._cipher.decrypt_into
        # From the end: the tag of a segment goes where its successor's ciphertext begins.
        for index in range(first + count - 1, first - 1, -1):
            end = at + length
            ciphertext[end : end + TAG_BYTES] = table[index * entry : index * entry + TAG_BYTES]
            try:
                decrypt(kind, index, ciphertext[at : end + TAG_BYTES], length, out[at:end])
            except InvalidTag:
                out[at:end] = bytes(length)
                raise self._not_authentic(index) from None
            at, length = at - unit, unit

    def _not_authentic(self, index: int) -> SegmentNotAuthentic:
        segment = self.segments[index]
        return SegmentNotAuthentic(
            f"segment {index} ({segment.kind.name}, file offset {segment.file_offset}) is not authentic"
        )


class UnlockedModel(UnlockedImage):
    """A sealed model and the key to it."""

    def __init__(self, sealed: SealedModel, model_key: bytes) -> None:
        """Use `SealedModel.unlock`."""
        m = sealed.manifest
        cipher = SegmentCipher(model_key, m.sealing_id, encode_name(m.model_id), m.model_version)
        super().__init__(m.plan, m.segment_table, SEGMENT_ENTRY_BYTES, cipher)
        self.sealed = sealed
        self.manifest = m

    def read_region(self, kind: RegionKind) -> bytes:
        """Read, authenticate and decrypt a whole region (META: what others need goes segment by segment).

        Raises `SegmentNotAuthentic`, `SealedTruncated`, `StorageFailure`.
        """
        region = self.manifest.region(kind)
        out = bytearray(region.padded_bytes)
        self.read_region_into(kind, memoryview(out))
        return bytes(memoryview(out)[: region.length])

    def read_region_into(self, kind: RegionKind, out: memoryview) -> None:
        """The same, into `padded_bytes` of the caller's. After an error there may be authentic plaintext in it."""
        region = self.manifest.region(kind)
        ciphertext = memoryview(bytearray(region.unit_bytes + TAG_BYTES))
        for index in range(region.first_segment, region.first_segment + region.segment_count):
            segment = self.segments[index]
            start = segment.file_offset - region.file_offset
            pread_exact(self.sealed.fd, ciphertext[: segment.length], segment.file_offset)
            self.decrypt_into(
                index,
                ciphertext[: segment.length + TAG_BYTES],
                out[start : start + segment.length],
            )

    def gguf_header(self) -> bytes:
        """The GGUF file up to its tensor data: authentic, and still to be parsed with limits (gguf.py)."""
        return self.read_region(RegionKind.META)

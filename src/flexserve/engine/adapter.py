"""A sealed LoRA adapter, from its file to llama.cpp: authenticated, checked against its model, loaded as a whole.

An adapter is small beside its model, so it is neither loaded on demand nor recalled: its weights are in memory as long
as the model is registered, and count in the budget.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

from ..core import PAGE_SIZE
from ..errors import FlexServeError
from ..sealed.adapter_rules import check_fits
from ..sealed.format import RegionKind
from ..sealed.gguf import GGUFHeader
from ..sealed.reader import UnlockedModel
from ..sealed.verify import check_adapter_inside
from .llama import Model


@dataclass(frozen=True)
class SealedAdapter:
    """An adapter that may be used, and how much of it: `scale` times what it adds to each matrix."""

    unlocked: UnlockedModel
    scale: float

    @property
    def memory_bytes(self) -> int:
        """What llama.cpp keeps of it: its tensors, in whole pages."""
        nbytes = self.unlocked.manifest.region(RegionKind.BODY).padded_bytes
        return -(-nbytes // PAGE_SIZE) * PAGE_SIZE

    def digest_with(self, model: bytes) -> bytes:
        """Of what a session's KV was computed with. `model`: the digest of the model's manifest."""
        return hashlib.sha256(model + self.unlocked.sealed.digest + struct.pack("<f", self.scale)).digest()

    def load(self, model: Model, base: GGUFHeader) -> Any:
        """Give it to llama.cpp; returns llama.cpp's handle. `base`: the model's checked header.

        Raises `NotAuthentic` when a segment or the content is not what it should be, `ModelUnsupported` when it does
        not fit the model.
        """
        try:
            manifest = self.unlocked.manifest
            meta = self.unlocked.gguf_header()
            header = check_adapter_inside(manifest, meta)
            check_fits(header, base)
            gguf = bytearray(header.file_bytes)  # `add_adapter` zeroes it
            gguf[: len(meta)] = meta
            image = bytearray(manifest.region(RegionKind.BODY).padded_bytes)
            try:
                self.unlocked.read_region_into(RegionKind.BODY, memoryview(image))
                for tensor, place in zip(header.tensors, manifest.tensors, strict=True):
                    at = header.data_offset + tensor.offset
                    gguf[at : at + tensor.nbytes] = memoryview(image)[
                        place.image_offset : place.image_offset + tensor.nbytes
                    ]
            finally:
                image[:] = bytes(len(image))
            return model.add_adapter(gguf)
        except FlexServeError as error:
            raise of_the_adapter(error) from error


def of_the_adapter(error: FlexServeError) -> FlexServeError:
    """The same error, saying that it is not the model's."""
    return type(error)(f"the adapter: {error.message}", hint=error.hint)

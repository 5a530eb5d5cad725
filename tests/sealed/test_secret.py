"""Slots for secrets: taken and given, also from within each other."""

from __future__ import annotations

import ctypes
import threading

import pytest

from flexserve.sealed import secret
from flexserve.sealed.secret import SLOT_BYTES, SecretBytes

PATIENCE_S = 60.0


def test_a_secret_that_goes_while_another_is_taken_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    vault = secret._Vault()
    vault.ordinary = True
    monkeypatch.setattr(secret, "_vault", vault)
    goes = [SecretBytes(b"one")]
    vault._free.clear()  # so that the next one needs a page
    page = vault._page

    def collected_meanwhile() -> ctypes.Array[ctypes.c_char]:
        goes.clear()
        return page()

    monkeypatch.setattr(vault, "_page", collected_meanwhile)
    taken: list[SecretBytes] = []
    taking = threading.Thread(target=lambda: taken.append(SecretBytes(b"two")), daemon=True)
    taking.start()
    taking.join(PATIENCE_S)
    assert bytes(taken[0].view()) == b"two"
    slots = len(vault._free) + 1
    assert slots * SLOT_BYTES == 4096 + SLOT_BYTES  # a new page, and what was given back

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexserve.flexmem.arena import Arena
from flexserve.flexmem.uffd import Userfaultfd

from .helpers import Image, close, regions


@pytest.fixture
def faults() -> Iterator[Userfaultfd]:
    made = Userfaultfd()
    yield made
    made.close()


@pytest.fixture
def arena(faults: Userfaultfd) -> Iterator[Arena]:
    """Three segments of EMBED and four of BODY, all absent."""
    made = Arena(regions(), faults)
    yield made
    close(made, faults)


@pytest.fixture
def image(arena: Arena) -> Image:
    return Image(arena.length)

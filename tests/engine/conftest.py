from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexserve.engine import llama

from .secure_models import Opener


@pytest.fixture(scope="session", autouse=True)
def _started() -> None:
    llama.start()


@pytest.fixture(scope="session")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    """Seals and opens models; what it opened is closed at the end."""
    made = Opener(tmp_path_factory.mktemp("secure-models"))
    yield made
    made.close()

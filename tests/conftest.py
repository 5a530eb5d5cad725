from __future__ import annotations

from pathlib import Path

import pytest

from .sealed_fixtures import SMALL, Kit, make_kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A sealed model of 90 kB."""
    return make_kit(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A sealed model of 2.2 MB: nine segments of EMBED, two of BODY."""
    return make_kit(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture
def flex(tmp_path: Path) -> Path:
    """Where a test may put its own sealed file."""
    return tmp_path / "test.flex"

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .subjects import SUBJECTS, Subject


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """A started world with no model registered."""
    with SUBJECTS[request.param](tmp_path) as started:
        yield started

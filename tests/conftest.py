from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from flexserve.worlds.base import ModelSource

from .sealed_fixtures import SMALL, TINY, Kit, make_kit
from .world_fixtures import Device, make_device

# A shell starts what runs in the background with Ctrl-C ignored, and so would everything be that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["FLEXSERVE_CALIBRATE"] = "0"  # servers that tests start measure nothing, unless a test asks for it

# An example takes as long as the machine lets it: where others compute, single ones take seconds.
settings.register_profile("flexserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flexserve")


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A sealed model of 90 kB."""
    return make_kit(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """A sealed model of 2.2 MB: nine segments of EMBED, two of BODY."""
    return make_kit(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A device of the test file's own."""
    return make_device(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def source(device: Device) -> ModelSource:
    """A model of 90 kB, sealed and licensed for it."""
    return device.add_kit("m", TINY)[0]


@pytest.fixture
def flex(tmp_path: Path) -> Path:
    """Where a test may put its own sealed file."""
    return tmp_path / "test.flex"

"""The host build of the monitor, once per run."""

from __future__ import annotations

import pytest

from .host_build import CALLS, HostMonitor, build


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> HostMonitor:
    out = tmp_path_factory.mktemp("monitor") / "libmonitor.so"
    return HostMonitor(build(out, CALLS, "-fsanitize=undefined", "-shared", "-fPIC"))


@pytest.fixture
def host(host_library: HostMonitor) -> HostMonitor:
    host_library.reset()
    return host_library

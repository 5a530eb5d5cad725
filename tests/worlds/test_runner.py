"""The runner: models that come and go under one name."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import cast

from flexserve.engine.model import SecureModel
from flexserve.framework.settings import Settings
from flexserve.framework.weights import Part
from flexserve.worlds.linux.outside import Outside
from flexserve.worlds.linux.runner import Runner
from flexserve.worlds.linux.saving import Saver

from ..world_fixtures import SMALL_LIMITS


class Names(Outside):
    """Asks for a name in the moment in which a model of that name has just been closed."""

    def __init__(self, settings: Settings) -> None:
        self.runner = Runner(settings, self)
        self.runner.saver = cast(Saver, SimpleNamespace(find=lambda: None))
        self.given: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.failed = False

    def closed(self, name: str) -> None:
        self.given.put(self.runner.new_name(name))

    def fails(self) -> None:
        self.failed = True


def a_model() -> SecureModel:
    loader = SimpleNamespace(on_demand=True, stop=lambda: None)
    fake = SimpleNamespace(
        parts=(Part(0, 4, 1 << 20, 4 << 20),),
        kv_bytes_per_token=1,
        context_tokens=1,
        adapter_bytes=0,
        info=SimpleNamespace(name="one"),
        sessions=None,
        loader=loader,
        close=lambda: None,
    )
    return cast(SecureModel, fake)


def test_a_name_is_not_given_again_before_the_framework_knows_that_its_model_is_closed() -> None:
    names = Names(SMALL_LIMITS)
    runner = names.runner
    assert runner.new_name("one") == "one"
    runner.add("one", a_model())
    runner.remove("one")
    assert names.given.get(timeout=10) != "one"
    while "one" in {model.model for model in runner.view().models}:
        runner.settle()
    assert runner.new_name("one") == "one"
    assert not names.failed

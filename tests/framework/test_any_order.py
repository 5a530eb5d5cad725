"""Whatever arrives in whatever order: memory stays within the budget, nothing is lost, nothing is saved that is not.

Two machines: one where effects are carried out in any order and at any time, as threads would; and the end of each
run, where everything comes to rest and is counted.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flexserve.framework import events as ev
from flexserve.framework.effects import AnswerRecall
from flexserve.framework.order import Range
from flexserve.framework.settings import Settings
from flexserve.framework.weights import Part

from .executor import Answer, Executor

UNTIED = (Part(0, 8, 16, 120, fill=False), Part(8, 20, 1000, 19_500))
TIED = (Part(8, 12, 1000, 11_300), Part(0, 8, 16, 128))
SMALL = (Part(0, 3, 1000, 2_001),)
SHAPES = {"a": UNTIED, "b": TIED, "c": SMALL}
NAMES = sorted(SHAPES)
FIXED = {"a": 0, "b": 700, "c": 0}  # an adapter
KV = 10  # bytes per token


def make_settings(budget: int, floor: int, *, lazy: bool, slots: int) -> Settings:
    return Settings(
        budget_bytes=budget,
        cap_bytes=60_000,
        floor_bytes=floor,
        load_ahead_bytes=6_000,
        stream_window_bytes=3_000,
        stream_behind_bytes=1_000,
        refill_ahead_bytes=4_000,
        stored_limit_bytes=8_000,
        queue_limit=4,
        kv_chunk_tokens=32,
        save_after_s=3,
        lazy_after_s=2,
        calm_s=4,
        save_retry_s=5,
        compute_slots=slots,
        lazy=lazy,
    )


class AnyOrder(RuleBasedStateMachine):
    """Every rule is something a client, the OS or a thread may do next."""

    @initialize(
        budget=st.integers(4_000, 50_000),
        floor=st.integers(0, 4_000),
        lazy=st.booleans(),
        slots=st.integers(1, 2),
    )
    def begin(self, budget: int, floor: int, lazy: bool, slots: int) -> None:
        self.world = Executor(make_settings(budget, floor, lazy=lazy, slots=slots))
        for name in NAMES:
            self.world.register(name, SHAPES[name], KV, fixed=FIXED[name])
        self.count = self.calls = 0

    # Clients

    @rule(
        data=st.data(),
        model=st.sampled_from(NAMES),
        prompt=st.integers(1, 300),
        number=st.integers(0, 2),
        explicit=st.booleans(),
        rows=st.integers(0, 7),
        rest=st.booleans(),
        client=st.sampled_from(["", "c1", "c2"]),
        prefix=st.sampled_from(["", "p1"]),
        hint=st.sampled_from(["", "", *NAMES]),
        priority=st.integers(-1, 1),
    )
    def a_request_arrives(
        self,
        data: st.DataObject,
        model: str,
        prompt: int,
        number: int,
        explicit: bool,
        rows: int,
        rest: bool,
        client: str,
        prefix: str,
        hint: str,
        priority: int,
    ) -> None:
        self.count += 1
        name = f"r{self.count}"
        session = f"{model}/{number}" if explicit else f"{model}/{name}"
        known = sorted(s for s, kv in self.world.kvs.items() if kv.model == model)
        source = data.draw(st.sampled_from([None, *known]))
        matched = 0 if source is None else min(self.world.kvs[source].tokens, prompt)
        row = (Range(rows, 1),) if model in ("a", "b") else ()
        answer = Answer(model, session, prompt, source, matched, row, client, prefix, hint, priority)
        self.world.ask(name, answer, explicit=explicit)
        if rest:
            self.world.drain()

    @precondition(lambda self: self.stored())
    @rule(data=st.data(), same=st.booleans(), more=st.integers(0, 90))
    def a_saved_conversation_goes_on(self, data: st.DataObject, same: bool, more: int) -> None:
        source = data.draw(st.sampled_from(self.stored()))
        self.count += 1
        model, tokens = source.split("/")[0], self.world.kvs[source].stored_tokens
        session = source if same else f"{model}/r{self.count}"
        answer = Answer(model, session, tokens + more + 1, source, tokens)
        self.world.ask(f"r{self.count}", answer, explicit=same)

    def stored(self) -> list[str]:
        sessions = self.world.framework._records.sessions.values() if hasattr(self, "world") else ()
        return sorted(s.name for s in sessions if s.state.value == "stored")

    def any_in(self, *states: str) -> bool:
        return hasattr(self, "world") and any(a.state in states for a in self.world.answers.values())

    def some(self, data: st.DataObject, *states: str) -> str | None:
        names = [n for n, a in self.world.answers.items() if a.state in states]
        return data.draw(st.sampled_from(names)) if names else None

    @precondition(lambda self: self.any_in("queued", "prepared", "computing", "suspended"))
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        if (name := self.some(data, "queued", "prepared", "computing", "suspended")) is not None:
            self.world.post(ev.RequestCancelled(name))

    # Compute

    @precondition(lambda self: self.any_in("computing"))
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def tokens_are_computed(self, data: st.DataObject, tokens: int) -> None:
        if (name := self.some(data, "computing")) is not None:
            self.world.step(name, tokens)

    @precondition(lambda self: self.any_in("computing"))
    @rule(data=st.data())
    def compute_walks_through_the_weights(self, data: st.DataObject) -> None:
        if (name := self.some(data, "computing")) is not None:
            model = self.world.answers[name].model
            if model in self.world.images:
                image = self.world.images[model]
                first = data.draw(st.integers(0, len(image.indices()) - 1))
                order = [i for p in image.parts for i in range(p.first, p.first + p.count)]
                for index in order[first : first + 4]:
                    self.world.touch(model, index)

    @precondition(lambda self: self.any_in("prepared", "computing"))
    @rule(data=st.data(), keep=st.booleans())
    def an_answer_ends(self, data: st.DataObject, keep: bool) -> None:
        if (name := self.some(data, "prepared", "computing")) is not None:
            self.world.finish(name, keep=keep)

    # Threads

    @precondition(lambda self: self.world.queues or self.world.loading())
    @rule(data=st.data(), steps=st.integers(1, 8))
    def threads_go_on(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            keys = sorted(self.world.queues) + [f"load {n}" for n in self.world.loading()]
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if key.startswith("load "):
                self.world.load(key[5:])
            else:
                self.world.run(key)

    @precondition(lambda self: self.world.queues or self.world.loading())
    @rule()
    def everything_comes_to_rest(self) -> None:
        self.world.drain()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 20.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.post(ev.Tick())

    @rule(client=st.sampled_from(["", "c1"]), models=st.permutations(NAMES))
    def a_client_declares_a_workflow(self, client: str, models: list[str]) -> None:
        self.world.post(ev.WorkflowDeclared(client, "w", tuple(models)))

    @rule(failing=st.booleans())
    def storage_fails_or_recovers(self, failing: bool) -> None:
        self.world.failing = failing

    @precondition(lambda self: self.stored())
    @rule(data=st.data())
    def storage_loses_a_session(self, data: st.DataObject) -> None:
        self.world.kvs[data.draw(st.sampled_from(self.stored()))].corrupt = True

    # The operating system

    @rule(nbytes=st.integers(1, 40_000), deadline=st.sampled_from([None, 0.0, 2.0]))
    def the_os_takes_memory(self, nbytes: int, deadline: float | None) -> None:
        """A recall is honoured up to what is there above the floor, and what cannot be taken right now."""
        self.calls += 1
        records = self.world.framework._records
        above = max(records.present - records.floor, 0)
        stuck = sum(s.nbytes for s in records.in_memory.values() if s.readers or s.retry_at > records.now)
        stuck += sum(m.weights.present for m in records.models.values() if m.state.value == "closing")
        self.world.post(ev.PressureRecall(self.calls, nbytes, deadline))
        (chosen,) = [d.effect for d in self.world.log[-1][2] if isinstance(d.effect, AnswerRecall)]
        assert min(nbytes, above) - stuck <= chosen.chosen_bytes <= nbytes

    @rule(nbytes=st.integers(1, 40_000))
    def the_os_offers_memory(self, nbytes: int) -> None:
        self.world.post(ev.Offer(nbytes))

    @rule(nbytes=st.integers(0, 80_000))
    def the_operator_sets_the_budget(self, nbytes: int) -> None:
        self.world.post(ev.BudgetSet(nbytes))

    @precondition(lambda self: any("lazy" in i.state.values() for i in self.world.images.values()))
    @rule(data=st.data(), model=st.sampled_from(NAMES))
    def the_kernel_takes_a_lazy_segment(self, data: st.DataObject, model: str) -> None:
        if model in self.world.images:
            lazy = [i for i, s in self.world.images[model].state.items() if s == "lazy"]
            if lazy:
                self.world.lose(model, data.draw(st.sampled_from(lazy)))

    # Models

    @rule(model=st.sampled_from(NAMES), now=st.sampled_from([False] * 6 + [True]))
    def a_model_is_removed(self, model: str, now: bool) -> None:
        if now and model in self.world.images:
            self.world.post(ev.ModelRemoved(model))

    @precondition(lambda self: len(self.world.images) < len(NAMES))
    @rule()
    def a_model_is_registered_again(self) -> None:
        name = next(n for n in NAMES if n not in self.world.images)
        self.world.register(name, SHAPES[name], KV, fixed=FIXED[name])

    @rule(model=st.sampled_from(NAMES), now=st.sampled_from([False] * 9 + [True]))
    def a_model_is_poisoned(self, model: str, now: bool) -> None:
        if now and model in self.world.images:
            self.world.post(ev.ModelPoisoned(model, "segment_not_authentic", "segment 3 is not authentic"))

    @invariant()
    def the_rules_hold(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """Whatever happened: with time and memory, every request ends, and every recall is finished."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.failing = False
        for _ in range(200):
            world.drain()
            world.check()
            if all(a.ended for a in world.answers.values()):
                break
            for name, answer in list(world.answers.items()):
                if answer.state == "computing" and not answer.grown:
                    world.finish(name)
            world.now += 31.0
            world.post(ev.Tick())
        assert all(a.ended for a in world.answers.values()), "a request never ended"
        world.drain()
        assert not world.recalls, "a recall was never finished"
        assert world.framework.view().leaving == 0


def test_no_order_of_events_breaks_a_rule() -> None:
    run: Any = run_state_machine_as_test
    run(AnyOrder, settings=hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None))

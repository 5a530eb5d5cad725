"""Runs the ten workflows with the demo agents: sealed for a device that lives as long as the run, in one linux world
under a budget that does not hold them all, with prefetch and without.

The models are a few megabytes, so the seconds show that it works and not how much it brings; `flexserve bench
workflows` measures that at true sizes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench import workflow_file
from ..bench.workflow_file import Workflow
from ..core import SEGMENT_SIZE, Finished, Message, Request, Sampling, Token, WorkflowReport, WorldStatus
from ..errors import EngineFailure, NotFound, Usage
from ..framework.settings import MIB, Settings
from ..sealed.keyfile import write_key
from ..sealed.keys import DeviceKey, VendorKey
from ..sealed.licence import issue
from ..sealed.reader import SealedModel
from ..sealed.seal import seal
from ..worlds.base import ModelSource, World
from ..worlds.linux import LinuxWorld
from .prompts import AGENTS, SCRIPTS, SYSTEM

# Of what the four models weigh: just enough for the assistant and its keys and values. With less it is streamed.
BUDGET_SHARE = 0.55
CONTEXT_TOKENS = 256
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`rounds`: how often every workflow runs. `models`: the directory with the demo-NAME.gguf files. `budget_bytes` 0:
    `BUDGET_SHARE` of what they weigh."""

    models: Path
    rounds: int = 4
    threads: int = 0  # all cores
    budget_bytes: int = 0


@dataclass(frozen=True)
class StepRun:
    """One request of a workflow."""

    agent: str
    say: str
    answer: str
    ttft_s: float  # as the client saw it
    load_bytes: int
    prefetched_bytes: int


@dataclass(frozen=True)
class Run:
    """One run of a workflow; `latency_s`: from the request to the first token of the last step."""

    workflow: str
    round: int
    latency_s: float
    steps: tuple[StepRun, ...]

    @property
    def prefetched_bytes(self) -> int:
        return sum(step.prefetched_bytes for step in self.steps)


@dataclass(frozen=True)
class Served:
    """What one world answered, and what it learned from it."""

    runs: Sequence[Run]
    learned: WorkflowReport


@dataclass(frozen=True)
class Device:
    """The four models, sealed and licensed to one device."""

    sources: tuple[ModelSource, ...]
    device_key: Path
    vendor_pub: Path
    weight_bytes: int
    budget_bytes: int  # of the world


def default_models() -> Path:
    """`models` in the source tree this package runs from, or else in the current directory."""
    beside = Path(__file__).parents[3] / "models"
    return beside if beside.is_dir() else Path("models")


def model_files(models: Path) -> dict[str, Path]:
    """The GGUF of every agent. Raises `NotFound` naming the first that is missing."""
    files = {agent: models / f"demo-{agent}.gguf" for agent in AGENTS.values()}
    for agent, path in files.items():
        if not path.is_file():
            raise NotFound(
                f"there is no model of the {agent} agent at {path}",
                hint="run it in a clone of the repository, or say with --models where its models/ are",
            )
    return files


def prepare(files: Mapping[str, Path], budget_bytes: int, directory: Path, say: Say) -> Device:
    """A vendor, a device, and the models sealed by the one for the other, all in `directory`. `budget_bytes` 0: the
    usual."""
    vendor, device = VendorKey.generate(), DeviceKey.generate()
    vendor_path, device_path = directory / "vendor.key", directory / "device.key"
    write_key(vendor_path, vendor)
    write_key(device_path, device)
    sources = []
    for number, (agent, gguf) in enumerate(files.items(), 1):
        say(f"sealing {gguf.name} and licensing it to this run's device")
        flex, licence = directory / f"{agent}.flex", directory / f"{agent}.lic"
        seal(gguf, flex, vendor, model_id=f"demo-{agent}", version=1)
        with flex.open("rb") as file:
            sealed = SealedModel.open(file.fileno(), [vendor.public])
        licence.write_bytes(issue(sealed, vendor, device.public, issued_at=int(time.time()), serial=number))
        sources.append(ModelSource(agent, flex, licence, use_copy=False))
    weight_bytes = sum(path.stat().st_size for path in files.values())
    return Device(
        tuple(sources),
        device_path,
        vendor_path.with_suffix(".pub"),
        weight_bytes,
        budget_bytes or int(BUDGET_SHARE * weight_bytes),
    )


def run(options: Options, directory: Path, say: Say) -> dict[str, Any]:
    """The whole demo; files are made in `directory`, which the caller removes. Raises `NotFound`, `EngineFailure`, and
    `Usage` for a budget with which an agent cannot answer.

    Returns what docs/schemas/demo-agents.json describes.
    """
    device = prepare(model_files(options.models), options.budget_bytes, directory, say)
    workflows = workflow_file.load().workflows
    served: dict[bool, Served] = {}
    for prefetch in (False, True):
        say(
            f"running {len(workflows)} workflows {options.rounds} times {'with' if prefetch else 'without'} prefetch"
        )
        served[prefetch] = _serve(device, workflows, options, directory, prefetch=prefetch)
    return report(device, workflows, options, served[False].runs, served[True])


def _serve(
    device: Device, workflows: Sequence[Workflow], options: Options, directory: Path, *, prefetch: bool
) -> Served:
    budget = device.budget_bytes
    world = LinuxWorld(
        str(device.device_key),
        vendor_pub=device.vendor_pub,
        threads=options.threads or None,
        context_tokens=CONTEXT_TOKENS,
        session_dir=directory / f"sessions-{'prefetch' if prefetch else 'none'}",
        settings=Settings(
            budget_bytes=budget,
            cap_bytes=budget,
            floor_bytes=min(MIB, budget),
            # The usual window is many times larger than these models, none of which would be streamed through it.
            stream_window_bytes=SEGMENT_SIZE,
            stream_behind_bytes=SEGMENT_SIZE // 2,
            lazy=False,
            prefetch=prefetch,
        ),
    )
    try:
        world.start()
        for source in device.sources:
            world.register(source)
        check_budget(budget, world.status())
        numbers = itertools.count()
        runs = [
            _run(world, workflow, number, numbers)
            for number in range(options.rounds)
            for workflow in workflows
        ]
        return Served(runs, world.workflows())
    finally:
        world.close()


def check_budget(budget_bytes: int, status: WorldStatus) -> None:
    """Raises `Usage` where not every agent can answer: their requests would end with `out_of_budget`."""
    hungriest = max(status.models, key=lambda model: model.least_bytes)
    if budget_bytes < hungriest.least_bytes:
        raise Usage(
            f"with a budget of {budget_bytes} bytes the {hungriest.info.name} does not answer: keys and values and a "
            f"window of its weights take {hungriest.least_bytes} bytes",
            hint=f"give at least --budget {hungriest.least_bytes}",
        )


def _run(world: World, workflow: Workflow, number: int, requests: Iterable[int]) -> Run:
    """One run of a workflow, each step when the one before has ended."""
    steps: list[StepRun] = []
    began, latency = time.perf_counter(), 0.0
    for place, step in enumerate(workflow.steps):
        agent, say = AGENTS[step.model], SCRIPTS[workflow.name].say(place, number)
        request = Request(
            id=f"demo-{next(iter(requests))}",
            model=agent,
            messages=(Message("system", SYSTEM[agent]), Message("user", say)),
            max_tokens=step.output_tokens,
            sampling=Sampling(temperature=0),
            client=workflow.name,
        )
        asked, first, end = time.perf_counter(), 0.0, None
        for event in world.generate(request):
            if isinstance(event, Token):
                first = first or time.perf_counter()
            else:
                end = event
        if not isinstance(end, Finished) or not first:
            raise EngineFailure(f"{agent} gave no answer in {workflow.name}")
        latency = first - began
        t = end.timings
        steps.append(StepRun(agent, say, end.text, first - asked, t.load_bytes, t.prefetched_bytes))
    return Run(workflow.name, number, latency, tuple(steps))


def report(
    device: Device,
    workflows: Sequence[Workflow],
    options: Options,
    control: Sequence[Run],
    served: Served,
) -> dict[str, Any]:
    """Figures per workflow. The first run knows nothing yet; the later ones are the median of those from the third on,
    because it takes two of the same before prefetch believes in a third (of fewer: of the last)."""
    return {
        "agents": [
            {"agent": agent, "model_class": name, "system": SYSTEM[agent]} for name, agent in AGENTS.items()
        ],
        "rounds": options.rounds,
        "weight_bytes": device.weight_bytes,
        "budget_bytes": device.budget_bytes,
        "workflows": [
            _figures(
                workflow,
                *([r for r in runs if r.workflow == workflow.name] for runs in (control, served.runs)),
            )
            for workflow in workflows
        ],
        "prefetch": {
            "predictions": served.learned.predictions,
            "hits": served.learned.hits,
            "prefetched_bytes": served.learned.prefetched_bytes,
            "wasted_bytes": served.learned.wasted_bytes,
            "estimated_saved_s": served.learned.saved_s,
        },
    }


def _figures(workflow: Workflow, without: Sequence[Run], prefetching: Sequence[Run]) -> dict[str, Any]:
    later = prefetching[2:] or prefetching[-1:]
    latency_s = statistics.median(run.latency_s for run in later)
    control_s = statistics.median(run.latency_s for run in (without[2:] or without[-1:]))
    return {
        "workflow": workflow.name,
        "steps": [
            {
                "agent": step.agent,
                "say": step.say,
                "answer": step.answer,
                "ttft_s": step.ttft_s,
                "load_bytes": step.load_bytes,
                "prefetched_bytes": step.prefetched_bytes,
            }
            for step in prefetching[-1].steps
        ],
        "first_latency_s": prefetching[0].latency_s,
        "later_latency_s": latency_s,
        "later_latency_without_prefetch_s": control_s,
        "prefetched_bytes": int(statistics.median(run.prefetched_bytes for run in later)),
        "saved_s": control_s - latency_s,
    }

"""The agent workflows of workflows.toml, checked: which steps each has, on which model class, with how many tokens.

Knows the file's form and which shape stands for a class in a world; no model, no prompt and no measurement.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import NotFound, Usage
from .shapes import shape_named

PATH = Path(__file__).with_name("workflows.toml")
WORLDS = ("board", "linux")  # that a class names a shape for
MAX_TOKENS = 1 << 16  # of one part of a step
MAX_STEPS = 32
_STEP_KEYS = frozenset(("model", "constant", "variable", "output"))


@dataclass(frozen=True)
class Step:
    """One request of a workflow. `after`: the steps that must have ended before it begins, counted from 0."""

    model: str  # the class
    constant_tokens: int  # of the prompt, the same at every run: system text, tools
    variable_tokens: int  # of the prompt, different at every run; they follow the constant ones
    output_tokens: int
    after: tuple[int, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return self.constant_tokens + self.variable_tokens


@dataclass(frozen=True)
class Workflow:
    """Steps in the order of the file; its latency is from the request to the first token of the last one."""

    name: str
    steps: tuple[Step, ...]

    @property
    def is_chain(self) -> bool:
        """Whether each step waits for the one before, and for no other."""
        return all(step.after == ((n - 1,) if n else ()) for n, step in enumerate(self.steps))


@dataclass(frozen=True)
class WorkflowFile:
    """The whole file. `classes`: of each model class, the shape for each world."""

    classes: Mapping[str, Mapping[str, str]]
    workflows: tuple[Workflow, ...]

    def shape(self, model_class: str, world: str = "linux") -> str:
        """The name of the shape that stands for a class."""
        return self.classes[model_class][world]

    def named(self, name: str) -> Workflow:
        """Raises `NotFound` naming those there are."""
        for workflow in self.workflows:
            if workflow.name == name:
                return workflow
        raise NotFound(
            f"no workflow is called {name!r}", hint=f"there are {', '.join(w.name for w in self.workflows)}"
        )


def load(path: Path = PATH) -> WorkflowFile:
    """Read and check a file. Raises `Usage` naming the place that is wrong, `NotFound`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise Usage(f"{path} is not UTF-8") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> WorkflowFile:
    """Check a file's text; `name` is how errors call it. Raises `Usage`."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Usage(f"{name} is not TOML: {error}") from None
    _keys(table, frozenset(("classes", "workflow")), name)
    classes = _classes(_table(table["classes"], f"{name}: classes"), f"{name}: classes")
    workflows = tuple(
        _workflow(one, classes, f"{name}: workflow {number}")
        for number, one in enumerate(_list(table["workflow"], f"{name}: workflow"), 1)
    )
    names = [workflow.name for workflow in workflows]
    for one in names:
        _check(names.count(one) == 1, name, f"the workflow {one!r} is there {names.count(one)} times")
    return WorkflowFile(classes, workflows)


def _classes(table: dict[str, Any], where: str) -> Mapping[str, Mapping[str, str]]:
    _check(bool(table), where, "there is none")
    found: dict[str, Mapping[str, str]] = {}
    for name, one in table.items():
        shapes = _table(one, f"{where}.{name}")
        _keys(shapes, frozenset(WORLDS), f"{where}.{name}")
        for world, shape in shapes.items():
            shape_named(_text(shape, f"{where}.{name}.{world}"))
        found[name] = MappingProxyType(dict(shapes))
    return MappingProxyType(found)


def _workflow(value: Any, classes: Mapping[str, Any], where: str) -> Workflow:
    table = _table(value, where)
    _keys(table, frozenset(("name", "steps")), where)
    name = _text(table["name"], f"{where}.name")
    where = f"{where} ({name})"
    steps = _list(table["steps"], f"{where}.steps")
    _check(len(steps) <= MAX_STEPS, f"{where}.steps", f"at most {MAX_STEPS} are possible")
    return Workflow(
        name,
        tuple(_step(one, number, classes, f"{where}, step {number}") for number, one in enumerate(steps)),
    )


def _step(value: Any, number: int, classes: Mapping[str, Any], where: str) -> Step:
    table = _table(value, where)
    _keys(table, _STEP_KEYS, where, frozenset(("after",)))
    model = _text(table["model"], f"{where}.model")
    _check(
        model in classes, f"{where}.model", f"no class is called {model!r}; there are {', '.join(classes)}"
    )
    return Step(
        model,
        _count(table["constant"], f"{where}.constant", 0),
        _count(table["variable"], f"{where}.variable", 1),
        _count(table["output"], f"{where}.output", 1),
        _after(table, number, f"{where}.after"),
    )


def _after(table: dict[str, Any], number: int, where: str) -> tuple[int, ...]:
    if "after" not in table:
        return (number - 1,) if number else ()
    steps = table["after"]
    _check(isinstance(steps, list), where, "must be a list of steps, counted from 0")
    for one in steps:
        known = isinstance(one, int) and not isinstance(one, bool) and 0 <= one < number
        _check(known, where, f"{one!r} is not an earlier step, counted from 0")
    _check(len(set(steps)) == len(steps), where, "names a step twice")
    return tuple(sorted(steps))


def _check(ok: bool, where: str, rule: str) -> None:
    if not ok:
        raise Usage(f"{where}: {rule}")


def _keys(
    table: dict[str, Any], required: frozenset[str], where: str, optional: frozenset[str] = frozenset()
) -> None:
    missing, unknown = sorted(required - table.keys()), sorted(table.keys() - required - optional)
    _check(not missing, where, f"{', '.join(missing)} missing")
    _check(not unknown, where, f"nothing is known about {', '.join(unknown)}")


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Usage(f"{where}: must be a table")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Usage(f"{where}: must be a list of at least one")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 64 or not value.isprintable():
        raise Usage(f"{where}: must be 1 to 64 printable characters")
    return value


def _count(value: Any, where: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_TOKENS:
        raise Usage(f"{where}: must be {least} to {MAX_TOKENS} tokens")
    return value

"""The workflows' file: what it says, and that nothing in it is guessed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flexserve.bench.workflow_file import Step, load, parse
from flexserve.errors import NotFound, Usage

CLASSES = '[classes]\ns = { board = "qwen3-1.7b", linux = "llama-3.2-1b" }\n'
STEP = '{ model = "s", constant = 1, variable = 2, output = 3 }'


def _workflow(steps: str, name: str = "W") -> str:
    return f'[[workflow]]\nname = "{name}"\nsteps = [ {steps} ]\n'


def test_the_ten_workflows_of_the_papers_figure_9_are_there() -> None:
    file = load()
    assert [workflow.name for workflow in file.workflows] == [
        "Fact-Checking",
        "Privacy-Guard",
        "Notification-Clear",
        "Voice-Routing",
        "GUI-Agent",
        "Smart-Alarm",
        "Home-Assistant",
        "Logic-Critique",
        "Email-Polisher",
        "Meeting-Assistant",
    ]
    assert [file.shape(one) for one in ("xs", "s", "m", "l")] == [
        "qwen3-0.6b",
        "llama-3.2-1b",
        "qwen3-1.7b",
        "llama-3.2-3b",
    ]
    assert file.shape("l", "board") == "llama-3.1-8b"
    assert all(workflow.is_chain for workflow in file.workflows)
    routing = file.named("Voice-Routing").steps
    assert routing[1] == Step("s", 96, 48, 24, after=(0,))
    assert routing[1].prompt_tokens == 144
    with pytest.raises(NotFound, match="Voice-Rooting") as caught:
        file.named("Voice-Rooting")
    assert "Voice-Routing" in caught.value.hint


def test_a_step_may_wait_for_others_than_the_one_before() -> None:
    after = STEP.replace("}", ", after = [0] }")
    file = parse(CLASSES + _workflow(f"{STEP}, {STEP}, {after}"), "file")
    assert [step.after for step in file.workflows[0].steps] == [(), (0,), (0,)]
    assert not file.workflows[0].is_chain


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[classes", "file is not TOML"),
        (CLASSES, "file: workflow missing"),
        (_workflow(STEP), "file: classes missing"),
        ("[classes]\n" + _workflow(STEP), "file: classes: there is none"),
        ("workflow = []\n" + CLASSES, "workflow: must be a list of at least one"),
        (CLASSES + _workflow(STEP) + "[more]\n", "nothing is known about more"),
        (CLASSES.replace("linux", "moon") + _workflow(STEP), "classes.s: linux missing"),
        (CLASSES.replace('"llama-3.2-1b"', "1") + _workflow(STEP), r"classes.s.linux: must be"),
        (CLASSES.replace("llama-3.2-1b", "llama-9") + _workflow(STEP), "no model shape is called 'llama-9'"),
        (CLASSES + _workflow(STEP) * 2, "the workflow 'W' is there 2 times"),
        (CLASSES + _workflow(STEP, ""), "workflow 1.name: must be 1 to 64"),
        (CLASSES + _workflow(""), r"workflow 1 \(W\).steps: must be a list"),
        (CLASSES + _workflow(", ".join([STEP] * 33)), "at most 32"),
        (CLASSES + _workflow("1"), r"workflow 1 \(W\), step 0: must be a table"),
        (CLASSES + _workflow(STEP.replace("output = 3", "")), "TOML"),
        (CLASSES + _workflow(STEP.replace(", output = 3", "")), "step 0: output missing"),
        (CLASSES + _workflow(STEP.replace("}", ", x = 1 }")), "nothing is known about x"),
        (CLASSES + _workflow(STEP.replace('"s"', '"xl"')), "no class is called 'xl'; there are s"),
        (CLASSES + _workflow(STEP.replace("= 1", "= -1")), "step 0.constant: must be 0 to"),
        (CLASSES + _workflow(STEP.replace("= 2", "= 0")), "step 0.variable: must be 1 to"),
        (CLASSES + _workflow(STEP.replace("= 3", "= true")), "step 0.output: must be 1 to"),
        (CLASSES + _workflow(STEP.replace("= 3", "= 65537")), "step 0.output: must be 1 to 65536"),
        (CLASSES + _workflow(STEP.replace("}", ", after = 0 }")), "step 0.after: must be a list"),
        (CLASSES + _workflow(STEP.replace("}", ", after = [0] }")), "0 is not an earlier step"),
        (CLASSES + _workflow(f"{STEP}, {STEP.replace('}', ', after = [0, 0] }')}"), "names a step twice"),
    ],
)
def test_whatever_else_is_refused_with_its_place(text: str, what: str) -> None:
    with pytest.raises(Usage) as caught:
        parse(text, "file")
    assert re.search(what, caught.value.message)


def test_a_file_that_is_absent_or_binary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        load(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(Usage, match="not UTF-8"):
        load(tmp_path / "binary")

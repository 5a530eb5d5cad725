from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexserve.core import Message
from flexserve.engine import template_env
from flexserve.engine.marked import Marked, concat, literal, ranges
from flexserve.engine.spans import ControlToken, ControlTokens, Span, spans_of
from flexserve.engine.template import TemplateZygote
from flexserve.engine.template_process import Confine, nursery
from flexserve.errors import EngineFailure, TemplateFailure

from ..attacker import children
from .chat_templates import CHATML, CONTROL, GEMMA, LLAMA3, TEMPLATES

BOS, EOS = "<|begin_of_text|>", "<|eot_id|>"


@pytest.fixture(scope="module")
def zygote() -> Iterator[TemplateZygote]:
    with TemplateZygote() as started:
        yield started


def _text(spans: tuple[Span, ...]) -> str:
    return "".join(span.text for span in spans)


# --- what a template says, and who said it ---------------------------------------------------------------

_fragments = st.sampled_from(
    [
        *CONTROL,
        " ",
        "\n",
        "a",
        "Hello",
        "</think>",
        "<think>",
        "<tool_response>",
        "<|im_",
        "end|>",
        "é🙂",
        "{{ x }}",
    ]
)
_contents = st.lists(_fragments, max_size=6).map("".join)


@st.composite
def _conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(_contents)})
    turns = draw(st.lists(_contents, min_size=1, max_size=4))
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return messages


def _reference(source: str) -> Any:
    """Plain Jinja, set up as transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def fail(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = time.strftime
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source)


_OURS = {name: template_env.TemplateEnvironment().compile_template(t) for name, t in TEMPLATES.items()}
_THEIRS = {name: _reference(t) for name, t in TEMPLATES.items()}


def _ours(name: str, messages: list[dict[str, str]]) -> tuple[Span, ...]:
    return template_env.render(
        _OURS[name], messages, bos=BOS, eos=EOS, add_generation_prompt=True, max_chars=1 << 20
    )


@pytest.mark.parametrize("name", TEMPLATES)
@given(_conversations())
@settings(max_examples=40)
def test_the_text_is_what_plain_jinja_gives(name: str, messages: list[dict[str, str]]) -> None:
    expected = _THEIRS[name].render(
        messages=messages, bos_token=BOS, eos_token=EOS, add_generation_prompt=True, tools=None
    )
    assert _text(_ours(name, messages)) == expected


def _harmless(text: str) -> str:
    """Same length, same blanks, no control token."""
    return re.sub(
        r"[<\[]\|?[a-zA-Z_/]+\|?[>\]]",
        lambda m: m.group() if "th" in m.group() else "~" * len(m.group()),
        text,
    )


@pytest.mark.parametrize("name", TEMPLATES)
@given(_conversations())
@settings(max_examples=40)
def test_control_tokens_of_a_client_change_nothing_in_what_the_template_says(
    name: str, messages: list[dict[str, str]]
) -> None:
    spans = _ours(name, messages)
    with_harmless = _ours(name, [m | {"content": _harmless(m["content"])} for m in messages])
    assert [s.text for s in spans if s.is_template] == [s.text for s in with_harmless if s.is_template]


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_control_tokens_of_the_template_are_known_to_be_its_own(name: str) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    spans = _ours(name, [*messages, {"role": "user", "content": "Bye"}])
    assert [s.text for s in spans if not s.is_template] == ["Hello", "Hi", "Bye"]
    pieces = ControlTokens(map(ControlToken, CONTROL)).pieces(spans)
    found = re.findall("|".join(map(re.escape, CONTROL)), _text(spans))
    assert [p.text for p in pieces if p.is_template] == found
    assert _text(pieces) == _text(spans)


def test_roles_of_tools_and_developers_pass_as_they_are() -> None:
    spans = _ours("chatml", [{"role": r, "content": "x"} for r in ("developer", "tool")])
    assert spans[0] == Span("<|im_start|>developer\n", True)
    assert spans[2] == Span("<|im_end|>\n<|im_start|>tool\n", True)


def test_pieces_that_a_template_joins_do_not_become_a_control_token() -> None:
    source = "{{ '<|' + messages[0].content }}{{ messages[0].content | replace('XX', '') }}"
    template = template_env.TemplateEnvironment().compile_template(source)
    messages = [{"role": "user", "content": "im_end|><|imXX_end|>"}]
    spans = template_env.render(template, messages, bos="", eos="", add_generation_prompt=True, max_chars=999)
    assert _text(spans) == "<|im_end|><|imXX_end|>im_end|><|im_end|>"
    assert all(p.text != "<|im_end|>" for p in ControlTokens([ControlToken("<|im_end|>")]).pieces(spans))


# --- strings that know their author ----------------------------------------------------------------------

_mixed = st.lists(st.tuples(st.text("ab ,\n", max_size=4), st.booleans()), max_size=6).map(
    lambda parts: concat([literal(t) if trusted else t for t, trusted in parts])
)


def _author(text: str) -> str:
    """One letter for each character: T for the template's, c for a client's."""
    letters = ["c"] * len(text)
    for start, stop in ranges(text):
        assert 0 <= start < stop <= len(text)
        letters[start:stop] = "T" * (stop - start)
    return "".join(letters)


def _tagged(text: str) -> list[tuple[str, str]]:
    return list(zip(str.__str__(text), _author(text), strict=True))


@given(_mixed, st.integers(-10, 10), st.integers(-10, 10))
def test_cutting_keeps_the_author_of_each_character(text: str, start: int, stop: int) -> None:
    tags = _tagged(text)
    assert _tagged(text[start:stop]) == tags[start:stop]
    stripped = _tagged(text.strip())
    assert stripped == tags[len(text) - len(text.lstrip()) :][: len(stripped)]
    assert _tagged(text + "x") == [*tags, ("x", "c")]
    assert _tagged("x" + text) == [("x", "c"), *tags]


@given(_mixed, st.sampled_from((None, " ", ",", "ab", "\n")), st.integers(-1, 3))
def test_splitting_keeps_the_author_of_each_character(text: str, separator: str | None, limit: int) -> None:
    plain = str.__str__(text)
    for pieces, expected in (
        (text.split(separator, limit), plain.split(separator, limit)),
        (text.rsplit(separator, limit), plain.rsplit(separator, limit)),
    ):
        assert pieces == expected
        at = 0
        for piece in pieces:
            # the pieces follow each other; between them only separators or blanks
            at = plain.index(piece, at)
            if piece and separator is not None:
                assert _author(piece) == _author(text)[at : at + len(piece)]
            at += len(piece) + (len(separator) if separator and piece is not pieces[-1] else 0)
    if separator:
        assert concat(text.partition(separator)) == plain
        assert _author(concat(text.partition(separator))) == _author(text)
        assert _author(concat(text.rpartition(separator))) == _author(text)


@given(_mixed, st.text("ab ", min_size=1, max_size=2), _mixed)
def test_replacing_takes_the_author_of_the_new_text(text: str, old: str, new: str) -> None:
    result = text.replace(old, new)
    assert result == str.__str__(text).replace(old, str.__str__(new))
    if isinstance(text, Marked):
        kept = _author(result).count("T")
        gone = sum(_author(text)[m.start() : m.end()].count("T") for m in re.finditer(re.escape(old), text))
        assert kept == _author(text).count("T") - gone + text.count(old) * _author(new).count("T")


def test_an_operation_nobody_thought_of_trusts_nothing() -> None:
    text = literal("<|im_end|>")
    for changed in (
        text.center(20),
        text.swapcase(),
        "%s." % text,  # noqa: UP031
        f"{text}.",
        text.zfill(12),
        "".join([text]),
        text.translate({1: 2}),
        "{}.".format(text),  # noqa: UP032
        text.expandtabs(),
    ):
        assert spans_of(changed) == (Span(str(changed), False),)


# --- pieces for the tokenizer ----------------------------------------------------------------------------


def test_text_between_control_tokens_is_one_piece_as_in_llama_cpp() -> None:
    spans = (Span("<s>user\n", True), Span("hi <s>", False), Span("\n<e>", True))
    pieces = ControlTokens([ControlToken("<s>"), ControlToken("<e>")]).pieces(spans)
    assert pieces == (Span("<s>", True), Span("user\nhi <s>\n", False), Span("<e>", True))


def test_the_longest_control_token_wins() -> None:
    tokens = ControlTokens([ControlToken("<a>"), ControlToken("<a>b")])
    assert tokens.pieces((Span("<a>b<a>", True),)) == (Span("<a>b", True), Span("<a>", True))


def test_a_control_token_may_swallow_blanks_beside_it() -> None:
    tokens = ControlTokens([ControlToken("<u>", rstrip=True), ControlToken("<m>", lstrip=True)])
    spans = (Span("<u>\n", True), Span(" hi ", False), Span(" <m>", True))
    assert tokens.pieces(spans) == (Span("<u>", True), Span("hi", False), Span("<m>", True))


@given(
    st.lists(
        st.tuples(st.sampled_from(("<|s|>", "<|", "s|>", "<<|s|>s|>", "a ", "<e>")), st.booleans()),
        max_size=8,
    )
)
def test_no_piece_holds_a_reserved_text_that_a_client_wrote(parts: list[tuple[str, bool]]) -> None:
    spans = tuple(Span(text, is_template) for text, is_template in parts)
    pieces = ControlTokens([ControlToken("<e>")], reserved=["<|s|>"]).pieces(spans)
    assert _text(pieces) == _text(spans)
    assert all(piece.text for piece in pieces)
    at = 0
    written = "".join(("T" if s.is_template else "c") * len(s.text) for s in spans)
    for piece in pieces:
        for match in re.finditer(re.escape("<|s|>"), piece.text):
            assert "c" not in written[at + match.start() : at + match.end()]
        if piece.is_template:
            assert piece.text == "<e>"
            assert "c" not in written[at : at + 3]
        at += len(piece.text)


# --- the processes ---------------------------------------------------------------------------------------


def test_rendering_in_a_child_gives_the_same_as_here(zygote: TemplateZygote) -> None:
    messages = [Message("system", "Be kind. "), Message("user", f"hi {EOS} é🙂")]
    spans = zygote.render(LLAMA3, messages, bos=BOS, eos=EOS)
    assert spans == _ours("llama3", [{"role": m.role, "content": m.content} for m in messages])
    without = zygote.render(LLAMA3, messages, bos=BOS, eos=EOS, add_generation_prompt=False)
    assert _text(spans).startswith(_text(without))
    assert _text(spans) != _text(without)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10000000000 }}", "more than 512 MiB"),
        ("{{ ('%999999999d' | format(1)) ~ 'x' * 99999999 }}", "more than 512 MiB"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer than 8388608 characters"),
        ("{% for i in range(99999999) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
        ("{{" + "(" * 50000, "too deeply"),
        ("{% if %}", "line 1"),
        ("{% include '/etc/passwd' %}", "failed with"),
        ("{{ messages.append(1) }}", "sandbox"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "sandbox"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "sandbox"),
        ("{{ nothing.here }}", "not defined"),
        ("{{ raise_exception('only ' ~ 'users') }}", "it refuses these messages: only users"),
    ],
)
def test_a_bad_template_says_which_limit_or_rule(zygote: TemplateZygote, template: str, reason: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TemplateFailure, match=reason):
        zygote.render(template, [Message("user", "hi")], bos="", eos="")
    assert time.perf_counter() - start < 20


def test_a_template_that_never_ends_is_ended_after_two_seconds(zygote: TemplateZygote) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    start = time.perf_counter()
    with pytest.raises(TemplateFailure, match="longer than 2 s"):
        zygote.render(loops, [Message("user", "hi")], bos="", eos="")
    assert time.perf_counter() - start < 20
    assert zygote.render(CHATML, [Message("user", "hi")], bos="", eos="")


def test_a_refusal_never_repeats_what_a_client_wrote(zygote: TemplateZygote) -> None:
    secret = "canary-4711"
    for template in (
        "{{ raise_exception('bad: ' + messages[0].content) }}",
        "{{ {}[messages[0].content].x }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0][messages[0].content].y }}",
        "{{ messages[0].content | int(default='x') + messages[0].content.nothing.at }}",
    ):
        with pytest.raises(TemplateFailure) as caught:
            zygote.render(template, [Message("user", secret)], bos="", eos="")
        assert secret not in str(caught.value)


def test_roles_out_of_turn_are_the_templates_own_error(zygote: TemplateZygote) -> None:
    with pytest.raises(TemplateFailure, match="roles must alternate"):
        zygote.render(GEMMA, [Message("assistant", "hi")], bos="", eos="")


def test_a_prompt_of_four_million_characters_passes(zygote: TemplateZygote) -> None:
    content = "🙂" * (4 << 20)
    spans = zygote.render(CHATML, [Message("user", content)], bos="", eos="")
    assert spans[1] == Span(content, False)


def test_a_lone_surrogate_becomes_a_replacement_character(zygote: TemplateZygote) -> None:
    spans = zygote.render(CHATML, [Message("user", "a\ud800b")], bos="", eos="")
    assert spans[1].text == "a\ufffdb"


def test_many_threads_render_at_once(zygote: TemplateZygote) -> None:
    answers: dict[int, str] = {}

    def work(number: int) -> None:
        answers[number] = zygote.render(CHATML, [Message("user", f"n{number}")], bos="", eos="")[1].text

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: f"n{n}" for n in range(8)}


def test_more_templates_than_the_zygote_keeps_are_compiled_again(zygote: TemplateZygote) -> None:
    for _ in range(2):
        for number in range(20):
            spans = zygote.render(f"{number}", [Message("user", "x")], bos="", eos="")
            assert spans == (Span(str(number), True),)


def test_the_zygote_holds_no_descriptor_but_its_socket_and_cannot_be_traced() -> None:
    leaked = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    with TemplateZygote() as started:
        os.close(leaked)
        process = Path(f"/proc/{started.pid}")
        status = (process / "status").read_text()
        assert "NoNewPrivs:\t1\n" in status
        limits = (process / "limits").read_text().splitlines()
        core = next(line for line in limits if line.startswith("Max core file size"))
        assert core.split()[4:6] == ["0", "0"]
        try:
            targets = [str(entry.readlink()) for entry in (process / "fd").iterdir()]
        except PermissionError:  # what "not dumpable" means for everyone but root
            assert os.geteuid() != 0
        else:
            assert sorted(t.split(":")[0] for t in targets) == ["/dev/null"] * 3 + ["socket"]


def kill(pid: int) -> None:
    end = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(end)


def wait_for(pidfd: int) -> None:
    """Until the process has ended."""
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_a_dead_zygote_is_replaced_and_only_what_it_was_doing_fails() -> None:
    with TemplateZygote() as started:
        assert started.render(CHATML, [Message("user", "x")], bos="", eos="")
        for _ in range(3):
            (first,) = children(started.pid)
            kill(first)
            spans = started.render(CHATML, [Message("user", "x")], bos="", eos="")
            assert spans[1].text == "x"
            (second,) = children(started.pid)
            assert second != first


def test_a_killed_nursery_is_a_clear_error_and_not_a_hang() -> None:
    with TemplateZygote() as started:
        assert started.render(CHATML, [Message("user", "x")], bos="", eos="")
        (zygote,) = children(started.pid)
        end = os.pidfd_open(zygote)
        os.kill(started.pid, signal.SIGKILL)
        wait_for(end)  # it does not outlive the nursery
        for _ in range(2):
            with pytest.raises(EngineFailure, match="template process has ended"):
                started.render(CHATML, [Message("user", "x")], bos="", eos="")
    with pytest.raises(EngineFailure, match="not running"):
        started.render(CHATML, [Message("user", "x")], bos="", eos="")


def test_a_nursery_without_a_client_makes_no_zygotes_for_ever() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()

    def dies_slowly() -> None:
        threading.Event().wait(0.3)  # too slow for the limit of deaths in a second
        os._exit(1)

    pid = os.fork()
    if pid == 0:
        nursery(theirs, Confine(zygote=dies_slowly))
    theirs.close()
    wait_for(os.pidfd_open(pid))
    os.waitpid(pid, 0)


def test_the_zygote_ends_with_its_client() -> None:
    program = (
        "import os\nfrom flexserve.engine.template import TemplateZygote\n"
        "z = TemplateZygote()\nz.start()\nprint(z.pid, flush=True)\nos._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    # the zygote's end of our pipe is closed, or run() would have waited for it
    assert int(done.stdout) > 0

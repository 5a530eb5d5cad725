"""`flexserve run`, over the fake world: its own, and a server's."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from flexserve.cli.main import cli
from flexserve.core import Request
from flexserve.engine.fake import FakeEngine, Script, SystemClock
from flexserve.errors import EngineFailure
from flexserve.worlds.fake import FakeGeneration, FakeWorld

from ..schemas import validate
from ..server.running import Running, serving
from .conftest import Shell

PROGRAM = [sys.executable, "-c", "from flexserve.cli import main; main()"]
RUN = "run demo.flex --world fake"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A running server at the admin socket of the environment."""
    scripts = {"fail": Script("half", EngineFailure("the engine stopped"))}
    with serving(tmp_path, FakeWorld(FakeEngine(scripts, clock=SystemClock(), token_s=0.01))) as running:
        monkeypatch.setenv("FLEXSERVE_ADMIN_SOCKET", str(running.admin))
        yield running


def piped(line: str, data: bytes) -> tuple[int, str, str]:
    """Call `flexserve LINE` with this on stdin."""
    result = CliRunner().invoke(cli, line.split(), input=data, prog_name="flexserve")
    return result.exit_code, result.stdout, result.stderr


def test_the_answer_goes_to_stdout_and_its_times_to_stderr(demo: Shell) -> None:
    result = demo(RUN, "Wake me, Zoë!")
    assert (result.exit_code, result.stdout) == (0, "Wake me, Zoë!\n")
    assert "tokens, first after" in result.stderr
    assert result.stderr.count("\n") == 1


def test_verbose_shows_where_the_time_went(demo: Shell) -> None:
    lines = demo(f"{RUN} --verbose", "hello").stderr.splitlines()
    assert [line.split("  ")[0] for line in lines if line[0] != " "] == (
        ["start", "register", "queue", "tokenize", "prefill", "first token", "decode", "total"]
    )
    assert "8.4 MB" in "\n".join(lines)


def test_json_is_one_object_that_follows_its_schema(demo: Shell) -> None:
    answer = demo.json(f"{RUN} --json --temperature 0 --max-tokens 5", "hello world")
    validate("run", answer)
    assert [*answer] == ["text", "token_ids", "finish_reason", "timings"]
    assert answer["text"] == "hello"
    assert bytes(answer["token_ids"]) == b"hello"
    assert answer["finish_reason"] == "length"


def test_an_error_leaves_stdout_empty_in_json_too(demo: Shell) -> None:
    for more in ("", "--json"):
        result = demo(f"{RUN} --max-tokens 4096 {more}", "hello")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "(context_overflow)" in result.stderr
        assert "hint: " in result.stderr


def test_a_prompt_can_be_piped_in(demo: Shell) -> None:
    assert piped(RUN, "Zoë\n\n".encode())[:2] == (0, "Zoë\n")
    assert piped(f"{RUN} -", b"two words")[:2] == (0, "two words\n")
    code, out, err = piped(RUN, b"\n")
    assert (code, out) == (2, "")
    assert err == ("error: the prompt is empty (usage)\nhint: give it as an argument, or pipe it in\n")
    assert piped(RUN, b"\xff")[2] == "error: the prompt on stdin is not UTF-8 (usage)\n"


def test_options_reach_the_request(server: Running, demo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the server, because its world is ours to look into."""
    seen: list[Request] = []
    generate = server.world.generate

    def watched(request: Request) -> FakeGeneration:
        seen.append(request)
        return generate(request)

    monkeypatch.setattr(server.world, "generate", watched)
    line = "run demo --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.2 --repeat-penalty 1.1 --seed 3"
    demo.ok(f"{line} --max-tokens 9 --stop x --stop y --system Short.", "hello")
    demo.ok("run demo --raw", "hello")
    first, second = seen
    s = first.sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repeat_penalty, s.seed) == (0.5, 7, 0.9, 0.2, 1.1, 3)
    assert (first.max_tokens, first.stop) == (9, ("x", "y"))
    assert [(m.role, m.content) for m in first.messages or ()] == [("system", "Short."), ("user", "hello")]
    assert (second.messages, second.prompt) == (None, "hello")


def test_a_servers_model_is_run_by_its_name(server: Running, demo: Shell) -> None:
    assert demo.ok("run demo", "hello") == "hello\n"
    answer = demo.json("run demo --json", "hello")
    validate("run", answer)
    assert bytes(answer["token_ids"]) == b"hello"
    assert answer["timings"]["output_tokens"] == 5
    assert server.world.status().models[0].requests == 2


def test_a_servers_error_is_the_same_error(server: Running, demo: Shell) -> None:
    result = demo("run demo", "fail")
    assert (result.exit_code, result.stdout) == (7, "half")
    assert result.stderr == "error: the engine stopped (engine_failed)\n"
    assert "(context_overflow)" in demo.fails(2, "run demo --max-tokens 5000", "x")
    assert "the server has only demo" in demo.fails(3, "run other", "x")


def test_a_server_that_stops_half_way_is_one_clear_error(server: Running, demo: Shell) -> None:
    with subprocess.Popen([*PROGRAM, "run", "demo", "x" * 2000], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"xxxx"
        server.stop()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert err.startswith(b"error: the server was told to stop while it was answering (shutting_down)")


@pytest.mark.parametrize("verb", ["run", "embed"])
@pytest.mark.parametrize("option", ["--context 64", "--device-key d.key", "--world fake", "--license m.lic"])
def test_what_only_a_file_can_use_is_refused_with_a_servers_model(
    demo: Shell, verb: str, option: str
) -> None:
    error = demo.fails(2, f"{verb} demo {option} x")
    assert (
        f"error: {option.split(maxsplit=1)[0]}: only for a sealed model file, not for a server's model"
        in error
    )


def test_a_device_key_in_the_environment_disturbs_no_servers_model(
    server: Running, demo: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXSERVE_DEVICE_KEY", "device.key")
    assert demo.ok("run demo", "hello") == "hello\n"


def test_a_session_is_refused_with_a_file_which_would_forget_it(demo: Shell) -> None:
    assert "error: --session is for a server's model" in demo.fails(2, f"{RUN} --session chat", "x")


@pytest.mark.parametrize("verb", ["run", "embed"])
def test_a_directory_is_no_model(demo: Shell, verb: str) -> None:
    (demo.directory / "models").mkdir()
    error = demo.fails(2, f"{verb} models --world fake", "x")
    assert error.startswith("error: models is a directory (usage)\nhint: give the .flex file")


def test_a_name_that_is_no_file_and_no_server_says_both(demo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXSERVE_ADMIN_SOCKET", str(demo.directory / "none.sock"))
    error = demo.fails(3, "run nothing", "x")
    assert "'nothing' is no file, and no FlexServe server" in error
    assert "(not_found)" in error


def test_the_licence_is_looked_for_beside_the_model(demo: Shell) -> None:
    (demo.directory / "demo.lic").rename(demo.directory / "mine.lic")
    error = demo.fails(3, RUN, "x")
    assert error.startswith("error: there is no licence demo.lic (not_found)\nhint: ")
    assert demo.ok(f"{RUN} --license mine.lic", "x") == "x\n"
    assert "no licence other.lic" in demo.fails(3, f"{RUN} --license other.lic", "x")
    assert "no sealed model none.flex" in demo.fails(3, "run none.flex --world fake", "x")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("--temperature -1", "temperature must be"),
        ("--top-p 0", "top_p must be"),
        ("--max-tokens 0", "max_tokens must be"),
        ("--seed -1", "seed must be"),
        ("--raw --system s", "--raw has no place for a system message"),
        ("--threads 0", "invalid value for '--threads'"),
        ("--world moon", "invalid value for '--world'"),
    ],
)
def test_bad_values_are_refused_before_anything_starts(demo: Shell, options: str, what: str) -> None:
    assert what in demo.fails(2, f"run absent.flex {options}", "x")


def test_the_linux_world_asks_for_a_device_key(demo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXSERVE_DEVICE_KEY", raising=False)
    assert "the linux world needs a device key" in demo.fails(2, "run demo.flex", "x")


def test_a_context_longer_than_the_model_was_trained_with_is_warned_about(sealed: Shell) -> None:
    trained = sealed.json("inspect m.flex --json")["context_tokens"]
    line = "run m.flex x --raw --device-key device.key --vendor-pub vendor.pub --max-tokens 1 --threads 1"
    usual, longer = sealed(line), sealed(f"{line} --context {trained * 2}")
    assert (usual.exit_code, longer.exit_code) == (0, 0)
    assert "warning" not in usual.stderr
    assert (
        f"warning: m was trained with contexts of {trained} tokens, and --context gives it {trained * 2}"
        in longer.stderr
    )


class Terminal:
    """`flexserve` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [*PROGRAM, *arguments])
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str) -> str:
        """Wait until `text` appears after what was expected before; everything up to it."""
        deadline = time.monotonic() + 60
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} never came, but {self.seen!r}"
            assert self._read(), f"it ended without {text!r}: {self.seen!r}"
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt(self, text: str) -> None:
        """Ctrl-C at a prompt until `text` appears: CPython's readline does not notice one that comes between
        drawing the prompt and waiting for a key, until the next key."""
        for _ in range(10):
            self.type("\x03")
            if select.select([self._fd], [], [], 1)[0]:
                break
        self.expect(text)

    def end(self) -> int:
        """Its exit code."""
        while self._read():
            pass
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        ready, _, _ = select.select([self._fd], [], [], 60)
        assert ready, f"nothing came, after {self.seen!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # its side is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)


def test_without_a_prompt_it_talks_and_remembers(demo: Shell) -> None:
    terminal = Terminal(*RUN.split())
    terminal.expect("Ctrl-D ends")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("\nhello\r\n[")
    first = terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("\nhello\r\n[")
    second = terminal.expect("> ")
    assert first.startswith("7 + 5 tokens")
    assert second.startswith("21 + 5 tokens"), "the conversation is part of the prompt"
    terminal.type("/clear\n")
    terminal.expect("forgotten")
    terminal.type("hello\n")
    terminal.expect("[7 + 5 tokens")
    terminal.type("/help\n")
    terminal.expect("there are /clear and /exit")
    terminal.expect("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_but_not_the_talk(demo: Shell) -> None:
    terminal = Terminal(*RUN.split())
    terminal.expect("> ")
    terminal.type("x" * 1000 + "\n")
    terminal.expect("\r\nxx")
    terminal.type("\x03")
    terminal.expect("[cancelled]")
    terminal.expect("> ")
    terminal.interrupt("> ")
    terminal.type("hello\n")
    terminal.expect("\nhello\r\n[")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_hangs_up_on_a_server(server: Running, demo: Shell) -> None:
    terminal = Terminal("run", "demo")
    terminal.expect("> ")
    terminal.type("x" * 1000 + "\n")
    terminal.expect("\r\nxx")
    (generation,) = server.world.in_flight()
    terminal.type("\x03")
    terminal.expect("[cancelled]")
    assert generation.wake.wait(30)
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_during_a_single_answer_keeps_what_came_and_is_exit_130(demo: Shell) -> None:
    with subprocess.Popen([*PROGRAM, *RUN.split(), "x" * 2000], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        start = process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (start + rest).strip(b"x") == b"\n"
    assert len(rest) < 1000
    assert err == b"[cancelled]\n"


def test_an_answer_cannot_drive_the_terminal(demo: Shell) -> None:
    terminal = Terminal(*RUN.split(), "--raw", "a\x1b[2Jb\x07c\u202ed\x9be")
    terminal.expect("a\ufffd[2Jb\ufffdc\ufffdd\ufffde")
    assert terminal.end() == 0
    assert demo.ok(f"{RUN} --raw", "a\x1bb") == "a\x1bb\n", "into a pipe it goes as it is"

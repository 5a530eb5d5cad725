"""`flexserve serve`, `ps` and `list`: a real process, over the fake world."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest

from flexserve.engine.fake import FakeEngine
from flexserve.errors import Usage
from flexserve.worlds import WorldOptions
from flexserve.worlds.base import World
from flexserve.worlds.fake import BUDGET, FakeWorld, write_fake_model

from ..schemas import validate
from .conftest import Shell

PROGRAM = [sys.executable, "-c", "from flexserve.cli import main; main()"]
SERVE = "serve --world fake --port 0 --model demo=demo.flex"
READY = "FlexServe is ready at "


class Served:
    """A server process that is ready."""

    def __init__(self, line: str) -> None:
        self.process = subprocess.Popen([*PROGRAM, *line.split()], stdout=-1, stderr=-1, text=True)
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        assert self.ready.startswith(READY), self.process.communicate(timeout=60)
        self.url = self.ready.removeprefix(READY).split()[0]

    def end(self, number: int = signal.SIGTERM) -> str:
        """What it said on stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        assert (self.process.returncode, out) == (0, "")
        return err


Serve = Callable[..., Served]


@pytest.fixture
def demo(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell with demo.flex and demo.lic for the fake world, and an admin socket of its own."""
    write_fake_model(shell.directory, "demo")
    private = shell.directory / "p"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("FLEXSERVE_ADMIN_SOCKET", str(private / "a.sock"))
    return shell


@pytest.fixture
def serve(demo: Shell) -> Iterator[Serve]:
    """Start a server, which is killed if the test leaves it running."""
    started: list[Served] = []

    def start(more: str = "") -> Served:
        started.append(Served(f"{SERVE} {more}"))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.kill()
            served.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_answers_and_leaves_nothing_behind(
    serve: Serve, demo: Shell, number: int
) -> None:
    served = serve()
    assert served.ready == f"{READY}{served.url} with demo\n"
    answer = httpx.post(f"{served.url}/v1/completions", json={"model": "demo", "prompt": "hello"})
    assert answer.json()["choices"][0]["text"] == "hello"
    err = served.end(number)
    assert "demo: demo version 1, 8.4 MB, registered in" in err
    assert "protection: fake world: NOTHING is protected" in err
    assert "hello" not in err
    assert not (demo.directory / "p" / "a.sock").exists()


def test_ps_and_list_ask_the_running_server(serve: Serve, demo: Shell) -> None:
    served = serve("--model other=demo.flex,demo.lic")
    listed = demo.json("list --json")
    validate("list", listed)
    assert [m["name"] for m in listed["models"]] == ["demo", "other"]
    demo.ok("run other", "hello")
    status = demo.json("ps --json")
    validate("ps", status)
    assert (status["world"], status["pid"]) == ("fake", served.process.pid)
    assert [m["requests"] for m in status["models"]] == [0, 1]
    head, *rows = demo.ok("list").splitlines()
    assert head.split() == ["NAME", "MODEL", "ARCH", "QUANT", "PARAMS", "CONTEXT", "WEIGHTS", "CHAT"]
    assert rows[0].split() == ["demo", "demo", "v1", "fake", "none", "8.4M", "4096", "8.4", "MB", "yes"]
    ps = demo.ok("ps")
    assert f"fake world, process {served.process.pid}, up " in ps
    assert "8.4 MB (100 %)" in ps
    assert "never" in ps


def test_ps_and_list_without_a_server_say_how_to_start_one(demo: Shell) -> None:
    for verb in ("ps", "list", "ps --json"):
        error = demo.fails(3, verb)
        assert "(server_not_found)\nhint: start one with `flexserve serve`" in error


def test_a_second_server_on_the_same_admin_socket_is_refused(serve: Serve, demo: Shell) -> None:
    serve()
    error = demo.fails(2, SERVE)
    assert "another FlexServe server uses the admin socket" in error
    assert "(address_in_use)" in error
    assert demo.json("list --json")["models"], "the first one is not disturbed"


def test_a_port_in_use_is_found_out_before_models_are_loaded(demo: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = demo.fails(2, f"serve --world fake --model demo=demo.flex --port {port}")
    assert error.endswith(  # as root, a warning about the gateway's user may come first
        f"error: port {port} on 127.0.0.1 is in use (address_in_use)\n"
        f"hint: choose another with --port, e.g. {port % 65535 + 1}\n"
    )


def test_what_can_be_seen_at_once_is_said_before_anything_is_measured(
    sealed: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("it calibrates")

    monkeypatch.setattr("flexserve.cli.serve.tuned", measure)
    private = sealed.directory / "p"
    private.mkdir(mode=0o700)
    monkeypatch.setenv("FLEXSERVE_ADMIN_SOCKET", str(private / "a.sock"))
    monkeypatch.delenv("FLEXSERVE_DEVICE_KEY", raising=False)
    line = "serve --port 0 --model m=m.flex"
    assert "needs a device key" in sealed.fails(2, line)
    assert "there is no key file none.key" in sealed.fails(3, f"{line} --device-key none.key")
    assert "is a public key" in sealed.fails(6, f"{line} --device-key device.pub")
    assert "is not an address" in sealed.fails(2, f"{line} --device-key device.key --host 192.0.2.1")
    sealed.fails(2, f"{line} --device-key device.key --user no-such-user")
    (sealed.directory / "m.flex").write_bytes(b"GGUF" + bytes(1000))
    assert "plain GGUF" in sealed.fails(4, f"{line} --device-key device.key")
    (sealed.directory / "device.key").chmod(0o644)
    assert "(key_permissions)" in sealed.fails(6, f"{line} --device-key device.key")
    assert [p.name for p in private.glob("*.sock")] == []


def test_a_model_that_is_refused_ends_the_start_and_frees_the_sockets(demo: Shell) -> None:
    write_fake_model(demo.directory, "foreign", vendor="nobody")
    assert "(vendor_not_trusted)" in demo.fails(4, f"{SERVE} --model f=foreign.flex")
    write_fake_model(demo.directory, "theirs", device="another")
    assert "(licence_wrong_device)" in demo.fails(5, f"{SERVE} --model t=theirs.flex")
    assert "(not_found)" in demo.fails(3, f"{SERVE} --model a=absent.flex")
    assert [p.name for p in (demo.directory / "p").glob("*.sock")] == []


NOT_MODELS = ["demo.flex", "=demo.flex", "demo=", "demo=a,", "a\x07=demo.flex", "n" * 129 + "=x"]
NOT_MODELS += ["m=a.flex,a.lic,foo", "m=a.flex,scale=2", "m=a.flex,a.lic,scale=2", "m=a.flex,a.lic,"]
NOT_MODELS += ["m=a.flex,adapter=b.flex,b.lic,foo", "m=a.flex,adapter=b.flex,adapter=c.flex"]


@pytest.mark.parametrize("value", NOT_MODELS)
def test_a_model_option_of_another_form_is_refused(demo: Shell, value: str) -> None:
    error = demo.fails(2, "serve --world fake --model", value)
    assert "invalid value for '--model'" in error
    assert "NAME=M.flex[,M.lic][,adapter=A.flex[,A.lic][,scale=S]]" in error or not value.isprintable()


def test_two_models_of_one_name_are_refused(demo: Shell) -> None:
    assert "two models have the same name" in demo.fails(2, f"{SERVE} --model demo=demo.flex")


def test_a_pinned_model_must_be_one_of_those_that_are_served(demo: Shell) -> None:
    error = demo.fails(2, f"{SERVE} --pin other")
    assert "--pin 'other' names none of the models" in error
    assert "hint: there are demo" in error


def test_prefetch_and_pins_reach_the_world(demo: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[WorldOptions] = []

    def make_world(_name: str, options: WorldOptions) -> World:
        asked.append(options)
        raise Usage("that is enough")

    monkeypatch.setattr("flexserve.cli.serve.make_world", make_world)
    demo.fails(2, f"{SERVE} --no-prefetch --pin demo --pin demo")
    demo.fails(2, SERVE)
    assert [(o.prefetch, o.pinned) for o in asked] == [(False, ("demo",)), (True, ())]


def test_the_memory_limits_hold_from_the_start(serve: Serve, demo: Shell) -> None:
    serve("--budget 512M --hard 600M --floor 1M")
    out = demo.json("budget --json")
    assert (out["soft_bytes"], out["hard_bytes"], out["floor_bytes"]) == (512 << 20, 600 << 20, 1 << 20)


@pytest.mark.parametrize("world", ["fake", "linux --device-key d.key --no-calibrate"])
def test_memory_limits_that_contradict_each_other_end_the_start(demo: Shell, world: str) -> None:
    error = demo.fails(2, f"serve --world {world} --model demo=demo.flex --floor 2G --hard 1G")
    assert f"the floor of {2 << 30} bytes is above the hard cap of {1 << 30} bytes (invalid_request)" in error


def test_a_budget_with_which_no_model_answers_ends_the_start(
    demo: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(_name: str, options: WorldOptions) -> World:
        return FakeWorld(FakeEngine(), budget=options.limits(BUDGET), least_bytes={"demo": 6 << 20})

    monkeypatch.setattr("flexserve.cli.serve.make_world", small)
    assert f"with a budget of {2 << 20} bytes no model answers" in demo.fails(2, f"{SERVE} --hard 2M")


def test_listening_beyond_loopback_is_warned_about_loudly(serve: Serve) -> None:
    err = serve("--host 0.0.0.0").end()
    assert "open to the network: prompts and answers cross it in clear" in err
    assert "everybody who reaches it may use it: give --api-key-file FILE" in err


def test_an_api_key_is_asked_for_and_never_shown(serve: Serve, demo: Shell) -> None:
    key = "0123456789abcdef0123456789abcdef"
    path = demo.directory / "api.key"
    path.write_text(key + "\n")
    path.chmod(0o600)
    served = serve(f"--host 0.0.0.0 --api-key-file {path}")
    url = served.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    err = served.end()
    assert key not in err
    assert "everybody" not in err


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [
        ("0123456789abcdef", 0o644, "key_permissions"),
        ("short", 0o600, "key_malformed"),
        ("two words 0123456789", 0o600, "key_malformed"),
        ("", 0o600, "key_malformed"),
    ],
)
def test_a_bad_api_key_file_is_refused(demo: Shell, content: str, mode: int, code: str) -> None:
    path = demo.directory / "api.key"
    path.write_text(content)
    path.chmod(mode)
    error = demo.fails(6, f"{SERVE} --api-key-file", path)
    assert f"({code})\nhint: " in error
    assert content not in error or not content


def test_a_host_name_given_is_answered(serve: Serve) -> None:
    served = serve("--allow-host box.lan")
    assert httpx.get(f"{served.url}/health", headers={"host": "box.lan"}).status_code == 200
    assert httpx.get(f"{served.url}/health", headers={"host": "other.lan"}).status_code == 403


def test_a_server_killed_outright_does_not_block_the_next(serve: Serve, demo: Shell) -> None:
    first = serve()
    first.process.kill()
    first.process.communicate(timeout=60)
    assert (demo.directory / "p" / "a.sock").exists()
    assert "no FlexServe server answers" in demo.fails(3, "ps")
    serve()
    assert demo.ok("ps")


def test_a_signal_while_models_are_registered_cleans_up(demo: Shell) -> None:
    fifo = demo.directory / "never.flex"
    os.mkfifo(fifo)
    (demo.directory / "never.lic").write_text("{}")
    process = subprocess.Popen(
        [*PROGRAM, *SERVE.split(), "--model", "never=never.flex"], stdout=-1, stderr=-1, text=True
    )
    writer = os.open(fifo, os.O_WRONLY)  # waits until the server opens it, that is registers
    process.terminate()
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert err.endswith("error: interrupted\n")
    assert not (demo.directory / "p" / "a.sock").exists()

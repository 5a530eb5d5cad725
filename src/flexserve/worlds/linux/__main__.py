"""Start-up of the secure process, in the order that matters: harden, fork the template nursery, load the rest,
read the keys, confine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from ...engine.template import TemplateZygote
from ...engine.template_process import Confine
from ...errors import EngineFailure
from ...flexmem import processors  # noqa: F401 - notes them, before llama.cpp is loaded
from ...sealed.secret import use_ordinary_memory
from .channel import Channel, ChannelBroken, Measures, ToSecure, failed
from .hardening import (
    clean_environment,
    close_other_descriptors,
    confine,
    confine_nursery,
    confine_template,
    confine_zygote,
    harden,
)
from .users import free_user, may_change_user

INSECURE = "--insecure-no-hardening"


def main() -> None:
    """Run the secure world on the socket whose descriptor is the first argument."""
    # Ctrl-C and what stops a service reach the whole group: the normal world saves, and then closes the channel.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    fd = int(sys.argv[1])
    close_other_descriptors(fd)
    channel = Channel(socket.socket(fileno=fd), ToSecure)
    status = 0
    try:
        _run(channel, hardened=INSECURE not in sys.argv[2:])
    except EngineFailure as error:
        if not isinstance(error, ChannelBroken):
            with contextlib.suppress(OSError):  # the channel may be shut
                channel.send(failed(error, call=0))
        status = 70
    except OSError:
        status = 70
    os._exit(status)  # compute may be in the middle of a decode: nothing of it is needed any more


def _run(channel: Channel, *, hardened: bool) -> None:
    if hardened:
        harden()
    user = free_user() if hardened and may_change_user() else None
    clean_environment()
    if hardened:
        zygote = TemplateZygote(Confine(lambda: confine_nursery(user), confine_zygote, confine_template))
    else:
        use_ordinary_memory()
        zygote = TemplateZygote()
    zygote.start()  # forks: before there are threads, keys or plaintext
    try:
        # Only now: it loads numpy and llama.cpp.
        from .secure import serve

        serve(channel, zygote, lambda: confine(user) if hardened else Measures())
    finally:
        zygote.close()


if __name__ == "__main__":
    main()

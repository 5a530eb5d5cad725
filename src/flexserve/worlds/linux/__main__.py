"""Start-up of the secure process, in the order that matters: harden, fork the template process, then load the rest."""

from __future__ import annotations

import os
import signal
import socket
import sys

from ...engine.template import TemplateZygote
from .hardening import clean_environment, close_other_descriptors, harden

INSECURE = "--insecure-no-hardening"


def main() -> None:
    """Run the secure world on the socket whose descriptor is the first argument."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the normal world, which then closes the channel
    fd = int(sys.argv[1])
    close_other_descriptors(fd)
    if INSECURE not in sys.argv[2:]:
        harden()
    clean_environment()
    zygote = TemplateZygote()
    zygote.start()  # forks: before there are threads, keys or plaintext
    # Only now: these load numpy and llama.cpp.
    from .channel import Channel, ChannelBroken, ToSecure
    from .secure import serve

    status = 0
    try:
        serve(Channel(socket.socket(fileno=fd), ToSecure), zygote)
    except (ChannelBroken, OSError):
        status = 70
    finally:
        zygote.close()
    os._exit(status)  # compute may be in the middle of a decode: nothing of it is needed any more


if __name__ == "__main__":
    main()

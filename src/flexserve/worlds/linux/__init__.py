"""The linux world: the secure world is a hardened process of its own, Flex-Mem a userfaultfd arena in it.

world.py      the normal side: starts the process, talks to it, starts it again when it dies
channel.py    the messages between the two
__main__.py   the secure process's start-up
secure.py     the secure process
hardening.py  what it does to itself first
probe.py      tries to look into it, as another program of the same user
doctor.py     what all that protects on this machine
"""

from .world import LinuxWorld

__all__ = ["LinuxWorld"]

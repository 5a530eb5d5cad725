"""The processors that this process may use, noted before anything binds a thread to one of them.

OpenMP's library binds the thread that loads it (OMP_PROC_BIND), and threads started by a bound one are bound like it:
import this module before llama.cpp.
"""

from __future__ import annotations

import os

PROCESSORS = frozenset(os.sched_getaffinity(0))

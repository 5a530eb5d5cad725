"""The first instructions of the secure process: hide it, then load FlexServe.

Run as a file, with `python -I -S -B`: Python has loaded nothing yet that lies in an installation. Between exec and
the first statement below (about 15 ms) another program of the same user could open or trace the process, which holds
no secret then; `harden` refuses to go on when one traces it.
"""

import ctypes
import resource
import sys

if "--insecure-no-hardening" not in sys.argv[2:]:
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE; harden() checks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
else:  # the worst case, whatever the gateway allows itself
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)

import site

site.main()

from flexserve.worlds.linux.__main__ import main  # noqa: E402

main()

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from flexserve.sealed.keyfile import MIN_SCRYPT_LOG2_N, write_key
from flexserve.sealed.keys import DeviceKey

ASKS = """
import sys
from types import SimpleNamespace
from flexserve.errors import PassphraseWrong
from flexserve.worlds.linux.configured import device_key
try:
    device_key(SimpleNamespace(device_key=sys.argv[1], passphrase_file=None))
except PassphraseWrong as error:
    print(error.hint)
"""


def test_a_protected_key_where_nobody_can_be_asked_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    write_key(path, DeviceKey.generate(), b"hush", log2_n=MIN_SCRYPT_LOG2_N)
    child = subprocess.run(  # a session of its own has no terminal
        [sys.executable, "-c", ASKS, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        timeout=60,
        check=True,
    )
    assert (child.stdout, child.stderr) == (b"give --passphrase-file\n", b"")

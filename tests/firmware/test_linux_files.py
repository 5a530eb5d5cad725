"""What Linux boots from: a device tree and an archive that others can read."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from flexserve.worlds.trustzone.devicetree import MEMORY, flatten, machine_tree
from flexserve.worlds.trustzone.linux import archive


def test_the_tree_has_the_form_of_the_specification() -> None:
    tree = flatten({"a": 1, "text": ("x", "yz"), "flag": None, "child": {"a": (2, 3)}})
    magic, size, body, strings, *_ = struct.unpack(">10I", tree[:40])
    assert (magic, size) == (0xD00DFEED, len(tree))
    assert tree[strings:] == b"a\0text\0flag\0", "a name is stored once"
    assert tree[body : body + 8] == struct.pack(">II", 1, 0)
    assert tree[strings - 4 : strings] == struct.pack(">I", 9)


def test_linux_is_not_told_of_what_stage_2_hides() -> None:
    tree = machine_tree(range(0x48000000, 0x48100000), "quiet")
    assert struct.pack(">IIII", 0, 0x40000000, 0, MEMORY) in tree
    assert MEMORY < 0x3F000000, "memory ends before EL2"
    for hidden in (b"virtio", b"pci", b"fw-cfg", b"flash", b"smmu", b"its@"):
        assert hidden not in tree


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    if shutil.which("cpio") is None:
        pytest.skip("no cpio here: install cpio to check the archive with it")
    data = archive({"bin": (0o040755, b""), "bin/x": (0o100755, b"abc"), "empty": (0o100644, b"")})
    subprocess.run(["cpio", "-id", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "bin" / "x").read_bytes() == b"abc"
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize("size", range(5))
def test_every_part_of_the_archive_is_padded_to_four_bytes(size: int) -> None:
    data = archive({"n" * (size + 1): (0o100644, b"c" * size)})
    assert len(data) % 4 == 0
    assert data.count(b"070701") == 2 and b"TRAILER!!!" in data

"""Writes a flattened device tree (devicetree specification 0.4, chapter 5), and the one of our machine for Linux.

The tree names what stage 2 shows and nothing else: no virtio, no PCI, no fw_cfg, no RTC, and less memory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

Value = str | tuple[str, ...] | tuple[int, ...] | int | None
Node = Mapping[str, "Value | Node"]

MAGIC = 0xD00DFEED
BEGIN_NODE, END_NODE, PROPERTY, END = 1, 2, 3, 9
MEMORY = 0x3EC00000  # of 1 GiB: 16 MiB are EL2's, 2 MiB devices'; 2 MiB stay unused, for comparisons with hidden memory
CLOCK, GIC, CPU0 = 1, 2, 16


def flatten(root: Node) -> bytes:
    """The tree as a kernel reads it. Integers become 32-bit cells, None a property without a value."""
    names: dict[str, int] = {}
    strings = bytearray()
    body = bytearray()

    def name_offset(name: str) -> int:
        if name not in names:
            names[name] = len(strings)
            strings.extend(name.encode() + b"\0")
        return names[name]

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    def node(name: str, content: Node) -> None:
        body.extend(struct.pack(">I", BEGIN_NODE) + padded(name.encode() + b"\0"))
        for key, value in content.items():
            if not isinstance(value, Mapping):
                data = _value(value)
                body.extend(struct.pack(">III", PROPERTY, len(data), name_offset(key)) + padded(data))
        for key, value in content.items():
            if isinstance(value, Mapping):
                node(key, value)
        body.extend(struct.pack(">I", END_NODE))

    node("", root)
    body.extend(struct.pack(">I", END))
    reserve = bytes(16)
    start = 40 + len(reserve)
    size = start + len(body) + len(strings)
    head = (MAGIC, size, start, start + len(body), 40, 17, 16, 0, len(strings), len(body))
    return struct.pack(">10I", *head) + reserve + bytes(body) + bytes(strings)


def _value(value: Value) -> bytes:
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode() + b"\0"
    cells = value if isinstance(value, tuple) else (value,)
    return b"".join(c.encode() + b"\0" if isinstance(c, str) else struct.pack(">I", c) for c in cells)


def machine_tree(files: range, arguments: str, cpus: int = 2, memory: int = MEMORY) -> bytes:
    """The tree for a kernel whose first files lie at the addresses `files`."""
    every_cpu: dict[str, Value | Node] = {
        f"cpu@{i}": {
            "device_type": "cpu",
            "compatible": "arm,cortex-a76",
            "reg": i,
            "enable-method": "psci",
            "phandle": CPU0 + i,
        }
        for i in range(cpus)
    }
    return flatten(
        {
            "#address-cells": 2,
            "#size-cells": 2,
            "interrupt-parent": GIC,
            "model": "flexserve,virt",
            "compatible": "linux,dummy-virt",
            "chosen": {
                "bootargs": arguments,
                "stdout-path": "/pl011@9000000",
                "linux,initrd-start": files.start,
                "linux,initrd-end": files.stop,
            },
            "psci": {"compatible": ("arm,psci-1.0", "arm,psci-0.2"), "method": "smc"},
            "memory@40000000": {"device_type": "memory", "reg": (0, 0x40000000, 0, memory)},
            "cpus": {"#address-cells": 1, "#size-cells": 0, **every_cpu},
            "timer": {
                "compatible": ("arm,armv8-timer", "arm,armv7-timer"),
                "always-on": None,
                "interrupts": (1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4),
            },
            "intc@8000000": {
                "compatible": "arm,gic-v3",
                "interrupt-controller": None,
                "#interrupt-cells": 3,
                "#redistributor-regions": 1,
                "reg": (0, 0x08000000, 0, 0x10000, 0, 0x080A0000, 0, 0x20000 * cpus),
                "phandle": GIC,
            },
            "apb-pclk": {
                "compatible": "fixed-clock",
                "#clock-cells": 0,
                "clock-frequency": 24000000,
                "clock-output-names": "clk24mhz",
                "phandle": CLOCK,
            },
            "pl011@9000000": {
                "compatible": ("arm,pl011", "arm,primecell"),
                "reg": (0, 0x09000000, 0, 0x1000),
                "interrupts": (0, 1, 4),
                "clocks": (CLOCK, CLOCK),
                "clock-names": ("uartclk", "apb_pclk"),
            },
        }
    )

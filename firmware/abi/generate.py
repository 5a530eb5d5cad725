"""Makes the C header, the Python enums and the document of the monitor's interface from monitor.toml.

`python firmware/abi/generate.py` writes them, `--check` says whether they are up to date (exit code 1 when not).
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "firmware" / "abi" / "monitor.toml"
NOTE = "Made by firmware/abi/generate.py from firmware/abi/monitor.toml. Do not edit."

ENUMS = {  # section: (Python class, C prefix, heading)
    "states": ("State", "PAGE_", "Page states"),
    "errors": ("Status", "ABI_", "Status"),
    "messages": ("Message", "MSG_", "Messages to the trusted OS"),
    "services": ("Service", "SVC_", "Services of the trusted OS stub"),
    "request": ("RequestWord", "REQ_", "Words of the request page"),
    "internal": ("Internal", "INT_", "Between the levels of the firmware"),
}
NOTES = {
    "request": "64-bit words from the start of the page at 0x7efff000, normal memory that is never donated. While "
    "protection is off EL3 looks there every 10 ms, and answers at most every 50 ms. Nothing else in the page "
    "means anything.",
}


def c_header(abi: dict[str, Any]) -> str:
    """firmware/include/abi.h."""
    lines = [
        f"/* {NOTE} */",
        "#ifndef ABI_H",
        "#define ABI_H",
        "",
        f"#define ABI_VERSION {abi['version']}",
        "",
    ]
    for name, (value, text) in abi["constants"].items():
        lines.append(f"#define ABI_{name} {value} /* {text} */")
    for section, (_, prefix, heading) in ENUMS.items():
        lines += ["", f"/* {heading} */"]
        lines += [
            f"#define {prefix}{name} {_c(value)} /* {text} */" for name, (value, text) in abi[section].items()
        ]
    for section, prefix in (("calls", "CALL_"), ("secure_calls", "SCALL_")):
        lines += ["", f"/* {section.replace('_', ' ')} */"]
        lines += [f"#define {prefix}{name} {_c(call['id'])}" for name, call in abi[section].items()]
    counts = (("CALLS", _hvc_count(abi)), ("SCALLS", len(abi["secure_calls"])))
    lines += ["", "/* rows the firmware's call tables must have */"]
    lines += [f"#define ABI_{name} {count}" for name, count in counts]
    return "\n".join([*lines, "", "#endif", ""])


def python_module(abi: dict[str, Any]) -> str:
    """src/flexserve/monitor/abi.py."""
    lines = [f'"""The Flex-Monitor\'s interface. {NOTE}"""', "", "from enum import IntEnum", ""]
    lines.append(f"VERSION = {abi['version']}")
    lines += [f"{name} = {value}  # {text}" for name, (value, text) in abi["constants"].items()]
    for section, (cls, _, heading) in ENUMS.items():
        lines += ["", "", f"class {cls}(IntEnum):", f'    """{heading}."""', ""]
        lines += [f"    {name} = {_py(value)}  # {text}" for name, (value, text) in abi[section].items()]
    for section, cls, doc in (
        ("calls", "Call", "Calls of the normal world"),
        ("secure_calls", "SecureCall", "Calls of the trusted OS"),
    ):
        lines += ["", "", f"class {cls}(IntEnum):", f'    """{doc}."""', ""]
        lines += [f"    {name} = {_py(call['id'])}" for name, call in abi[section].items()]
    return "\n".join([*lines, ""])


def document(abi: dict[str, Any]) -> str:
    """docs/monitor-abi.md."""
    out = [
        f"<!-- {NOTE} -->",
        "# The Flex-Monitor's interface",
        "",
        f"Version {abi['version']}. The SMC calling convention: the id in x0, arguments from x1, the status in x0, "
        "results from x1. A status is 0, a negative error, or a positive one: not finished yet. How the calls "
        "travel: [firmware.md](firmware.md).",
        "",
        "## Constants",
        "",
        *_table(
            ("name", "value", "means"), [(f"`{n}`", str(v), t) for n, (v, t) in abi["constants"].items()]
        ),
        "",
        "## Calls of the normal world",
    ]
    out += _calls(abi["calls"])
    out += [
        "",
        "## Calls of the trusted OS",
        "",
        "They reach EL2 only as messages from EL3; the same ids from the normal world get `NOT_SUPPORTED`.",
    ]
    out += _calls(abi["secure_calls"])
    for section, (_, _, heading) in ENUMS.items():
        rows = [(f"`{n}`", f"{v:#x}" if v > 0xFFFF else str(v), t) for n, (v, t) in abi[section].items()]
        out += ["", f"## {heading}", ""]
        if section in NOTES:
            out += [NOTES[section], ""]
        out += _table(("name", "value", "means"), rows)
    return "\n".join([*out, ""])


def _calls(calls: dict[str, dict[str, Any]]) -> list[str]:
    out: list[str] = []
    for name, call in calls.items():
        conduit = f", {call['conduit'].upper()}" if "conduit" in call else ""
        out += ["", f"### {name} (`{call['id']:#x}`{conduit})", "", call["text"], ""]
        out += [f"- x{i}: {arg}" for i, arg in enumerate(call["args"], 1)]
        out += [f"- result x{i}: {result}" for i, result in enumerate(call["results"], 1)]
        if call.get("errors"):
            out.append(f"- may answer {', '.join(f'`{e}`' for e in call['errors'])}")
        if not out[-1]:
            out.pop()
    return out


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(head)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _hvc_count(abi: dict[str, Any]) -> int:
    return sum(call["conduit"] == "hvc" for call in abi["calls"].values())


def _c(value: int) -> str:
    return f"{value:#x}u" if value > 0xFFFF else f"({value})" if value < 0 else str(value)


def _py(value: int) -> str:
    return f"0x{value:08X}" if value > 0xFFFF else str(value)


def check(abi: dict[str, Any]) -> None:
    """Ids, states and status values are unique, and every named error exists. Raises `ValueError`."""
    ids = [call["id"] for section in ("calls", "secure_calls") for call in abi[section].values()]
    ids += [value for value, _ in abi["internal"].values() if value > 0xFFFF]
    if len(ids) != len(set(ids)):
        raise ValueError("two calls have one id")
    for section in ("states", "errors", "messages", "services", "request"):
        values = [value for value, _ in abi[section].values()]
        if len(values) != len(set(values)):
            raise ValueError(f"two {section} have one value")
    for section in ("calls", "secure_calls"):
        for name, call in abi[section].items():
            if unknown := set(call.get("errors", ())) - set(abi["errors"]):
                raise ValueError(f"{name} names unknown errors {sorted(unknown)}")


def outputs() -> dict[Path, str]:
    """Each generated file and what must be in it."""
    abi = tomllib.loads(SOURCE.read_text(encoding="utf-8"))
    check(abi)
    return {
        ROOT / "firmware" / "include" / "abi.h": c_header(abi),
        ROOT / "src" / "flexserve" / "monitor" / "abi.py": python_module(abi),
        ROOT / "docs" / "monitor-abi.md": document(abi),
    }


def main(argv: list[str]) -> int:
    """Write or check; the exit code."""
    stale = {p: t for p, t in outputs().items() if not p.exists() or p.read_text(encoding="utf-8") != t}
    for path, text in stale.items():
        if "--check" in argv:
            print(f"{path.relative_to(ROOT)} is not what monitor.toml says; run firmware/abi/generate.py")
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

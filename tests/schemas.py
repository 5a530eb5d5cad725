"""The JSON Schemas of docs/schemas, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())
    return found


def validate(name: str, value: object) -> None:
    """Raises `ValidationError` unless `value` follows docs/schemas/NAME.json."""
    Draft202012Validator(schema(name)).validate(value)

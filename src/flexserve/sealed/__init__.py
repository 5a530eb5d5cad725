"""Sealed models, keys and licences (docs/sealed-format.md). Knows nothing of engines or worlds."""

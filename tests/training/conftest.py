"""`training` is run from the repository's root and is not installed: make it importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

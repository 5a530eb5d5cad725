"""How many threads a world gets: as the command line says, as was calibrated, or the usual number."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FlexServeError
from .display import note

if TYPE_CHECKING:
    from ..worlds.linux.calibration import Tuning


def tuned(threads: int | None, load_workers: int | None, sample: Path | None) -> Tuning:
    """What was not said is chosen. `sample`: a file to measure this machine's storage with, where nothing is stored;
    None: do not measure."""
    from ..worlds.linux import calibration

    if threads is not None and load_workers is not None:
        return calibration.Tuning(threads, load_workers)
    found = calibration.stored()
    if found is None and sample is not None:
        try:
            calibration.check_undisturbed()
            found = calibration.measure(sample)
            calibration.store(found)
            note(f"calibrated: {calibration.describe(found.rates)}")
        except FlexServeError as error:
            note(f"not calibrated: {error.message}")
    chosen = calibration.default() if found is None else calibration.choose(found.rates)
    return calibration.Tuning(threads or chosen.threads, load_workers or chosen.load_workers)

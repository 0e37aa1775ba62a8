"""Draw all pictures, or the named ones: `python -m docs.drawings [--quick] [NAME ...]`.

`--quick` leaves out `demo.png`, which trains for minutes. The tutorial's pictures train for a minute or two.
All pictures come from the built-in scenes or from records of runs.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from docs.drawings.logo import draw_logo
from docs.drawings.pooling import draw_modes, draw_pooling, draw_transpose
from docs.drawings.schedules import draw_schedules
from docs.drawings.shifts import draw_shifts
from docs.drawings.tutorial import draw_discriminators, draw_health, draw_predictions, draw_scenes
from examples import ass
from examples.workbench.studies.report import draw_curves, draw_study
from examples.workbench.studies.study import STUDIES, read_records, read_study

__all__ = ["DRAWINGS", "FIGURES", "main"]

FIGURES = Path(__file__).parent.parent / "figures"
RESULTS = Path(__file__).parent.parent / "results"


def main(names: Sequence[str]) -> None:
    """Draw the pictures into `docs/figures`, and those of the studies into `docs/results`."""
    chosen = [name for name in names if name != "--quick"]
    slow = {"demo.png"} if "--quick" in names else set()
    for name in chosen or [name for name in DRAWINGS if name not in slow]:
        DRAWINGS[name](FIGURES / name)
        print(FIGURES / name, flush=True)
    for path in [] if chosen else sorted(STUDIES.glob("*.yaml")):
        records = RESULTS / f"{path.stem}.json"
        study = read_study(path)
        results = read_records(study, records)
        if results:
            draw_study(records.with_suffix(".png"), study, results)
            draw_curves(records.with_name(f"{path.stem}-curves.png"), study, results)
            print(records.with_suffix(".png"), flush=True)


def draw_demo(path: Path) -> None:
    """Draw README's picture, that of `python -m examples.ass`."""
    with tempfile.TemporaryDirectory() as out:
        ass.main(["--out", out])
        shutil.copy(Path(out) / "ass.png", path)


DRAWINGS: dict[str, Callable[[Path], None]] = {
    "logo-light.svg": lambda path: draw_logo(path, dark=False),
    "logo-dark.svg": lambda path: draw_logo(path, dark=True),
    "shifts.png": draw_shifts,
    "pooling.png": draw_pooling,
    "transpose.png": draw_transpose,
    "modes.png": draw_modes,
    "schedules.png": draw_schedules,
    "tutorial-scenes.png": draw_scenes,
    "tutorial-health.png": draw_health,
    "tutorial-predictions.png": draw_predictions,
    "discriminators.png": draw_discriminators,
    "demo.png": draw_demo,
}
"""Name of a picture to the function that draws it."""

if __name__ == "__main__":
    main(sys.argv[1:])

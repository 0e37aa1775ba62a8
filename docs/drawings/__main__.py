"""Draw all pictures, or those that are named: `python -m docs.drawings [--quick] [NAME ...]`.

`--quick` leaves out those that train for minutes. Everything is drawn from the built-in scenes or from records of runs.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from docs.drawings.demo import draw_demo
from docs.drawings.logo import draw_logo
from docs.drawings.pooling import draw_modes, draw_pooling, draw_transpose
from docs.drawings.schedules import draw_schedules
from docs.drawings.shifts import draw_shifts
from docs.drawings.tutorial import draw_adversary, draw_health, draw_predictions, draw_scenes
from examples.ass.__main__ import STUDIES
from examples.ass.__main__ import main as trainer
from examples.ass.study import draw_study, read_study

__all__ = ["DRAWINGS", "FIGURES", "main"]

FIGURES = Path(__file__).parent.parent / "figures"
RESULTS = Path(__file__).parent.parent / "results"


def main(names: Sequence[str]) -> None:
    """Draw."""
    chosen = [name for name in names if name != "--quick"]
    slow = {"demo.png", "comparison.png"} if "--quick" in names else set()
    for name in chosen or [name for name in DRAWINGS if name not in slow]:
        DRAWINGS[name](FIGURES / name)
        print(FIGURES / name, flush=True)
    for study in [] if chosen else sorted(STUDIES.glob("*.yaml")):
        records = RESULTS / f"{study.stem}.json"
        if records.exists():
            _draw_records(records, study)
            print(records.with_suffix(".png"), flush=True)


def _draw_records(records: Path, study: Path) -> None:
    """What `study` draws, of the runs that are on record."""
    asked = read_study(study)
    kept = {(record["row"], record["seed"]): record for record in json.loads(records.read_text(encoding="utf-8"))}
    wanted = [(name, seed) for name in asked.rows for seed in asked.seeds]
    draw_study(records.with_suffix(".png"), asked, [kept[key] for key in wanted if key in kept])


def _draw_comparison(path: Path) -> None:
    """What `compare` leaves in its folder."""
    with tempfile.TemporaryDirectory() as out:
        if trainer(["compare", "--out", out]):
            sys.exit("expected all runs to be compared, got an error")
        path.write_bytes((Path(out) / path.name).read_bytes())


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
    "adversary.png": draw_adversary,
    "demo.png": draw_demo,
    "comparison.png": _draw_comparison,
}
"""A picture's name to what draws it. Minutes: `demo.png`; the best part of an hour: `comparison.png`."""

if __name__ == "__main__":
    main(sys.argv[1:])

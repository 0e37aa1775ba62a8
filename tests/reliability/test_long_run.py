"""Long runs: memory, open files, threads stay flat. `python -m tests.reliability.test_long_run` takes 20,000 steps."""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytest

from examples.workbench.training import run_folder as runs
from examples.workbench.settings import Data, GlobalSettings, NetworkSettings, OptimiserSettings, SceneSettings, SemanticSettings, Settings
from examples.workbench.training.train import train

# Everything that a run of ASS has, and of each thing as little as there may be.
TINY = Settings(
    labelled=2,
    data=Data(size=(32, 32), scenes=SceneSettings(source=4, target=4, validation=1, test=1)),
    network=NetworkSettings(width=8),
    optimiser=OptimiserSettings(name="sgd", learning_rate=1e-3, images=1, unlabelled=1),
    global_alignment=GlobalSettings(base_channels=4),
    semantic_alignment=SemanticSettings(hidden_channels=(16,), resample="nearest"),
)
# Less than one image of 32 x 32 in float32, and its label, for each step between the quarters that are compared.
MIB = 8


def grown(out: Path, *, steps: int) -> dict[str, float]:
    """What a run of so many steps holds in its last quarter beyond its second: the median of each figure."""
    settings = dataclasses.replace(TINY, steps=steps, log_every=max(1, steps // 200), save_every=500)
    train(settings, out)
    rows = run_folder.read_history(out)
    quarters = rows[len(rows) // 4 : len(rows) // 2], rows[-len(rows) // 4 :]
    names = ("machine/memory_mib", "machine/open_files", "machine/threads")
    second, last = ({name: statistics.median(row[name] for row in rows) for name in names} for rows in quarters)
    return {name: last[name] - second[name] for name in names}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_run_does_not_grow(tmp_path):
    growth = grown(tmp_path, steps=1500)
    assert growth["machine/memory_mib"] <= MIB
    assert growth["machine/open_files"] == 0
    assert growth["machine/threads"] == 0


def main(steps: int) -> int:
    """Run so many steps, print what has grown, and say by the exit status whether it is too much."""
    began, spent = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        growth = grown(Path(out), steps=steps)
    minutes, seconds = (time.monotonic() - began) / 60, time.process_time() - spent
    print(f"{steps} steps in {minutes:.1f} minutes, {seconds:.0f} s of processor time")
    print("from the second quarter to the last:", ", ".join(f"{name} {value:+g}" for name, value in growth.items()))
    return int(growth["machine/memory_mib"] > MIB or any(growth[f"machine/{n}"] > 0 for n in ("open_files", "threads")))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))

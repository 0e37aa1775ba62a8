"""Long runs: memory, open files, threads stay flat. `python -m tests.reliability.test_long_run` takes 20,000 steps."""

import statistics
import sys
import tempfile
from pathlib import Path

import pytest

from examples.workbench.data_settings import Data, SceneSettings
from examples.workbench.settings import GlobalSettings, NetworkSettings, OptimiserSettings, SemanticSettings, Settings
from examples.workbench.training import run_folder
from examples.workbench.training.train import train

# Less than one image of 32 x 32 in float32, and its label, for each step between the quarters that are compared.
LIMITS = {"machine/memory_mib": 8, "machine/open_files": 0, "machine/threads": 0}


def growth(out: Path, *, steps: int) -> dict[str, float]:
    """How much the medians of the last quarter of a run exceed those of the second."""
    settings = Settings(
        labelled=2,
        steps=steps,
        log_every=max(1, steps // 200),
        save_every=500,
        data=Data(size=(32, 32), scenes=SceneSettings(source=4, target=4, validation=1, test=1)),
        network=NetworkSettings(width=8),
        optimiser=OptimiserSettings(name="sgd", learning_rate=1e-3, batch_size=1, unlabelled_batch_size=1),
        global_alignment=GlobalSettings(base_channels=4),
        semantic_alignment=SemanticSettings(hidden_channels=(16,), resample="nearest"),
    )
    train(settings, out)
    rows = run_folder.read_history(out)
    quarters = rows[len(rows) // 4 : len(rows) // 2], rows[-len(rows) // 4 :]
    second, last = ({name: statistics.median(row[name] for row in rows) for name in LIMITS} for rows in quarters)
    return {name: last[name] - second[name] for name in LIMITS}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_run_does_not_grow(tmp_path):
    found = growth(tmp_path, steps=1500)
    assert all(found[name] <= limit for name, limit in LIMITS.items()), found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(growth(Path(folder), steps=int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))

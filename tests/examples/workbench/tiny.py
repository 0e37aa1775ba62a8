"""A run of a few steps at 32 x 32, and how two runs are compared."""

import dataclasses

import torch

from examples.workbench.data_settings import Data, SceneSettings
from examples.workbench.settings import NetworkSettings, OptimiserSettings, Settings
from examples.workbench.training import checkpoints, run_folder

TINY = Settings(
    steps=6,
    labelled=2,
    log_every=1,
    save_every=3,
    data=Data(size=(32, 32), scenes=SceneSettings(source=6, target=6, validation=2, test=3)),
    network=NetworkSettings(width=8),
    optimiser=OptimiserSettings(batch_size=2, unlabelled_batch_size=3),
)


def tiny(**changes):
    """Settings with changes; those of a nested part come as a dict."""
    parts = {
        name: dataclasses.replace(getattr(TINY, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(TINY, **parts)


def checkpoint(out):
    """The newest checkpoint of a run."""
    return torch.load(checkpoints.newest_checkpoint(out), weights_only=True)


def history(out):
    """The rows of a run's log, without what differs between two runs of the same settings."""
    return [{n: v for n, v in row.items() if not n.startswith("machine/")} for row in run_folder.read_history(out)]


def equal(a, b):
    """Bit-identical, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

"""The estimate of a step's memory against the largest sum of tensors that live at once in a run on the CPU."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.ass import train as train_module
from examples.ass.memory import Memory, estimate_memory
from examples.ass.settings import Data, Network, Optimiser, SceneSettings, Settings
from examples.ass.train import build_critic, build_segmenter, train

pytestmark = pytest.mark.filterwarnings("default")

SETTINGS = Settings(
    steps=2,
    labelled=2,
    data=Data(size=(96, 128), scenes=SceneSettings(source=4, target=4, validation=1, test=1)),
    optimiser=Optimiser(images=2, unlabelled=2),
)
DEEPLAB = Network(name="deeplab-v2", depth=50)


class Live(TorchDispatchMode):
    """Bytes of every storage that an operation has returned and that is still there; those of meta tensors aside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if id(storage) not in self.known:
                    self.known.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "source-only"},
        {"method": "ass"},
        {"method": "semantic", "optimiser": Optimiser(name="sgd", images=3)},
        {"method": "joint", "network": DEEPLAB},
        {"method": "ass", "network": DEEPLAB, "optimiser": Optimiser(name="sgd", images=1, unlabelled=1)},
    ],
    ids=["source-only", "ass", "semantic", "deeplab", "deeplab-ass"],
)
def test_within_a_quarter_of_what_lives_at_once(changes, tmp_path, monkeypatch):
    estimates = []

    def remembered(*arguments):
        estimates.append(estimate_memory(*arguments))
        return estimates[0]

    monkeypatch.setattr(train_module, "estimate_memory", remembered)
    with Live() as live:
        train(dataclasses.replace(SETTINGS, **changes), tmp_path / "run")
    (estimate,) = estimates
    print(changes, estimate, live.peak / 2**30, sum(estimate)/live.peak)
    assert 0.75 * live.peak < sum(estimate) < 1.25 * live.peak

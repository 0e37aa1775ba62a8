"""The estimate of a step's memory against the largest sum of tensors that live at once in a run on the CPU."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.workbench import train as train_module
from examples.workbench.build import build_discriminator, build_segmenter
from examples.workbench.memory import Memory, estimate_memory
from examples.workbench.settings import Data, GlobalAdversary, Network, Optimiser, SceneSettings, SelfTraining, Settings
from examples.workbench.train import train

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
        {"method": "global", "precision": "bf16-mixed"},
        {"method": "semantic", "optimiser": Optimiser(name="sgd", images=3)},
        {"method": "ass", "global_adversary": GlobalAdversary(base_channels=64)},
        {"method": "ass-plus", "self_training": SelfTraining(start=0.0, ramp=0.0)},
        {"method": "ass-plus", "self_training": SelfTraining(start=0.0, ramp=0.0, weight=0.0)},
        {
            "method": "ass-plus",
            "self_training": SelfTraining(start=0.0, ramp=0.0, weight=0.0, soft_pooling=False),
            "global_adversary": GlobalAdversary(weight=0),
        },
        pytest.param({"method": "joint", "network": DEEPLAB}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "ass", "network": DEEPLAB, "optimiser": Optimiser(name="sgd", images=1, unlabelled=1)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "source-only",
        "ass",
        "global-bf16",
        "semantic",
        "wide-discriminator",
        "ass-plus",
        "not-self-trained",
        "teacher-alone",
        "deeplab",
        "deeplab-ass",
    ],
)
def test_within_an_eighth_of_what_lives_at_once(changes, tmp_path, monkeypatch):
    estimates = []

    def remembered(*arguments):
        estimates.append(estimate_memory(*arguments))
        return estimates[0]

    monkeypatch.setattr(train_module, "estimate_memory", remembered)
    with Live() as live:
        train(dataclasses.replace(SETTINGS, **changes), tmp_path / "run")
    (estimate,) = estimates
    assert 7 / 8 * live.peak < sum(estimate) < 9 / 8 * live.peak


@pytest.mark.slow
def test_at_full_size():
    """DeepLab-v2 on ResNet-101 as AdaptSegNet runs it, without a tensor of that size being made."""
    settings = dataclasses.replace(
        SETTINGS,
        method="ass",
        data=Data(size=(512, 1024)),
        network=Network(name="deeplab-v2"),
        optimiser=Optimiser(name="sgd", images=1, unlabelled=1),
    )
    with torch.device("meta"):
        segmenter = build_segmenter(settings)
        discriminators = {name: build_discriminator(name, settings, segmenter) for name in ("global", "semantic")}
    parameters = sum(p.numel() for module in (segmenter, *discriminators.values()) for p in module.parameters())
    estimate = estimate_memory(settings, segmenter, discriminators)
    half = estimate_memory(dataclasses.replace(settings, precision="bf16-mixed"), segmenter, discriminators)
    assert estimate.gradients == 4 * parameters
    assert estimate.weights > estimate.gradients
    # Of each of the three images, at least the outputs and last sums of the 26 blocks of the last two stages.
    assert 3 * 2 * 26 * 1024 * 65 * 129 * 4 < estimate.activations < 100 * 2**30
    assert estimate.activations / 2 < half.activations < 0.7 * estimate.activations
    assert half[:3] == estimate[:3]


def test_maps_that_the_unlabelled_are_to_be_taken_for_are_counted():
    segmenter = build_segmenter(SETTINGS)
    discriminators = {"global": build_discriminator("global", SETTINGS, segmenter)}
    source, labelled, both = (
        estimate_memory(
            dataclasses.replace(SETTINGS, method="global", global_adversary=GlobalAdversary(against=against)),
            segmenter,
            discriminators,
        ).activations
        for against in ("source", "labelled", "both")
    )
    # Probabilities of 8 classes in float32, of two more images.
    assert labelled == source
    assert both == source + 2 * 8 * 96 * 128 * 4


def test_the_networks_are_not_changed():
    segmenter = build_segmenter(dataclasses.replace(SETTINGS, network=DEEPLAB))
    before = {name: tensor.clone() for name, tensor in segmenter.state_dict().items()}
    generator = torch.get_rng_state()
    estimate_memory(dataclasses.replace(SETTINGS, method="joint"), segmenter, {})
    assert all(torch.equal(before[name], tensor) for name, tensor in segmenter.state_dict().items())
    assert all(parameter.grad is None for parameter in segmenter.parameters())
    assert torch.equal(generator, torch.get_rng_state())


def test_it_prints():
    memory = Memory(2**30, 2**29, 2**28, 3 * 2**30)
    assert str(memory) == (
        "memory of a step, estimated: 4.75 GiB (weights 1.00, gradients 0.50, optimisers 0.25, activations 3.00)"
    )

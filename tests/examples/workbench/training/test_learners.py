"""Learners: alignments as the settings say, schedules of rates and weights, class counts."""

import dataclasses

import pytest
import torch

from examples.workbench.networks.build import build_segmenter
from examples.workbench.training.learners import (
    ClassCounts,
    build_alignment,
    build_learners,
    source_schedule,
    weight_schedule,
)
from tests.examples.workbench.tiny import TINY, tiny


@pytest.mark.parametrize("hidden", [(), (24,), (64, 32, 16)])
def test_hidden_channels_are_the_layers_of_the_discriminator(hidden):
    align = build_alignment("semantic", tiny(semantic_alignment={"hidden_channels": hidden}), 32)
    widths = [m.out_features for m in align.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [*hidden, 8]
    assert (align.in_channels, align.per_image, align.resample) == (32, True, "bilinear")


def test_first_weights_depend_on_the_seed_and_the_name_alone():
    first = {name: build_alignment(name, TINY, 32).state_dict() for name in ("global", "auxiliary", "semantic")}
    torch.rand(1)
    for name in ("semantic", "global"):
        again = build_alignment(name, tiny(method="semantic"), 32).state_dict()
        assert all(torch.equal(first[name][key], again[key]) for key in again)
    assert not torch.equal(*(first[name]["discriminator.layers.0.weight"] for name in ("global", "auxiliary")))


def test_weights_wait_then_rise():
    how = dataclasses.replace(TINY.semantic_alignment, weight=0.5, start=0.2, ramp=0.3)
    schedule = weight_schedule(how, 100)
    assert [schedule(step) for step in (0, 19, 20)] == [0, 0, 0]
    assert 0 < schedule(21) < schedule(40) < 0.5
    assert schedule(99) == pytest.approx(0.5, rel=1e-3)
    assert weight_schedule(dataclasses.replace(how, start=0, ramp=0), 100)(0) == 0.5


def test_the_contrast_has_its_own_weight_and_a_bank_for_each_labelled_domain():
    how = {"contrast_weight": 0.25, "contrast_momentum": 0.5, "start": 0.5, "ramp": 0.0}
    settings = tiny(method="self-training", self_training=how)
    learners = build_learners(settings, build_segmenter(settings).double())
    for name, weight in (("contrast", 0.25), ("self-training", 1.0)):
        assert [learners.weights[name](step) for step in (2, 3)] == [0, weight]
    assert learners.prototypes.keys() == {"source", "labelled"}
    assert {"source prototypes", "labelled prototypes"} <= learners.stateful().keys()
    for bank in learners.prototypes.values():
        assert (bank.in_channels, bank.num_classes, bank.momentum, bank.sums.dtype) == (32, 8, 0.5, torch.float64)
    assert not build_learners(tiny(method="self-training"), build_segmenter(settings)).prototypes


@pytest.mark.parametrize(
    ("fade", "method", "expected"),
    [
        (0.5, "ass-plus", [1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3, 0.0]),
        (1.0, "ass-plus", [1 - step / 6 for step in range(7)]),
        (0.0, "ass-plus", [1.0] * 7),
        (0.5, "ass", [1.0] * 7),
    ],
)
def test_the_source_fades_at_the_end(fade, method, expected):
    weight = source_schedule(tiny(method=method, self_training={"source_fade": fade}))
    assert [weight(step) for step in range(7)] == pytest.approx(expected)


def test_learning_rates_decay_and_the_classifier_has_its_factor():
    how = {"name": "sgd", "learning_rate": 0.1, "classifier_factor": 10.0, "decay_steps": 12, "power": 0.5}
    settings = tiny(optimiser=how, semantic_alignment={"learning_rate": 0.01, "power": 1.0})
    segmenter = build_segmenter(settings)
    learners = build_learners(settings, segmenter)
    learners.set_learning_rates(3)
    rest, classifier = learners.optimisers["segmenter"].param_groups
    assert rest["lr"] == pytest.approx(0.1 * (9 / 12) ** 0.5)
    assert classifier["lr"] == pytest.approx(10 * rest["lr"])
    assert [id(p) for p in classifier["params"]] == [id(p) for p in segmenter.classifier_parameters()]
    assert len(rest["params"]) + len(classifier["params"]) == len(list(segmenter.parameters()))
    assert learners.optimisers["semantic"].param_groups[0]["lr"] == pytest.approx(0.01 * 9 / 12)
    assert learners.optimisers["global"].param_groups[0]["lr"] == TINY.global_alignment.learning_rate


def test_class_counts():
    counts = ClassCounts(4)
    counts.add("source", torch.tensor([[[0, 2, 2, 255], [1, 2, 3, 3]]]))
    counts.add("labelled", torch.full((1, 2, 2), 255))
    assert counts.counts.tolist() == [[1, 1, 3, 2], [0, 0, 0, 0]]
    assert counts.log_shares("source").exp().tolist() == pytest.approx([2 / 11, 2 / 11, 4 / 11, 3 / 11])
    assert counts.log_shares("unlabelled").exp().tolist() == pytest.approx([0.25] * 4)

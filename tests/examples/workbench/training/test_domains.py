"""Which images a step draws, and how often rare classes are drawn."""

import dataclasses

import numpy as np
import pytest

import semshift
from examples.scenes import Sample
from examples.workbench.data.images import open_images
from examples.workbench.data.samples import Subset
from examples.workbench.errors import InputError
from examples.workbench.settings import GlobalSettings, SelfTraining
from examples.workbench.training.domains import batch_sizes, choose_domains, rare_class_draws
from tests.errors import refuses
from tests.examples.workbench.tiny import TINY, tiny

NO_GLOBAL = GlobalSettings(weight=0)


@pytest.mark.parametrize(
    ("changes", "domains"),
    [
        ({"method": "source-only"}, ["source"]),
        ({"method": "labelled-only"}, ["labelled"]),
        ({"method": "oracle"}, ["labelled"]),
        ({"method": "semantic"}, ["source", "labelled"]),
        ({"method": "global"}, ["source", "labelled", "unlabelled"]),
        ({"method": "ass", "global_alignment": NO_GLOBAL}, ["source", "labelled"]),
        # Seen by the teacher alone.
        ({"method": "ass-plus", "global_alignment": NO_GLOBAL}, ["source", "labelled", "unlabelled"]),
        (
            {"method": "ass-plus", "global_alignment": NO_GLOBAL, "self_training": SelfTraining(weight=0)},
            ["source", "labelled"],
        ),
    ],
)
def test_domains_of_a_method(changes, domains):
    settings = tiny(**changes)
    images = open_images(settings, None)
    images = images._replace(labelled=Subset(images.target, [3, 1]))
    chosen = choose_domains(settings, images)
    assert list(chosen) == domains
    sizes = {"source": 6, "labelled": 2, "unlabelled": 6}
    assert {domain: len(samples) for domain, samples in chosen.items()} == {d: sizes[d] for d in domains}
    counts = {"source": 2, "labelled": 2, "unlabelled": 3}
    assert batch_sizes(settings, domains, 1) == {d: counts[d] for d in domains}
    if "labelled" in chosen:
        assert chosen["labelled"].names == [images.target.names[3], images.target.names[1]]


def test_ranks_share_a_batch_equally():
    settings = tiny(optimiser={"batch_size": 6, "unlabelled_batch_size": 12})
    domains = ["source", "labelled", "unlabelled"]
    assert batch_sizes(settings, domains, 3) == {"source": 2, "labelled": 2, "unlabelled": 4}
    with refuses(InputError, "optimiser.batch_size", "4 ranks", 6):
        batch_sizes(settings, domains, 4)
    with refuses(InputError, "optimiser.unlabelled_batch_size", "3 ranks", 4):
        batch_sizes(tiny(optimiser={"batch_size": 3, "unlabelled_batch_size": 4}), domains, 3)


class _Two:
    """One image without the rare class, one with it, and pixels without a class in both."""

    names = ("common", "rare")

    def __len__(self):
        return 2

    def __getitem__(self, index):
        label = np.zeros((8, 8), np.uint8)
        label[0] = 255
        if index:
            label[1, :4] = 1
        return Sample(np.zeros((8, 8, 3), np.uint8), label, self.names[index])


def test_rare_classes_are_drawn_more_often():
    settings = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, classes=["common", "rare"]))
    common, rare = rare_class_draws(_Two(), settings, progress=None)
    assert 0 <= common < rare
    # 64 pixels: 8 without a class, 4 of the rare one in the second image.
    expected = semshift.rare_class_weights(np.array([[56, 0], [52, 4]]), temperature=0.1)
    assert [common, rare] == pytest.approx(expected.tolist())

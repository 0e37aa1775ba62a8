"""Prototypes: how they are pooled, and what is drawn of them."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from examples.scenes import Scenes
from examples.workbench.data_settings import Data
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.reporting.prototypes import draw_prototypes, pool_prototypes

NAMES = [f"class {k}" for k in range(9)]


class Features(nn.Conv2d):
    def forward(self, images):
        return Segmentation(super().forward(images), images)


def test_sums_are_added_over_the_images_and_divided_once():
    scenes = list(Scenes("source", "val", 3, seed=0, size=(32, 48)))
    # Of nine classes, the last has no pixel, and those of class 2 are ignored.
    scenes = [scene._replace(label=np.where(scene.label == 2, 100, scene.label)) for scene in scenes]
    segmenter = Features(3, 5, 1).double()
    data = Data(classes=[f"{k}" for k in range(9)], ignore_index=100)
    found = pool_prototypes(segmenter, scenes, (32, 48), data)
    sums, counts = np.zeros((9, 5)), np.zeros((9, 1))
    for i in range(3):
        image = torch.from_numpy(scenes[i].image).permute(2, 0, 1)[None].double()
        features = segmenter((image / 255 - 0.5) / 0.25).features[0].movedim(0, -1).detach().numpy()
        for k in range(9):
            sums[k] += features[scenes[i].label == k].sum(0)
            counts[k] += (scenes[i].label == k).sum()
    # Images are made in float32: a pixel's value has a few roundings of it.
    np.testing.assert_allclose(found, sums / np.where(counts, counts, np.nan), rtol=1e-5, atol=1e-6)
    assert np.isnan(found[[2, 8]]).all()


def test_prototypes_lie_on_their_principal_axes():
    # Four classes of two domains on a plane in a space of six: all variance is in two.
    random = np.random.default_rng(0)
    plane, _ = np.linalg.qr(random.normal(size=(6, 2)))
    flat = random.normal(size=(2, 4, 2)) * [5, 1]
    source, target = flat @ plane.T + 3
    axes = Figure().add_subplot()
    draw_prototypes([axes], [(source, target)], NAMES[: len(source)])
    drawn = [line.get_xydata()[0] for mark in "oX" for line in axes.lines if line.get_marker() == mark]
    before, after = flat.reshape(8, 2), np.array(drawn)

    def distances(points):
        return np.linalg.norm(points[:, None] - points, axis=-1)

    # An isometry of the plane keeps every distance; eight points of size ten, a handful of roundings each.
    np.testing.assert_allclose(distances(after), distances(before), atol=1e-12)
    assert np.var(after[:, 0]) > np.var(after[:, 1])
    assert np.abs(np.cov(after.T)[0, 1]) < 1e-12
    shares = 100 * np.var(after, axis=0) / np.var(after, axis=0).sum()
    assert f"{shares[0]:.0f} %" in axes.get_xlabel()
    assert f"{shares[1]:.0f} %" in axes.get_ylabel()


@pytest.mark.parametrize("seed", range(6))
def test_axes_never_flip(seed):
    # Along a line on which every channel grows, further is to the right.
    steps = np.random.default_rng(seed).normal(size=(2, 5, 1))
    axes = Figure().add_subplot()
    draw_prototypes([axes], [tuple(steps * [1.0, 2.0, 3.0])], NAMES[:5])
    right = [line.get_xydata()[0, 0] for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(np.argsort(right), np.argsort(steps[0, :, 0]))


def test_domain_gap_by_hand_without_the_absent_class():
    # Each class's domains are 2 apart; the classes' centres 3, 4 and 5, a mean of 4.
    source = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [9.0, 9.0, 9.0]])
    target = source + np.array([0.0, 0.0, 2.0])
    target[3] = np.nan
    axes = Figure().add_subplot()
    draw_prototypes([axes], [(source, target)], NAMES[: len(source)])
    *numbers, gap = [text.get_text() for text in axes.texts]
    assert numbers == ["0", "1", "2"]
    assert "0.50" in gap


@pytest.mark.parametrize(
    ("source", "target", "drawn"),
    [
        ([[1.0], [np.nan]], [[3.0], [0.0]], ["0"]),
        (np.ones((2, 3)), np.ones((2, 3)), ["0", "1"]),
        (np.full((3, 5), np.nan), np.ones((3, 5)), ["no class has a prototype in both domains"]),
    ],
    ids=["one class, one channel", "all equal", "none"],
)
def test_few_prototypes_are_drawn(source, target, drawn):
    axes = Figure().add_subplot()
    draw_prototypes([axes], [(np.array(source), np.array(target))], NAMES[: len(source)])
    assert [text.get_text() for text in axes.texts] == drawn


def test_panels_share_their_axes():
    """Prototypes that only moved together are drawn at the same places; others at the same scale."""
    random = np.random.default_rng(0)
    source, target = random.normal(size=(2, 5, 8))
    before, moved, closer = Figure().subplots(1, 3)
    pairs = [(source, target), (source + 3, target + 3), (source, (source + target) / 2)]
    draw_prototypes([before, moved, closer], pairs, NAMES[:5])

    def drawn(axes):
        return np.array([[line.get_xydata()[0] for line in axes.lines if line.get_marker() == mark] for mark in "oX"])

    np.testing.assert_allclose(drawn(moved), drawn(before), atol=1e-12)
    # A projection keeps the halves.
    np.testing.assert_allclose(np.diff(drawn(closer), axis=0), np.diff(drawn(before), axis=0) / 2, atol=1e-12)
    for axes in (before, moved, closer):
        assert axes.get_xlim() == before.get_xlim()
        assert axes.get_ylim() == before.get_ylim()
        for (low, high), values in zip((axes.get_xlim(), axes.get_ylim()), drawn(axes).reshape(-1, 2).T):
            assert low < values.min()
            assert high > values.max()

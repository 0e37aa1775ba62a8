"""Augmentation: image and label stay aligned, and labels are never interpolated."""

import numpy as np
import pytest

from examples.scenes import Sample
from examples.workbench.data.augment import augment
from examples.workbench.data_settings import Augmentation
from tests.examples.workbench.data.formats import random_sample


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_only_mirroring(flip):
    sample = random_sample(32, 48)
    result = augment(sample, (32, 48), np.random.default_rng(0), Augmentation((1.0, 1.0), flip, 0.0))
    columns = slice(None, None, -1 if flip else 1)
    assert np.array_equal(result.image, sample.image[:, columns])
    assert np.array_equal(result.label, sample.label[:, columns])


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 2.5])
def test_crops_have_the_size_and_stay_aligned(scale):
    # The image shows its label, so a misaligned crop would be seen.
    label = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 10, 0), 12, 1).astype(np.uint8)
    sample = Sample(np.repeat(20 * label[..., None], 3, 2), label, "grid")
    for seed in range(8):
        result = augment(sample, (32, 40), np.random.default_rng(seed), Augmentation((scale, scale), 0.5, 0.0))
        assert result.image.shape == (32, 40, 3)
        inside = result.label != 255
        assert set(np.unique(result.label[inside])) <= set(range(12))
        wrong = np.abs(result.image[..., 0].astype(int) - 20 * result.label.astype(int))[inside] > 10
        assert wrong.mean() < 0.2
        assert (result.image[~inside] == 0).all()
        assert (~inside).any() == (scale < 1)


@pytest.mark.parametrize("scale", [0.6, 1.3])
def test_labels_are_never_mixed(scale):
    # Any mean of the two would be an id between them.
    mixed = np.random.default_rng(0).choice([0, 200], (40, 40)).astype(np.uint8)
    sample = random_sample(40, 40)._replace(label=mixed)
    for seed in range(4):
        result = augment(sample, (32, 32), np.random.default_rng(seed), Augmentation((scale, scale)))
        assert {0, 200} <= set(np.unique(result.label)) <= {0, 200, 255}


def test_augmentation_is_a_function_of_its_generator():
    sample = random_sample(40, 40)
    first, again, other = (augment(sample, (32, 32), np.random.default_rng(s), Augmentation()) for s in (0, 0, 1))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)

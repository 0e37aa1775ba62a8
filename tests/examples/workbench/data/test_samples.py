"""Subsets, the images that keep their labels, and images as the network's input."""

import numpy as np

from examples.workbench.data.samples import Subset, image_tensor, labelled_subset, resize_image
from tests.examples.workbench.data.formats import random_sample


def test_a_subset_has_its_own_order_and_names():
    class Samples(list):
        names = ("a", "b", "c")

    subset = Subset(Samples(random_sample(seed=i) for i in range(3)), [2, 0])
    assert len(subset) == 2
    assert subset.names == ["c", "a"]
    assert [subset[i].name for i in range(2)] == ["image-2", "image-0"]


def test_labelled_subsets_nest():
    order = np.random.RandomState(0).permutation(50).tolist()
    assert labelled_subset(50, 10) == order[:10]
    assert labelled_subset(50, 50) == order


def test_resizing_and_tensor():
    sample = random_sample(20, 30)
    assert resize_image(sample.image, (20, 30)) is sample.image
    assert resize_image(sample.image, (32, 48)).shape == (32, 48, 3)
    tensor = image_tensor(np.array([[[0, 127.5, 255]]]))
    assert tensor.shape == (3, 1, 1)
    assert tensor.flatten().tolist() == [-2, 0, 2]

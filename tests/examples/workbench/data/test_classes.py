"""Which classes labels show, and which labelled images are refused."""

import numpy as np
import pytest

from examples.scenes import Sample
from examples.workbench.data.classes import describe_absent, find_absent, require_labels
from examples.workbench.data_settings import Data
from examples.workbench.errors import InputError
from tests.errors import mentions, refuses

DATA = Data(classes=["road", "sky", "belt"])


class Labels(list):
    """Images whose labels are the items; it counts the images that are read."""

    def __init__(self, *labels):
        super().__init__(np.array([label], np.uint8) for label in labels)
        self.names, self.read = [f"image{i}" for i in range(len(labels))], 0

    def __getitem__(self, index):
        self.read += 1
        label = super().__getitem__(index)
        return Sample(np.zeros((*label.shape, 3), np.uint8), label, self.names[index])


def find(samples, data=DATA, seconds=10.0):
    return find_absent(samples, data, seconds=seconds, progress=None)


def test_absent_classes_are_named():
    mentions(find(Labels([0, 255], [2, 0])), "sky", "2 images")
    assert find(Labels([0, 255], [2, 1])) is None


def test_reading_ends_when_each_class_has_been_seen():
    samples = Labels(*[[0, 1, 2]] * 1000)
    assert find(samples) is None
    assert samples.read < 500


def test_reading_ends_when_the_time_is_over():
    assert find(Labels(*[[0]] * 1000), seconds=0).count("in the 1 images") == 1


@pytest.mark.parametrize(("ignore_index", "cause"), [(255, True), (254, False)])
def test_masks_of_0_and_255_name_the_likely_cause(ignore_index, cause):
    data = Data(classes=["background", "object"], ignore_index=ignore_index)
    found = describe_absent(np.bincount([0, 0, 255], minlength=256), data, 1)
    assert ("colours" in found) == cause
    assert "colours" not in describe_absent(np.bincount([0, 0], minlength=256), data, 1)


def test_a_labelled_image_without_a_labelled_pixel_is_refused():
    assert require_labels(Labels([0, 255], [1, 1]), DATA, progress=None)[[0, 1, 2, 255]].tolist() == [1, 2, 0, 1]
    with refuses(InputError, "image1"):
        require_labels(Labels([0, 255], [255, 255]), DATA, progress=None)

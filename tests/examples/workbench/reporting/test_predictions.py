"""Predictions as pictures: which images, how large, in which colours."""

import numpy as np
import torch
from torch import nn

from examples.scenes import Sample
from examples.workbench.data_settings import Data
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.reporting.predictions import choose_shown, draw_predictions, paint_classes
from examples.workbench.reporting.style import IGNORED, STRIPE, class_colours

DATA = Data(classes=["a", "b"], size=(32, 32))


class SecondClass(nn.Module):
    """Predicts class 1 everywhere."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, images):
        logits = self.bias[None, :, None, None].expand(len(images), 2, *images.shape[2:])
        return Segmentation(logits, logits)


def samples(count, height=40, width=48):
    image, label = np.full((height, width, 3), 9, np.uint8), np.zeros((height, width), np.uint8)
    label[:8] = 255
    return [Sample(image, label, f"{i}") for i in range(count)]


def test_image_truth_and_prediction_side_by_side():
    (picture,) = draw_predictions(SecondClass(), samples(1), DATA)
    colours = class_colours(["a", "b"])
    assert picture.dtype == np.uint8
    assert picture.shape == (40, 3 * 48, 3)
    assert (picture[:, :48] == 9).all()
    assert (picture[8:, 48:96] == colours[0]).all()
    assert (picture[:, 96:] == colours[1]).all()
    ignored = picture[:8, 48:96].reshape(-1, 3)
    assert {tuple(colour) for colour in ignored.tolist()} == {tuple(IGNORED.tolist()), tuple(STRIPE.tolist())}


def test_few_images_and_small_pictures():
    assert [sample.name for sample in choose_shown(samples(10))] == ["0", "3", "6", "9"]
    assert len(choose_shown(samples(2))) == 2
    (picture,) = draw_predictions(SecondClass(), samples(1, 600, 1100), DATA)
    assert picture.shape == (200, 3 * 367, 3)


def test_paint_leaves_the_ids_alone():
    ids = np.array([[0, 1, 255]], np.uint8)
    paint_classes(ids, DATA)
    assert ids.tolist() == [[0, 1, 255]]

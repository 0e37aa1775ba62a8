"""Resizing against Pillow's, bit for bit."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples.workbench.data.samples import resize_image
from examples.workbench.inference.resizing import resize_as_pillow

EXTENT = st.integers(1, 150)


@given(EXTENT, EXTENT, EXTENT, EXTENT, st.sampled_from(["random", "smooth", "black and white"]), st.integers(0, 99))
def test_it_is_pillows(height, width, rows, columns, kind, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "smooth":
        image = np.asarray(Image.fromarray(image[:5, :5]).resize((width, height), Image.Resampling.BICUBIC))
    elif kind == "black and white":
        image = image // 128 * np.uint8(255)
    expected = resize_image(image, (rows, columns))
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = resize_as_pillow(images, (rows, columns))
    np.testing.assert_array_equal(resized[0].permute(1, 2, 0).numpy(), expected)
    # As images in [0, 1] come.
    assert torch.equal(resize_as_pillow(images.float() / 255 * 255, (rows, columns)), resized)


def test_a_size_that_stays_only_rounds():
    images = torch.tensor([[0.2, 0.7], [254.6, 100.4]])
    assert resize_as_pillow(images, (2, 2)).tolist() == [[0, 1], [255, 100]]

"""The strong view: each change alone against Pillow, and what it leaves as it is."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from examples.workbench.data.samples import image_tensor
from examples.workbench.training.strong_view import strengthen

# Factors of 1, colour and no blur.
SAME = [0.5, 0.5, 0.5, 0.9, 0.9, 0.0]


def picture():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(60, 190, (6, 8, 3), np.uint8)).resize((40, 30), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def view(strength, **changes):
    """The strong view as `uint8 [H, W, 3]`; changes are of the draws, by their position."""
    draws = torch.tensor([[changes.get(f"d{i}", value) for i, value in enumerate(SAME)]])
    images = strengthen(image_tensor(picture())[None], strength, draws)
    return ((images[0] * 0.25 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()


def pillow(enhancer, factor):
    return np.asarray(enhancer(Image.fromarray(picture())).enhance(factor))


def apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def test_draws_in_the_middle_change_nothing():
    assert apart(view(0.5), picture()) == 0


@pytest.mark.parametrize("draw", [0.1, 0.8])
@pytest.mark.parametrize(
    ("place", "enhancer"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_factors_as_in_pillow(place, enhancer, draw):
    # Pillow rounds on its way.
    factor = 1 + 0.5 * (2 * draw - 1)
    assert apart(view(0.5, **{f"d{place}": draw}), pillow(enhancer, factor)) <= 1
    assert apart(view(0.5, **{f"d{place}": draw}), picture()) > 5


def test_grey_and_blur():
    grey = view(0.5, d3=0.19)
    assert apart(grey, np.asarray(Image.fromarray(picture()).convert("L").convert("RGB"))) <= 1
    assert apart(view(0.5, d3=0.21), picture()) == 0
    blurred = view(0.5, d4=0.49, d5=0.9)
    # Pillow's blur is of boxes, near a Gaussian.
    expected = np.asarray(Image.fromarray(picture()).filter(ImageFilter.GaussianBlur(0.9)))
    assert apart(blurred, expected) <= 4
    assert apart(blurred, picture()) > 5
    assert apart(view(0.5, d4=0.51, d5=0.9), picture()) == 0


def test_changes_follow_one_another_and_each_is_cut_off_to_the_range():
    source = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    draws = torch.tensor([[0.8, 0.95, 0.1, 0.9, 0.9, 0.0]])
    found = strengthen(image_tensor(source)[None], 0.5, draws)
    expected = Image.fromarray(source)
    for enhancer, factor in ((ImageEnhance.Brightness, 1.3), (ImageEnhance.Contrast, 1.45), (ImageEnhance.Color, 0.6)):
        expected = enhancer(expected).enhance(factor)
    found = ((found[0] * 0.25 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    assert apart(found, np.asarray(expected)) <= 3


def test_a_blur_of_0_pixels_changes_nothing():
    assert apart(view(0.5, d4=0.0, d5=0.0), picture()) == 0


def test_images_do_not_mix_and_stay_in_range():
    generator = torch.Generator().manual_seed(0)
    images = 4 * torch.rand(3, 3, 20, 24, generator=generator) - 2
    draws = torch.rand(3, 6, generator=generator)
    together = strengthen(images, 0.9, draws)
    assert together.abs().max() <= 2
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], strengthen(images[i : i + 1], 0.9, draws[i : i + 1]))

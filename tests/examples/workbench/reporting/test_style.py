import numpy as np

from examples.workbench.reporting.style import IGNORED, class_colours

# How colour-blind eyes see linear RGB, at full severity: Machado, Oliveira and Fernandes 2009, table 1.
SIGHTS = {
    "ordinary": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colours, sight):
    values = np.asarray(colours) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(sight), 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = (linear @ np.transpose(to_xyz) / [0.95047, 1.0, 1.08883]).T
    f = [np.where(v > (6 / 29) ** 3, np.cbrt(v), v / (3 * (6 / 29) ** 2) + 4 / 29) for v in (x, y, z)]
    return np.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])], axis=1)


def test_twelve_colours_and_the_grey_differ_for_every_eye():
    colours = np.concatenate([class_colours(12), [IGNORED]])
    for sight in SIGHTS.values():
        points = lab(colours, sight)
        distances = np.linalg.norm(points[:, None] - points, axis=-1) + 1000 * np.eye(13)
        # Two units are just noticeable; 18 are told apart without comparing.
        assert distances.min() >= 18


def test_shades_are_all_different_and_then_repeat():
    colours = class_colours(40)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours[:36], axis=0)) == 36
    np.testing.assert_array_equal(colours[36:], colours[:4])
    np.testing.assert_array_equal(class_colours(7), colours[:7])

import numpy as np
import pytest
import yaml

from examples.scenes import CLASS_COLOURS, CLASSES
from examples.workbench.options import PRESETS
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


def smallest_distance(colours):
    """Over all pairs of colours and all kinds of sight."""
    points = [lab(colours, sight) for sight in SIGHTS.values()]
    distances = [np.linalg.norm(p[:, None] - p, axis=-1) + 1000 * np.eye(len(p)) for p in points]
    return np.min(distances)


# Two units are just noticeable; 18 are told apart without comparing.
@pytest.mark.parametrize("preset", [None, "camvid-kitti", "idd-camvid"])
def test_classes_and_ignored_pixels_differ_in_every_sight(preset):
    classes = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())["data"]["classes"] if preset else CLASSES
    assert smallest_distance(np.concatenate([class_colours(classes), [IGNORED]])) >= 18


def test_twelve_unknown_classes_differ_in_every_sight():
    colours = class_colours([f"class {k}" for k in range(12)])
    assert smallest_distance(np.concatenate([colours, [IGNORED]])) >= 18


def test_the_distance_finds_colours_that_only_some_eyes_confuse():
    """Red and green of the same lightness, which differ in ordinary sight."""
    colours = np.array([[200, 90, 60], [120, 140, 60]])
    assert np.linalg.norm(np.diff(lab(colours, SIGHTS["ordinary"]), axis=0)) > 50
    assert smallest_distance(colours) < 18


def hues(classes):
    """The name of each colour's strongest channel, or grey."""
    return {
        name: "grey" if np.ptp(colour.astype(int)) < 16 else ["red", "green", "blue"][int(colour.argmax())]
        for name, colour in zip(classes, class_colours(classes), strict=True)
    }


def test_classes_have_the_colours_that_readers_expect():
    expected = {"sky": "blue", "road": "grey", "vegetation": "green", "car": "blue", "person": "red", "pole": "grey"}
    assert expected.items() <= hues(CLASSES).items()
    scenes = class_colours(CLASSES)
    assert [f"#{bytes(colour).hex()}" for colour in scenes] == list(CLASS_COLOURS)
    other = ["Tree", "sidewalk", "far_object", "pedestrian", "vehicle", "sky", "drivable", "pole"]
    same = ["vegetation", "pavement", "building", "person", "car", "sky", "road", "pole"]
    np.testing.assert_array_equal(class_colours(other), scenes[[CLASSES.index(name) for name in same]])


def test_classes_of_one_meaning_and_unknown_ones_have_colours_of_their_own():
    colours = class_colours(["moon", "tree", "vegetation", "sky", "sun"])
    assert len(np.unique(colours, axis=0)) == 5
    np.testing.assert_array_equal(colours[[1, 3]], class_colours(["vegetation", "sky"]))


def test_shades_are_all_different_and_then_repeat():
    names = [f"class {k}" for k in range(40)]
    colours = class_colours(names)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours[:36], axis=0)) == 36
    np.testing.assert_array_equal(colours[36:], colours[:4])
    np.testing.assert_array_equal(class_colours(names[:7]), colours[:7])

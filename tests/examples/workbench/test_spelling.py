"""Spelling: the nearest known name, and none where nothing is near."""

import pytest

from examples.workbench.settings import Settings
from examples.workbench.spelling import did_you_mean, find_mistake, is_setting, setting_types
from tests.errors import mentions

KNOWN = setting_types(Settings)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optimizer.lr", "optimiser.learning_rate"),
        ("optimiser.lr", "optimiser.learning_rate"),
        ("stepz", "steps"),
        ("log-every", "log_every"),
        ("batch_size", "optimiser.batch_size"),
        ("learning_rate", "optimiser.learning_rate"),
        ("data.target.imges", "data.target.images"),
        ("data.augmentation.color", "data.augmentation.colour"),
    ],
)
def test_the_nearest(name, nearest):
    assert did_you_mean(name, KNOWN) == f"; did you mean {nearest}?"


@pytest.mark.parametrize("name", ["optimiser.momentum", "fly", "x.y.z.w", ""])
def test_nothing_is_near(name):
    assert did_you_mean(name, KNOWN) == ""
    assert did_you_mean(name, []) == ""


def test_names_of_settings():
    assert {"steps", "data", "data.scenes.severity.fog", "data.target", "data.target.layout"} <= KNOWN.keys()
    assert is_setting("data.subsets.my_own", KNOWN)
    assert is_setting("data.target.colours.belt", KNOWN)
    assert not is_setting("data.target.colour", KNOWN)


def test_mistakes():
    assert find_mistake({"steps": 3, "method": "ass", "data.subsets.a": ["sky"], "network.depth": 50}, KNOWN) is None
    mentions(find_mistake({"steps": 3, "methods": "ass"}, KNOWN), "methods", "method?")
    mentions(find_mistake({"data.test.layout": "gta"}, KNOWN), "data.test.layout", "cityscapes", "gta", "gta5?")
    assert "did you mean" not in find_mistake({"method": "zzz"}, KNOWN)

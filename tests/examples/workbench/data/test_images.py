"""The images of a run, from folders and from the built-in scenes."""

import dataclasses

import pytest

from examples.scenes import CLASSES
from examples.workbench.data.images import open_images
from examples.workbench.errors import InputError
from examples.workbench.settings import Data, SceneSettings, Settings
from tests.errors import refuses
from tests.examples.workbench.data import formats

SCENES = Data(size=(32, 48), scenes=SceneSettings(source=5, target=4, validation=3, test=2))


def test_scenes():
    images = open_images(Settings(data=SCENES, seed=3), None)
    assert [len(samples) for samples in images] == [5, 4, 3, 2]
    assert images.target[0].image.shape == (32, 48, 3)
    assert len({samples[0].image.tobytes() for samples in images}) == 4


def test_folders(tmp_path):
    images = open_images(Settings(data=formats.DATA), formats.write_all(tmp_path))
    assert [len(samples) for samples in images] == [4, 6, 2, 2]
    assert images.target.names[0] == "aachen_000000_000019"


@pytest.mark.parametrize(
    ("data", "labelled", "words"),
    [
        (SCENES, 5, ("labelled", 4, 5)),
        (dataclasses.replace(SCENES, classes=["a", "b"]), 2, ("data.classes", list(CLASSES), ["a", "b"])),
        (formats.DATA, 7, ("labelled", 6, 7)),
        (dataclasses.replace(formats.DATA, validation=None), 2, ("data.source", "validation")),
        (dataclasses.replace(formats.DATA, classes=["road", "unicorn"]), 2, ("unicorn",)),
    ],
)
def test_images_that_do_not_fit_the_settings(tmp_path, data, labelled, words):
    root = formats.write_all(tmp_path)
    with refuses(InputError, *words):
        open_images(Settings(data=data, labelled=labelled), root)


def test_the_data_root_is_needed_and_named(tmp_path):
    with refuses(InputError, "--data-root", "none"):
        open_images(Settings(data=formats.DATA), None)
    with refuses(InputError, tmp_path / "gta5/images"):
        open_images(Settings(data=formats.DATA), tmp_path)

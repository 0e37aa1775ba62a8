"""The recipes of docs/labels.md, each run on files in the format of its annotation tool."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs.pages import read_blocks
from examples.workbench.__main__ import main as workbench
from examples.workbench.data.check import check_data
from examples.workbench.data.folders import FolderPair
from examples.workbench.data_settings import Folder
from examples.workbench.options import read_settings
from examples.workbench.settings import Settings

PAGE = Path(__file__).parent.parent.parent / "docs" / "labels.md"
# Every image shows a belt, and a box that covers a part of it.
IDS = np.zeros((48, 64), np.uint8)
IDS[20:, 8:56] = 1
IDS[10:30, 20:40] = 2
NAMES = ["a", "b c"]


def recipes():
    """The blocks of each section, by heading."""
    text = PAGE.read_text(encoding="utf-8").splitlines()
    found = {}
    for block in read_blocks(PAGE):
        heading = next(line for line in reversed(text[: block.line]) if line.startswith("## "))
        found.setdefault(heading[3:], []).append(block)
    return found


def code(heading, language, which=0):
    return [block.code for block in recipes()[heading] if block.language == language][which]


def run(heading):
    exec(compile(code(heading, "python"), f"labels.md: {heading}", "exec"), {})


def settings(heading, which=0):
    Path("mine.yaml").write_text(code(heading, "yaml", which), encoding="utf-8")
    return read_settings(["--config", "mine.yaml"])[0]


def write_photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*IDS.shape, 3), dtype=np.uint8)).save(path)


def write_mask(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(path)


def labels(folder, classes):
    samples = FolderPair(Path(), folder, classes=classes, partial=True)
    return {samples.names[i]: samples[i].label for i in samples.with_labels}


def check(found, expected, names=NAMES):
    assert found.keys() == set(names)
    for label in found.values():
        assert np.array_equal(label, expected)


# pycocotools uses NumPy's older array protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        write_photo(Path("photos", f"{name}.jpg"))


def index_masks():
    for name in NAMES:
        write_mask(np.array([0, 7, 11], np.uint8)[IDS], Path("old_masks", f"{name}.png"))
    run("Index masks")
    check(labels(Folder("photos", "masks"), ["belt", "box"]), np.array([255, 0, 1])[IDS])


def masks_of_colours():
    colours = np.array([[0, 0, 0], [60, 60, 60], [255, 255, 255]], np.uint8)
    for name in NAMES:
        write_mask(colours[IDS], Path("masks", f"{name}.png"))
    data = settings("Masks of colours").data
    check(labels(data.target, data.classes), np.array([0, 1, 255])[IDS])


def cvat():
    """CVAT's export `Segmentation mask 1.1`: palette PNGs of classes and of instances, and a list of names."""
    root = Path("cvat")
    table = {"background": (0, 0, 0), "belt": (60, 60, 60), "box": (250, 50, 83)}
    for name in NAMES:
        write_photo(root / f"JPEGImages/{name}.jpg")
        for below in ("SegmentationClass", "SegmentationObject"):
            mask = Image.fromarray(IDS)
            mask.putpalette([channel for colour in table.values() for channel in colour])
            write_mask(mask, root / below / f"{name}.png")
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in table.items()]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines, ""]))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/default.txt").write_text("\n".join(NAMES))
    data = settings("CVAT").data
    check(labels(data.target, data.classes), np.array([255, 0, 1])[IDS])
    # The section's second case: unmarked pixels are a class.
    classes = re.search(r"`classes: \[(background, belt.*?)\]`", PAGE.read_text())[1].split(", ")
    check(labels(data.target, classes), IDS)


def roboflow():
    names = ["a_jpg.rf.0123456789abcdef", "b_png.rf.fedcba9876543210"]
    for name in names:
        write_photo(Path("roboflow/train", f"{name}.jpg"))
        write_mask(IDS, Path("roboflow/train", f"{name}_mask.png"))
    Path("roboflow/train/_classes.csv").write_text(code("Roboflow", "text"))
    data = settings("Roboflow").data
    assert data.classes == [line.split(", ")[1] for line in code("Roboflow", "text").splitlines()[1:]]
    # The export alone, and the export with other images that have no masks.
    apart = settings("Roboflow", 1).data
    assert (apart.classes, apart.target) == (data.classes, Folder("photos"))
    for folder in (data.target, apart.labelled):
        check(labels(folder, data.classes), IDS, names)


def label_studio():
    root = Path("label-studio")
    # The first image was uploaded, the second is in a connected folder, the third has no annotation.
    images = {
        12: "/data/upload/1/1a2b3c4d-a.jpg",
        13: "/data/local-files/?d=photos/b c.jpg",
        14: "/data/upload/1/0a0a0a0a-x.jpg",
    }
    root.mkdir()
    (root / "export.json").write_text(
        json.dumps([{"id": task, "data": {"image": image}} for task, image in images.items()])
    )
    for task in (12, 13):
        box, left = IDS == 2, np.arange(IDS.shape[1]) < 30
        # The box has two strokes. The belt also covers the pixels below the box.
        strokes = {"box-0": box & left, "box-1": box & ~left, "belt-0": IDS > 0}
        for tag, pixels in strokes.items():
            write_mask(pixels.astype(np.uint8) * 255, root / f"task-{task}-annotation-3-by-1-tag-{tag}.png")
    write_photo(Path("photos/x.jpg"))
    run("Label Studio")
    data = settings("Label Studio").data
    check(labels(data.target, data.classes), IDS)


def coco_polygons():
    def annotation(image, category, left, top, right, bottom):
        corners = [left, top, right, top, right, bottom, left, bottom]
        size = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
        return {"image_id": image, "category_id": category, "segmentation": [corners], "iscrowd": 0, **size}

    found = []
    for image in (5, 9):
        found += [annotation(image, 3, 8, 20, 56, 48), annotation(image, 70, 20, 10, 40, 30)]
    annotations = [{"id": number, **one} for number, one in enumerate(found, 1)]
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 48} for i, name in zip((5, 9), NAMES)]
    categories = [{"id": 70, "name": "box"}, {"id": 3, "name": "belt"}]
    Path("coco").mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    Path("coco/annotations.json").write_text(json.dumps(content))
    run("COCO polygons")
    check(labels(Folder("photos", "masks"), ["background", "belt", "box"]), IDS)


RECIPES = {
    "Index masks": index_masks,
    "Masks of colours": masks_of_colours,
    "CVAT": cvat,
    "Roboflow": roboflow,
    "Label Studio": label_studio,
    "COCO polygons": coco_polygons,
}


@pytest.mark.parametrize("heading", RECIPES)
def test_recipe(heading):
    RECIPES[heading]()


def label_studio_of(images, tags):
    """An export of tasks 1, 2, ... with these images. Each task has one PNG for each of these tags."""
    root = Path("label-studio")
    root.mkdir()
    tasks = [{"id": task, "data": {"image": image}} for task, image in enumerate(images, 1)]
    (root / "export.json").write_text(json.dumps(tasks))
    for task in range(1, len(images) + 1):
        for tag in tags:
            write_mask((IDS > 0).astype(np.uint8) * 255, root / f"task-{task}-annotation-{tag}.png")


def test_label_studio_keeps_names():
    """The date in the name of a file that was not uploaded is not a prefix. A URL may escape letters."""
    label_studio_of(["s3://bucket/20240110-001.jpg", "/data/upload/1/1a2b3c4d-F%C3%B6rder.jpg"], ["3-by-1-tag-belt-0"])
    run("Label Studio")
    assert {file.stem for file in Path("masks").iterdir()} == {"20240110-001", "Förder"}


@pytest.mark.parametrize(
    ("images", "tags", "words"),
    [
        (["/a/x.jpg", "/b/x.jpg"], ["3-by-1-tag-belt-0"], "called x"),
        (["x.jpg"], ["3-by-1-brush-belt-0"], "brush-belt-0.png"),
        (["x.jpg"], ["3-by-1-tag-Belt-0"], "tag-Belt-0.png"),
        (["x.jpg"], ["3-by-1-tag-belt-0", "4-by-2-tag-box-0"], "task 1"),
    ],
)
def test_label_studio_loses_nothing_in_silence(images, tags, words):
    label_studio_of(images, tags)
    with pytest.raises(SystemExit, match=words):
        run("Label Studio")
    assert not Path("masks").exists()


def test_the_check_tells_of_colours_that_are_no_class():
    cvat()
    data = dataclasses.replace(settings("CVAT").data, size=(48, 64))
    notes = check_data(Settings(method="labelled-only", data=data), Path()).notes
    assert any("background" in note and "ignored" in note for note in notes)


def test_every_recipe_has_its_test():
    assert recipes().keys() == RECIPES.keys()


def test_coco_prints_the_classes(capsys):
    coco_polygons()
    assert capsys.readouterr().out.splitlines()[-1] == "classes: ['background', 'belt', 'box']"


def test_the_check_reads_an_export(capsys):
    """A whole settings file with the lines of a recipe."""
    roboflow()
    split = "{images: roboflow/train, labels: roboflow/train, label_ending: _mask.png}"
    assert f"target: {split}" in code("Roboflow", "yaml")
    Path("mine.yaml").write_text(f"{code('Roboflow', 'yaml')}  size: [48, 64]\n  source: {split}\n")
    capsys.readouterr()
    assert workbench(["train", "--config", "mine.yaml", "--data-root", ".", "--check"]) == 0
    assert "2 images" in capsys.readouterr().out

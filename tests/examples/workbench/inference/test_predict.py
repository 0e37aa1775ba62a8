"""The command `predict`: its files, and one line for what cannot be used."""

import shutil

import numpy as np
import pytest
from PIL import Image

from examples.workbench.__main__ import main
from examples.workbench.inference.trained import load_run
from examples.workbench.reporting.style import class_colours
from tests.errors import mentions

# The trainer's libraries give their own warnings.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def images(tmp_path):
    """A folder to put images in."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.fixture
def predict(trained, images, tmp_path):
    """Run the command on the folder of images."""

    def run(*more, of=images, out=tmp_path / "masks"):
        return main(["predict", "--run", str(trained.run), "--images", str(of), "--out", str(out), *more])

    return run


def put(file, size=(20, 30), **options):
    rng = np.random.default_rng(len(file.name))
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, **options)
    return file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(capsys, *words):
    captured = capsys.readouterr()
    assert captured.out == ""
    mentions(captured.err.splitlines()[-1].split("\r")[-1].strip(), "error", *words)


def test_the_masks_of_the_test_images_are_those_of_save_predictions(trained, predict, tmp_path, capsys):
    assert predict(of=trained.images) == 0
    assert capsys.readouterr().out.splitlines() == [f"4 masks in {tmp_path / 'masks'}"]
    saved = trained.run / "predictions"
    assert names(tmp_path / "masks") == names(saved) == [f"{i}.png" for i in range(4)]
    for name in names(saved):
        assert (tmp_path / "masks" / name).read_bytes() == (saved / name).read_bytes()


def test_a_mask_holds_ids_and_shows_colours(predict, images, tmp_path, trained):
    image = put(images / "a.png")
    assert predict() == 0
    mask = Image.open(tmp_path / "masks" / "a.png")
    ids = load_run(trained.run).predict(np.asarray(Image.open(image)))
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), ids)
    np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), class_colours(["a", "b", "c"])[ids])


def test_overlay_and_probabilities(predict, images, tmp_path):
    put(images / "a.png")
    assert predict("--overlay", "--probabilities") == 0
    assert names(tmp_path / "masks") == ["a.npz", "a.png", "a_overlay.png"]
    mask = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    overlay = np.asarray(Image.open(tmp_path / "masks" / "a_overlay.png")).astype(float)
    half = (np.asarray(Image.open(images / "a.png")).astype(float) + class_colours(["a", "b", "c"])[mask]) / 2
    assert np.abs(overlay - half).max() <= 0.5
    with np.load(tmp_path / "masks" / "a.npz") as file:
        probabilities, classes = file["probabilities"], file["classes"]
    assert classes.tolist() == ["a", "b", "c"]
    assert probabilities.dtype == np.float16
    assert probabilities.shape == (3, 20, 30)
    np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=3 * 2**-11)
    # Where rounding to 16 bits has not made two equal.
    apart = np.diff(np.sort(probabilities, 0), axis=0)[-1] > 0
    assert apart.mean() > 0.9
    np.testing.assert_array_equal(probabilities.argmax(0)[apart], mask[apart])


def test_images_of_any_size_and_kind(predict, images, tmp_path, capsys):
    put(images / "a.b.JPG", (7, 5), format="jpeg")
    put(images / "large.jpeg", (300, 200))
    put(images / "one pixel.png", (1, 1))
    put(images / ".hidden.png")
    (images / ".DS_Store").write_bytes(b"x")
    (images / "notes.txt").write_text("no image")
    (images / "ä").mkdir()
    Image.fromarray(np.zeros((6, 4), np.uint8)).save(images / "grey.png")
    Image.fromarray(np.zeros((6, 4, 4), np.uint8)).save(images / "transparent.png")
    assert predict() == 0
    sizes = {path.name: np.asarray(Image.open(path)).shape[::-1] for path in (tmp_path / "masks").iterdir()}
    assert sizes == {
        "a.b.png": (5, 7),
        "large.png": (200, 300),
        "one pixel.png": (1, 1),
        "grey.png": (4, 6),
        "transparent.png": (4, 6),
    }


def test_an_image_is_turned_as_its_camera_says(predict, images, tmp_path, trained):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(put(images / "a.png", (20, 30)))
    picture.save(images / "a.png", exif=exif)
    assert predict() == 0
    turned = np.rot90(np.asarray(picture), -1)
    mask = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    np.testing.assert_array_equal(mask, load_run(trained.run).predict(np.ascontiguousarray(turned)))


def test_one_image(predict, images, tmp_path, capsys):
    put(images / "a.png")
    put(images / "b.png")
    assert predict(of=images / "b.png") == 0
    assert names(tmp_path / "masks") == ["b.png"]
    assert capsys.readouterr().out.splitlines() == [f"1 mask in {tmp_path / 'masks'}"]


def test_best(trained, predict, images, tmp_path):
    put(images / "a.png")
    assert predict("--best", "--probabilities") == 0
    image = np.asarray(Image.open(images / "a.png"))
    last, best = (load_run(trained.run, best=best).logits(image).softmax(0).half().numpy() for best in (False, True))
    with np.load(tmp_path / "masks" / "a.npz") as file:
        np.testing.assert_array_equal(file["probabilities"], best)
    assert not np.array_equal(last, best)


def test_files_of_the_same_name_are_overwritten(predict, images, tmp_path):
    put(images / "a.png")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(b"old")
    (tmp_path / "masks" / "b.png").write_bytes(b"other")
    assert predict() == 0
    assert np.asarray(Image.open(tmp_path / "masks" / "a.png")).shape == (20, 30)
    assert (tmp_path / "masks" / "b.png").read_bytes() == b"other"


def test_an_unreadable_image_is_named_and_the_masks_before_it_stay(predict, images, tmp_path, capsys):
    put(images / "a.png")
    put(images / "b.png").write_bytes(b"x")
    put(images / "c.png")
    assert predict() == 2
    refused(capsys, images / "b.png")
    assert names(tmp_path / "masks") == ["a.png"]


def test_images_that_would_have_one_file(predict, images, tmp_path, capsys):
    put(images / "a.png")
    put(images / "a.jpg")
    assert predict() == 2
    refused(capsys, "--images", "a.png", "a.jpg")
    (images / "a.jpg").rename(images / "a_overlay.jpg")
    assert predict("--overlay") == 2
    refused(capsys, images / "a.png", images / "a_overlay.jpg")
    assert not (tmp_path / "masks").exists()
    assert predict() == 0


def test_the_images_are_not_overwritten(predict, images, tmp_path, capsys):
    before = put(images / "a.png").read_bytes()
    (tmp_path / "link").symlink_to(images)
    for of, out in (
        (images, images),
        (images / "a.png", images),
        (images, tmp_path / "photos" / "." / ""),
    ):
        assert predict(of=of, out=out) == 2
        refused(capsys, "--out", out)
    assert predict(out=tmp_path / "link") == 2
    refused(capsys, "--out", tmp_path / "link")
    assert (images / "a.png").read_bytes() == before


def test_images_and_folders_that_cannot_be_used(predict, images, tmp_path, capsys):
    assert predict() == 2
    refused(capsys, "--images", images, ".png", "none")
    assert predict(of=tmp_path / "none") == 2
    refused(capsys, "--images", tmp_path / "none")
    (tmp_path / "text.txt").write_text("no image")
    assert predict(of=tmp_path / "text.txt") == 2
    refused(capsys, "--images", tmp_path / "text.txt", ".png")
    put(images / "a.png")
    assert predict(out=tmp_path / "text.txt") == 2
    refused(capsys, "--out", tmp_path / "text.txt")


def test_bad_command_lines(trained, images, tmp_path, capsys):
    for arguments, words in (
        ([], ("--run", "--images", "--out")),
        (["--run", str(tmp_path), "--images", str(images), "--out", "x"], ("--run", tmp_path, "settings.yaml")),
        (["--run", "x", "--images", "y", "--out", "z", "--accelerator", "tpu"], ("--accelerator", "tpu")),
    ):
        assert main(["predict", *arguments]) == 2
        refused(capsys, *words)


def test_nothing_is_needed_but_the_run_folder(trained, predict, images, tmp_path):
    """Neither the images that it was trained on nor their masks."""
    put(images / "a.png")
    shutil.copytree(trained.run, tmp_path / "copy")
    moved = trained.root.rename(trained.root.with_name("away"))
    try:
        arguments = ["--images", str(images), "--out", str(tmp_path / "masks")]
        assert main(["predict", "--run", str(tmp_path / "copy"), *arguments]) == 0
    finally:
        moved.rename(trained.root)

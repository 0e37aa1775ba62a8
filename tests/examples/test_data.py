"""Folders of images, augmentation, and batches that do not hang on workers."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from examples.ass.data import (
    Augmentation,
    Folder,
    FolderPair,
    InputError,
    Sample,
    Some,
    TrainingSet,
    augment,
    batches,
    fit,
    image_tensor,
    labelled_subset,
)
from semshift.sampling import MixedBatchSampler

PLAIN = Augmentation(scale=(1.0, 1.0), flip=0.0, colour=0.0)


def sample(height=20, width=30, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Sample(image, rng.integers(0, 3, (height, width)).astype(np.uint8), f"image-{seed}")


@pytest.fixture
def root(tmp_path):
    for kind in ("img", "lbl"):
        (tmp_path / kind).mkdir()
    for i, ending in enumerate(("png", "jpg", "JPEG")):
        made = sample(seed=i)
        Image.fromarray(made.image).save(tmp_path / "img" / f"{i}.{ending}")
        Image.fromarray(made.label).save(tmp_path / "lbl" / f"{i}.png")
    (tmp_path / "img" / "notes.txt").touch()
    return tmp_path


def pair(root, images="img", labels="lbl", **changes):
    return FolderPair(root, Folder(images, labels), **({"num_classes": 3} | changes))


def test_reads_pairs_in_name_order(root):
    samples = pair(root)
    assert len(samples) == 3
    assert samples.names == ["0", "1", "2"]
    assert np.array_equal(samples[0].image, sample(seed=0).image)
    assert np.array_equal(samples[2].label, sample(seed=2).label)
    assert samples[1].image.shape == (20, 30, 3)
    assert samples[1].name == "1"


@pytest.mark.parametrize("mode", ["I;16", "P"])
def test_index_masks_of_other_modes(root, mode):
    label = sample(seed=0).label
    if mode == "P":
        mask = Image.new("P", (30, 20))
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        mask.putdata(label.ravel().tolist())
    else:
        mask = Image.fromarray(label.astype(np.uint16))
    mask.save(root / "lbl" / "0.png")
    assert np.array_equal(pair(root)[0].label, label)


def cut(file):
    file.write_bytes(file.read_bytes()[:200])


def save(array, file):
    Image.fromarray(array).save(file)


@pytest.mark.parametrize(
    ("damage", "index", "message"),
    [
        (lambda r: shutil.rmtree(r / "lbl"), None, "expected a folder {root}/lbl, got none"),
        (
            lambda r: [file.unlink() for file in (r / "img").iterdir()],
            None,
            "expected {root}/img to hold files ending in .jpg, .jpeg, .png, got none",
        ),
        (
            lambda r: (r / "lbl" / "1.png").unlink(),
            None,
            "expected a mask for every image, got none in {root}/lbl for {root}/img/1.jpg",
        ),
        (
            lambda r: (r / "img" / "1.jpg").unlink(),
            None,
            "expected an image for every mask, got none in {root}/img for {root}/lbl/1.png",
        ),
        (
            lambda r: save(sample().image, r / "img" / "1.png"),
            None,
            "expected one file of a name, got {root}/img/1.jpg and 1.png",
        ),
        (
            lambda r: save(sample(20, 31).label, r / "lbl" / "0.png"),
            0,
            "expected {root}/lbl/0.png to have its image's size 30 x 20, got 31 x 20",
        ),
        (
            lambda r: save(sample().image, r / "lbl" / "0.png"),
            0,
            "expected {root}/lbl/0.png to be an index mask of one channel, got an image of mode RGB",
        ),
        (
            lambda r: save(sample().label + 1, r / "lbl" / "0.png"),
            0,
            "{root}/lbl/0.png: expected labels in [0, 3) or ignore_index 255, got 3 (*",
        ),
        (
            lambda r: cut(r / "lbl" / "0.png"),
            0,
            "expected {root}/lbl/0.png to be a whole image, got one that does not*",
        ),
        (
            lambda r: cut(r / "img" / "1.jpg"),
            1,
            "expected {root}/img/1.jpg to be a whole image, got one that does not*",
        ),
        (
            lambda r: (r / "img" / "0.png").write_text("not an image"),
            0,
            "expected {root}/img/0.png to be a whole image, got one that does not*",
        ),
    ],
)
def test_bad_folders(root, damage, index, message):
    damage(root)
    expected = re.escape(message.format(root=root)).replace(r"\*", ".*")
    with pytest.raises(InputError, match="^" + expected + "$"):
        pair(root)[index or 0]


@pytest.mark.parametrize("outside", ["../img", "/etc"])
def test_folders_stay_below_the_root(root, outside):
    message = f"expected a folder below the data root {root}, got {outside}"
    with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
        pair(root, images=outside)


def test_labelled_subsets_nest():
    order = np.random.RandomState(0).permutation(50)
    assert labelled_subset(50, 10) == order[:10].tolist()
    assert labelled_subset(50, 20)[:10] == labelled_subset(50, 10)
    for wrong in (0, 51):
        message = f"expected labelled in 1 to the 50 target training images, got {wrong}"
        with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
            labelled_subset(50, wrong)


def test_some():
    some = Some([sample(seed=i) for i in range(4)], [2, 0])
    assert len(some) == 2
    assert [some[i].name for i in range(2)] == ["image-2", "image-0"]


def test_names_are_known_without_reading(root):
    cut(root / "img" / "1.jpg")
    assert Some(pair(root), [2, 1]).names == ["2", "1"]


def test_no_augmentation_is_the_image_itself():
    made = sample(32, 48)
    result = augment(made, (32, 48), np.random.default_rng(0), PLAIN)
    assert np.array_equal(result.image, made.image)
    assert np.array_equal(result.label, made.label)


def test_mirroring_takes_image_and_label_along():
    made = sample(32, 48)
    result = augment(made, (32, 48), np.random.default_rng(0), Augmentation((1.0, 1.0), 1.0, 0.0))
    assert np.array_equal(result.image, made.image[:, ::-1])
    assert np.array_equal(result.label, made.label[:, ::-1])


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 2.5])
def test_crops_have_the_size_and_stay_aligned(scale):
    # The image is its label, so a crop that loses the label would show.
    label = np.repeat(np.repeat(np.arange(12).reshape(3, 4), 10, 0), 12, 1).astype(np.uint8)
    made = Sample(np.repeat(20 * label[..., None], 3, 2), label, "grid")
    for seed in range(8):
        result = augment(made, (32, 40), np.random.default_rng(seed), Augmentation((scale, scale), 0.5, 0.0))
        assert result.image.shape == (32, 40, 3)
        inside = result.label != 255
        assert set(np.unique(result.label[inside])) <= set(range(12))
        wrong = np.abs(result.image[..., 0].astype(int) - 20 * result.label.astype(int))[inside] > 10
        assert wrong.mean() < 0.2
        assert (result.image[~inside] == 0).all()
        assert (~inside).any() == (scale < 1)


@pytest.mark.parametrize("scale", [0.6, 1.3])
def test_labels_are_never_mixed(scale):
    # Any mean of the two would be an id between them.
    made = sample(40, 40)._replace(label=np.random.default_rng(0).choice([0, 200], (40, 40)).astype(np.uint8))
    for seed in range(4):
        result = augment(made, (32, 32), np.random.default_rng(seed), Augmentation((scale, scale)))
        assert {0, 200} <= set(np.unique(result.label)) <= {0, 200, 255}


def test_augmentation_is_a_function_of_its_generator():
    made = sample(40, 40)
    first, again, other = (augment(made, (32, 32), np.random.default_rng(s), Augmentation()) for s in (0, 0, 1))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_fit_and_tensor():
    made = sample(20, 30)
    assert fit(made, (20, 30)) is made.image
    assert fit(made, (32, 48)).shape == (32, 48, 3)
    tensor = image_tensor(np.array([[[0, 127.5, 255]]]))
    assert tensor.shape == (3, 1, 1)
    assert tensor.flatten().tolist() == [-2, 0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale": (1.5, 0.5)},
            "expected augmentation.scale to be two positive numbers, the smaller first, got (1.5, 0.5)",
        ),
        ({"flip": -0.1}, "expected augmentation.flip in [0, 1], got -0.1"),
        ({"colour": 1.0}, "expected augmentation.colour in [0, 1), got 1.0"),
    ],
)
def test_bad_augmentation(changes, message):
    with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
        Augmentation(**changes)


def drawn(first_step=0, workers=0):
    domains = {
        "source": [sample(seed=i) for i in range(5)],
        "unlabelled": [sample(seed=10 + i) for i in range(3)],
    }
    sampler = MixedBatchSampler(
        {"source": 5, "unlabelled": 3},
        {"source": 2, "unlabelled": 1},
        seed=0,
        first_step=first_step,
        steps=4 - first_step,
    )
    return list(batches(TrainingSet(domains, (32, 32), Augmentation(), 0), sampler, workers=workers))


def same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (_, left), (_, right) in zip(a, b):
        assert all(torch.equal(left[domain][key], right[domain][key]) for domain in left for key in left[domain])


def test_batches():
    made = drawn()
    assert [step for step, _ in made] == [0, 1, 2, 3]
    batch = made[0][1]
    assert {domain: sorted(part) for domain, part in batch.items()} == {
        "source": ["image", "label"],
        "unlabelled": ["image"],
    }
    assert batch["source"]["image"].shape == (2, 3, 32, 32)
    assert batch["source"]["label"].dtype == torch.int64
    assert not torch.equal(made[0][1]["source"]["image"], made[1][1]["source"]["image"])
    same(made[2:], drawn(first_step=2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_file_is_told_in_one_line(root, workers):
    cut(root / "img" / "1.jpg")
    training = TrainingSet({"source": pair(root)}, (32, 32), PLAIN, 0)
    sampler = MixedBatchSampler({"source": 3}, {"source": 3}, seed=0, steps=1)
    message = f"^expected {re.escape(str(root))}/img/1.jpg to be a whole image, got one that does not read: [^\n]*$"
    with pytest.raises(InputError, match=message):
        list(batches(training, sampler, workers=workers))


@pytest.mark.slow
def test_batches_do_not_hang_on_workers():
    same(drawn(), drawn(workers=2))

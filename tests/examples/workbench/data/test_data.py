"""Folders of images, augmentation, and batches that do not hang on workers."""

import contextlib
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import semshift
from examples.workbench.data.augment import augment
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.loading import TrainingSet
from examples.workbench.data.samples import Subset, image_tensor, labelled_subset, resize_image
from examples.workbench.errors import InputError
from examples.workbench.settings import Augmentation, Folder
from tests.errors import refuses

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
    return FolderPair(root, Folder(images, labels), **({"classes": ["a", "b", "c"]} | changes))


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


def break_header(file):
    content = bytearray(file.read_bytes())
    content[8:12] = (5).to_bytes(4, "big")
    content[21:25] = zlib.crc32(content[12:21]).to_bytes(4, "big")
    file.write_bytes(content)


def write_deep_colours(file):
    # Pillow writes no colours of 16 bits.
    content = b"\x89PNG\r\n\x1a\n"
    header, pixels = struct.pack(">2I5B", 30, 20, 16, 2, 0, 0, 0), zlib.compress(bytes(20 * (1 + 30 * 6)))
    for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    file.write_bytes(content)


def save(array, file):
    Image.fromarray(array).save(file)


@pytest.mark.parametrize(
    ("damage", "index", "words"),
    [
        (lambda r: shutil.rmtree(r / "lbl"), None, ("{root}/lbl",)),
        (
            lambda r: [file.unlink() for file in (r / "img").iterdir()],
            None,
            ("{root}/img", ".jpg", ".jpeg", ".png"),
        ),
        (
            lambda r: (r / "lbl" / "1.png").unlink(),
            None,
            ("mask", "{root}/lbl", "{root}/img/1.jpg"),
        ),
        (
            lambda r: (r / "img" / "1.jpg").unlink(),
            None,
            ("image", "{root}/img", "{root}/lbl/1.png"),
        ),
        (
            lambda r: save(sample().image, r / "img" / "1.png"),
            None,
            ("{root}/img/1.jpg", "1.png"),
        ),
        (
            lambda r: save(sample(20, 31).label, r / "lbl" / "0.png"),
            0,
            ("{root}/lbl/0.png", "30 x 20", "31 x 20"),
        ),
        (
            lambda r: save(sample().image, r / "lbl" / "0.png"),
            0,
            ("{root}/lbl/0.png", "RGB"),
        ),
        (
            lambda r: save(sample().label + 1, r / "lbl" / "0.png"),
            0,
            ("{root}/lbl/0.png", "labels", "[0, 3)", "ignore_index 255", "got 3 ("),
        ),
        (
            lambda r: cut(r / "lbl" / "0.png"),
            0,
            ("{root}/lbl/0.png", "whole"),
        ),
        (
            lambda r: cut(r / "img" / "1.jpg"),
            1,
            ("{root}/img/1.jpg", "whole"),
        ),
        (
            lambda r: save(sample().image[..., 0].astype(np.uint16) * 257, r / "img" / "0.png"),
            0,
            ("{root}/img/0.png", "8 bits", 16),
        ),
        (
            lambda r: write_deep_colours(r / "img" / "0.png"),
            0,
            ("{root}/img/0.png", "8 bits", 16),
        ),
        (
            lambda r: Image.fromarray(sample().image[..., 0].astype(np.float32)).save(r / "img" / "0.png", "TIFF"),
            0,
            ("{root}/img/0.png", "8 bits", 32),
        ),
        (
            lambda r: save(np.full((20, 30), 300, np.uint16), r / "lbl" / "0.png"),
            0,
            ("{root}/lbl/0.png", "labels", "[0, 3)", "ignore_index 255", 300, 600),
        ),
        (
            # A header whose length field is wrong: Pillow's decoder raises a bare ValueError.
            lambda r: break_header(r / "img" / "0.png"),
            0,
            ("{root}/img/0.png", "whole"),
        ),
        (
            lambda r: (r / "img" / "0.png").write_bytes(b""),
            0,
            ("{root}/img/0.png", "whole"),
        ),
        (
            lambda r: (r / "img" / "0.png").write_text("not an image"),
            0,
            ("{root}/img/0.png", "whole"),
        ),
    ],
)
def test_bad_folders(root, damage, index, words):
    damage(root)
    with refuses(InputError, *(str(word).format(root=root) for word in words)):
        pair(root)[index or 0]


@pytest.mark.parametrize("file", ["img/0.png", "img/1.jpg", "lbl/0.png"])
def test_a_file_cut_anywhere_is_told_or_whole(root, file):
    file = root / file
    content, whole = file.read_bytes(), pair(root)[int(file.stem)]
    for length in range(0, len(content), max(1, len(content) // 100)):
        file.write_bytes(content[:length])
        # The last 20 bytes of a PNG hold no pixel: two checksums and the chunk that ends the file.
        if len(content) - length > 20:
            with refuses(InputError, file, "whole"):
                pair(root)[int(file.stem)]
            continue
        with contextlib.suppress(InputError):
            read = pair(root)[int(file.stem)]
            assert np.array_equal(read.image, whole.image)
            assert np.array_equal(read.label, whole.label)


@pytest.mark.parametrize(("classes", "ignore_index"), [(0, 255), (257, 255), (3, 256), (3, -1)])
def test_labels_must_fit_into_eight_bits(root, classes, ignore_index):
    with refuses(InputError, "classes", classes, "ignore_index", ignore_index):
        pair(root, classes=[str(k) for k in range(classes)], ignore_index=ignore_index)


def test_a_link_below_the_root_may_lead_anywhere(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "img"
    (root / "img").rename(elsewhere)
    (root / "img").symlink_to(elsewhere)
    assert pair(root)[0].name == "0"


@pytest.mark.parametrize("outside", ["../img", "/etc", "img/../../img"])
def test_folders_stay_below_the_root(root, outside):
    with refuses(InputError, root, outside):
        pair(root, images=outside)


def test_labelled_subsets_nest():
    order = np.random.RandomState(0).permutation(50)
    assert labelled_subset(50, 10) == order[:10].tolist()
    assert labelled_subset(50, 20)[:10] == labelled_subset(50, 10)
    for wrong in (0, 51):
        with refuses(InputError, "labelled", 50, wrong):
            labelled_subset(50, wrong)


def test_some():
    some = Subset([sample(seed=i) for i in range(4)], [2, 0])
    assert len(some) == 2
    assert [some[i].name for i in range(2)] == ["image-2", "image-0"]


def test_names_are_known_without_reading(root):
    cut(root / "img" / "1.jpg")
    assert Subset(pair(root), [2, 1]).names == ["2", "1"]


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
    assert resize_image(made, (20, 30)) is made.image
    assert resize_image(made, (32, 48)).shape == (32, 48, 3)
    tensor = image_tensor(np.array([[[0, 127.5, 255]]]))
    assert tensor.shape == (3, 1, 1)
    assert tensor.flatten().tolist() == [-2, 0, 2]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("scale", (1.5, 0.5), "positive"), ("flip", -0.1, "[0, 1]"), ("colour", 1.0, "[0, 1)")],
)
def test_bad_augmentation(name, value, allowed):
    with refuses(InputError, f"augmentation.{name}", allowed, value):
        Augmentation(**{name: value})


def drawn(first_step=0, workers=0):
    domains = {
        "source": [sample(seed=i) for i in range(5)],
        "unlabelled": [sample(seed=10 + i) for i in range(3)],
    }
    sampler = semshift.MixedBatchSampler(
        {"source": 5, "unlabelled": 3},
        {"source": 2, "unlabelled": 1},
        seed=0,
        first_step=first_step,
        steps=4 - first_step,
    )
    return list(
        load_batches(
            TrainingSet(domains, dict.fromkeys(domains, (32, 32)), Augmentation(), 0), sampler, workers=workers
        )
    )


def same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (_, left), (_, right) in zip(a, b):
        assert all(torch.equal(left[domain][key], right[domain][key]) for domain in left for key in left[domain])


def test_two_ranks_do_what_one_does():
    domains = {"source": [sample(seed=i) for i in range(5)], "target": [sample(seed=9 + i) for i in range(4)]}
    training = TrainingSet(domains, dict.fromkeys(domains, (32, 32)), Augmentation(), 0)
    sizes = {"source": 5, "target": 4}
    whole = semshift.MixedBatchSampler(sizes, {"source": 4, "target": 2}, seed=0, steps=3)
    halves = [
        semshift.MixedBatchSampler(sizes, {"source": 2, "target": 1}, seed=0, rank=rank, world_size=2, steps=3)
        for rank in range(2)
    ]
    for (_, one), *two in zip(load_batches(training, whole), *(load_batches(training, half) for half in halves)):
        for domain, part in one.items():
            for key, value in part.items():
                assert torch.equal(value, torch.cat([batch[domain][key] for _, batch in two]))


def test_a_sampler_over_other_images_is_refused():
    training = TrainingSet({"source": [sample()] * 5}, {"source": (32, 32)}, PLAIN, 0)
    # An index past the end would otherwise end an epoch without a word, or be an image of another domain.
    with refuses(ValueError, {"source": 5}, {"source": 6}):
        next(load_batches(training, semshift.MixedBatchSampler({"source": 6}, {"source": 1}, seed=0)))
    for index in (5, -1):
        with refuses(IndexError, "index", 5, index):
            training[0, 0, index]


def test_batches():
    made = drawn()
    assert [step for step, _ in made] == [0, 1, 2, 3]
    batch = made[0][1]
    assert {domain: sorted(part) for domain, part in batch.items()} == {
        "source": ["image", "label"],
        "unlabelled": ["image", "inside"],
    }
    assert batch["source"]["image"].shape == (2, 3, 32, 32)
    assert batch["source"]["label"].dtype == torch.int64
    assert not torch.equal(made[0][1]["source"]["image"], made[1][1]["source"]["image"])
    same(made[2:], drawn(first_step=2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_file_is_told_in_one_line(root, workers):
    cut(root / "img" / "1.jpg")
    training = TrainingSet({"source": pair(root)}, {"source": (32, 32)}, PLAIN, 0)
    sampler = semshift.MixedBatchSampler({"source": 3}, {"source": 3}, seed=0, steps=1)
    with refuses(InputError, root / "img/1.jpg", "whole"):
        list(load_batches(training, sampler, workers=workers))


@pytest.mark.slow
def test_batches_do_not_hang_on_workers():
    same(drawn(), drawn(workers=2))

"""Scores against loops over pixels, in one process and on two ranks."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist
from torch import nn

from examples.scenes import Sample
from examples.workbench.data_settings import Data
from examples.workbench.errors import InputError
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.reporting.scores import Scores, evaluate, score_table, subset_means
from tests.errors import refuses

CLASSES = ["road", "sky", "bus", "rare"]
SIZE = (32, 48)


class Brightness(nn.Module):
    """Predicts class 0, 1 or 2 by an image's brightness."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.tensor([-2.0, -0.4, 1.1, 9.0]))

    def forward(self, images):
        assert images.shape == (1, 3, *SIZE)
        return Segmentation(images, -((images[:, :1] - self.centres.view(1, -1, 1, 1)) ** 2))


def samples(count=3, *, ignore_index=255, labels=3):
    """Images of the network's size, whose labels are of that size or twice as large."""
    found = []
    for i in range(count):
        random = np.random.default_rng(i)
        label = random.integers(0, labels, (SIZE[0] * (1 + i % 2), SIZE[1] * (1 + i % 2))).astype(np.uint8)
        label[:5] = ignore_index
        image = np.repeat(random.integers(0, 3, (*SIZE, 1)) * 100, 3, 2).astype(np.uint8)
        found.append(Sample(image, label, f"image{i}"))
    return found


def scores_of(found, *, ignore_index=255, **options):
    data = Data(classes=CLASSES, size=SIZE, ignore_index=ignore_index)
    return evaluate(Brightness(), found, data, progress=None, **options)


@pytest.mark.parametrize("ignore_index", [255, 7])
def test_iou_is_counted_over_all_images(tmp_path, ignore_index):
    found = samples(ignore_index=ignore_index)
    scores = scores_of(found, predictions=tmp_path, ignore_index=ignore_index)
    intersection, union = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    for sample in found:
        predicted = np.asarray(Image.open(tmp_path / f"{sample.name}.png"))
        assert predicted.shape == sample.label.shape
        if predicted.shape == SIZE:
            np.testing.assert_array_equal(predicted, sample.image[..., 0] // 100)
        for k in range(len(CLASSES)):
            for a, b in zip(predicted.ravel(), sample.label.ravel()):
                if b != ignore_index:
                    intersection[k] += a == k and b == k
                    union[k] += a == k or b == k
    # A quotient of counts is rounded once, to float32.
    expected = [i / u for i, u in zip(intersection[:3], union[:3])]
    assert list(scores.iou.values())[:3] == pytest.approx(expected, rel=1e-7)
    assert scores.iou["rare"] is None
    assert scores.miou == pytest.approx(np.mean(expected), rel=1e-7)


def test_a_class_that_is_only_in_the_labels_has_iou_0():
    assert scores_of(samples(labels=4)).iou["rare"] == 0


def test_images_without_a_labelled_pixel_are_refused():
    (sample,) = samples(1)
    with refuses(InputError, CLASSES):
        scores_of([sample._replace(label=np.full(SIZE, 255, np.uint8))])


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Of a single image, the second rank has none.
    found = [scores_of(samples(n), rank=rank, world_size=2, predictions=folder / f"{n}") for n in (3, 1)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one(tmp_path):
    torch.multiprocessing.spawn(work, args=(tmp_path,), nprocs=2)
    expected = json.loads(json.dumps([scores_of(samples(n)) for n in (3, 1)]))
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [expected] * 2
    assert len(list((tmp_path / "3").iterdir())) == 3


def test_means_and_tables_of_subsets():
    scores = Scores({"road": 0.5, "sky": 0.25, "bus": None, "rare": 0.0}, 0.25, ["bus", "rare"])
    subsets = {"large": ["road", "sky"], "absent": ["bus"], "some": ["bus", "road"]}
    assert subset_means(scores.iou, subsets) == {"large": 0.375, "absent": None, "some": 0.5}
    no_pixel = "(no labelled pixel)"
    assert [re.split(" {2,}", line) for line in score_table(scores, subsets=subsets).splitlines()] == [
        ["road", "50.0"],
        ["sky", "25.0"],
        ["bus", "absent", no_pixel],
        ["rare", "0.0", no_pixel],
        ["mean over all classes", "25.0", "(over 3 of 4 classes)"],
        ["mean over large", "37.5", "(over 2 of 2 classes)"],
        ["mean over absent", "absent", "(over 0 of 1 classes)"],
        ["mean over some", "50.0", "(over 1 of 2 classes)"],
    ]
    lines = [line.split() for line in score_table(scores, subsets=subsets, only="some").splitlines()]
    assert [line[:2] for line in lines] == [["bus", "absent"], ["road", "50.0"], ["mean", "over"]]


def test_classes_without_a_labelled_pixel_are_listed():
    """One that is predicted all the same has IoU 0; one that nothing shows has none."""
    scores = scores_of(samples(labels=2))
    assert scores.unlabelled == ["bus", "rare"]
    assert (scores.iou["bus"], scores.iou["rare"]) == (0.0, None)

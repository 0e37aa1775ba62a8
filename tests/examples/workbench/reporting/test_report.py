"""The report of a run, mostly as a figure that is not rendered."""

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Text
from torch import nn

from examples.scenes import Sample
from examples.workbench.data_settings import Data
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.reporting import report
from examples.workbench.reporting.report import draw_report
from examples.workbench.reporting.style import IGNORED, STRIPE, class_colours
from examples.workbench.settings import NetworkSettings, Settings

SETTINGS = Settings(data=Data(classes=["road", "sky_", "$ign"], size=(32, 48)))
KEYS = [
    f"{kind}/{name}{suffix}"
    for name in ("global", "semantic")
    for kind, suffixes in (("loss", ["", "_discriminator"]), ("accuracy", ["_source", "_target"]), ("weight", [""]))
    for suffix in suffixes
]


class Network(nn.Module):
    def __init__(self, seed, classes=3):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.classifier = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, classes, 1)

    def forward(self, images):
        features = self.encoder(images)
        return Segmentation(features, self.classifier(features))


class Constant(Network):
    """Predicts one class everywhere."""

    def __init__(self, predicted):
        super().__init__(0)
        nn.init.zeros_(self.classifier.weight)
        self.classifier.bias.data = nn.functional.one_hot(torch.tensor(predicted), 3).float()


def images(count=5, *, shape=(32, 48), classes=3):
    found = []
    for i in range(count):
        random = np.random.default_rng(i)
        label = random.integers(0, classes, shape).astype(np.uint8)
        label[: shape[0] // 4] = 255
        found.append(Sample(random.integers(0, 256, (*shape, 3)).astype(np.uint8), label, f"{i}" + "x" * 30 + "y" * 30))
    return found


def history(keys=KEYS, rows=60):
    random = np.random.default_rng(0)
    return [{"step": 10 * i, "loss/segmentation": 1.0} | {key: random.random() for key in keys} for i in range(rows)]


def draw(path, settings=SETTINGS, **changes):
    arguments = {
        "source": images(2),
        "validation": images(),
        "title": "A run",
        "before": ("step 8", Network(0)),
        "after": ("step 9", Network(1)),
        "history": history(),
    }
    draw_report(path, settings, **(arguments | changes))


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """The figure of a report, not rendered."""

    def drawn(*arguments, **changes):
        figures = []
        monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
        draw(tmp_path / "a.png", *arguments, **changes)
        return figures[0]

    return drawn


def curves(figure):
    return [line.get_xydata() for line in figure.findobj(Line2D)]


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_and_others_do_not(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    draw(tmp_path / "c.png", after=("step 9", Network(2)))
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again != other
    assert first.startswith(b"\x89PNG")
    # The version of Matplotlib, which would change the bytes.
    assert b"Software" not in first


def test_every_key_of_the_history_is_a_curve(figure_of):
    keys = ["loss/segmentation", *KEYS]
    values = np.random.default_rng(0).random((40, len(keys)))
    rows = [{"step": i} | dict(zip(keys, row, strict=True)) for i, row in enumerate(values)]
    drawn = curves(figure_of(history=rows))
    for key, column in zip(keys, values.T, strict=True):
        assert sum(np.array_equal(curve[:, 1], column) for curve in drawn) == 1, key


def test_curves_are_running_means_over_the_raw_ones(figure_of):
    # Of 60 rows, 60 // 10 = 6 make a point: three before it, itself and two after it; fewer at the ends.
    values = [float(i % 2) for i in range(60)]
    drawn = curves(figure_of(history=[{"step": i, "loss/segmentation": value} for i, value in enumerate(values)]))
    means = [np.mean(values[max(0, i - 3) : i + 3]) for i in range(60)]
    assert any(np.array_equal(curve[:, 1], values) for curve in drawn)
    assert any(len(curve) == 60 and np.allclose(curve[:, 1], means) for curve in drawn)


def test_values_that_are_missing_or_not_finite_leave_gaps(figure_of):
    rows = history(rows=40)
    for row in rows[::2]:
        row |= {"loss/global": float("nan"), "accuracy/global_source": None, "loss/semantic": float("inf")}
        del row["loss/semantic_discriminator"]
    drawn = curves(figure_of(history=rows))
    for key in ("loss/global", "accuracy/global_source", "loss/semantic", "loss/semantic_discriminator"):
        expected = [(row["step"], row[key]) for row in rows[1::2]]
        assert any(np.array_equal(curve, expected) for curve in drawn), key


def test_images_stand_beside_their_labels_and_predictions(figure_of):
    validation = images()
    pictures = [picture.get_array() for picture in figure_of(validation=validation).findobj(AxesImage)]
    assert len(pictures) == 4 * 4
    colours = class_colours(["road", "sky_", "$ign"])
    for row, index in enumerate([0, 1, 3, 4]):
        image, label, *predictions = pictures[4 * row : 4 * row + 4]
        sample = validation[index]
        np.testing.assert_array_equal(image, sample.image)
        ignored = sample.label == 255
        np.testing.assert_array_equal(label[~ignored], colours[sample.label[~ignored]])
        assert {tuple(colour) for colour in label[ignored]} == {tuple(IGNORED), tuple(STRIPE)}
        for seed, predicted in enumerate(predictions):
            expected = report.predict(Network(seed), sample.image, (32, 48))
            np.testing.assert_array_equal(predicted, colours[expected])


def test_the_report_names_what_it_shows(figure_of):
    found = texts(figure_of())
    accuracies = [
        np.mean((report.predict(Network(1), sample.image, (32, 48)) == sample.label)[sample.label != 255])
        for sample in images(1)
    ]
    expected = ["0 road", "1 sky_", "2 $ign", "no class", "step 8", "Prototypes, step 9", "A run", "chance"]
    expected += [
        "single batches",
        "running mean of 6 logged batches",
        "IoU of each class in percent, 5 target images",
    ]
    assert {*expected, "Global discriminator", "Semantic discriminator"} <= set(found)
    # Of a long name the middle is left out.
    assert "0" + "x" * 7 + "…" + "y" * 17 in found
    assert f"{100 * accuracies[0]:.0f} % of pixels correct" in found


def test_iou_is_that_of_the_predictions(figure_of):
    """Of each class and segmenter, by loops, with their mean in the titles; class 2 occurs nowhere."""
    validation = images(3, classes=2)
    found = texts(figure_of(validation=validation, before=("step 8", Constant(0)), after=("step 9", Constant(1))))
    labels = np.stack([sample.label for sample in validation])
    shares = [100 * (labels == k).sum() / (labels != 255).sum() for k in range(2)]
    assert f"{shares[0]:.1f} → 0.0" in found
    assert f"0.0 → {shares[1]:.1f}" in found
    assert "– → –" in found
    assert f"step 8\nmIoU {shares[0] / 2:.1f} on 3 images" in found
    assert f"step 9\nmIoU {shares[1] / 2:.1f} on 3 images" in found


def test_iou_and_its_title_are_of_at_most_40_images(figure_of):
    found = texts(figure_of(validation=images(41)))
    assert "IoU of each class in percent, 40 of 41 target images" in found


@pytest.mark.parametrize(
    ("method", "auxiliary", "discriminators"),
    [("joint", False, []), ("semantic", False, ["Semantic"]), ("ass", True, ["Global", "Auxiliary", "Semantic"])],
)
def test_the_discriminators_are_those_of_the_method(figure_of, method, auxiliary, discriminators):
    network = NetworkSettings(name="deeplab-v2", auxiliary=True) if auxiliary else NetworkSettings()
    settings = dataclasses.replace(SETTINGS, method=method, network=network)
    found = [text for text in texts(figure_of(settings, history=history(rows=1))) if text.endswith(" discriminator")]
    assert found == [f"{name} discriminator" for name in discriminators]


@pytest.mark.parametrize("shape", [(96, 32), (32, 160)])
def test_images_of_any_shape_and_many_classes_are_rendered(tmp_path, shape):
    classes = [f"class of a name that is very long {k}" for k in range(19)]
    settings = dataclasses.replace(SETTINGS, data=Data(classes=classes, size=shape))
    validation = images(2, shape=shape, classes=19)
    validation[0].label[:] = 255
    networks = {name: (name, Network(0, 19)) for name in ("before", "after")}
    draw(tmp_path / "a.png", settings, source=validation, validation=validation, history=[], **networks)
    assert (tmp_path / "a.png").stat().st_size > 10_000

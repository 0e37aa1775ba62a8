"""examples/ass.py: the paper in one file runs, is deterministic, and its methods differ in what they say they do."""

import ast
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from examples import ass
from examples.scenes import CLASS_COLOURS, CLASSES, Scenes

SOURCE = Path(ass.__file__).read_text()
FEW = ass.Settings(steps=5, batch_size=1, device="cpu")


def parameters(method, **settings):
    segmenter = ass.train(method, dataclasses.replace(FEW, **settings))
    return torch.cat([parameter.detach().flatten() for parameter in segmenter.parameters()])


def test_main_prints_three_scores_and_draws(tmp_path, capsys):
    scores = ass.main(["--steps", "2", "--batch-size", "1", "--out", str(tmp_path)])
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["mIoU source-only", "mIoU joint", "mIoU ass", "picture"]
    assert [float(line.split()[-1]) for line in out[:3]] == [round(100 * score, 1) for score in scores.values()]
    assert Path(out[3].split()[-1]) == tmp_path / "ass.png"
    assert (tmp_path / "ass.png").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_weights():
    assert torch.equal(parameters("ass"), parameters("ass"))
    assert not torch.equal(parameters("ass"), parameters("ass", seed=1))


def test_methods_differ_in_what_they_learn_from():
    joint = parameters("joint")
    assert not torch.equal(parameters("source-only"), joint)
    # Without weights the discriminators learn beside the segmenter and do not reach it.
    assert torch.equal(parameters("ass", lambda_global=0.0, lambda_semantic=0.0), joint)
    assert not torch.equal(parameters("ass", lambda_global=0.0), joint)
    assert not torch.equal(parameters("ass", lambda_semantic=0.0), joint)


def test_labels_of_unlabelled_images_are_never_used(monkeypatch):
    before, batches = parameters("ass"), ass.batches

    def without_labels(settings):
        for batch in batches(settings):
            batch["unlabelled"][1].fill_(255)
            yield batch

    monkeypatch.setattr(ass, "batches", without_labels)
    assert torch.equal(parameters("ass"), before)


def test_labelled_images_are_the_same_for_every_seed_and_nested(monkeypatch):
    drawn = []
    monkeypatch.setattr(ass, "Domain", lambda scenes, indices, seed: drawn.append(list(indices)) or indices)
    for settings in (FEW, dataclasses.replace(FEW, seed=1), dataclasses.replace(FEW, labelled=9)):
        ass.batches(settings)
    few, again, more = drawn[1::3]
    assert few == again
    assert len(set(few)) == 4
    assert more[:4] == few


def test_augment_moves_image_and_labels_together():
    generator = np.random.default_rng(0)
    label = torch.zeros(64, 96, dtype=torch.int64)
    label[20:44, 30:70] = 1
    image = label.float().expand(3, -1, -1)
    padded = 0
    for _ in range(50):
        changed, labels = ass.augment(image, label, generator)
        assert changed.shape == image.shape
        assert labels.shape == label.shape
        assert set(labels.unique().tolist()) <= {0, 1, 255}
        assert (changed[:, labels == 255] == 0).all()
        padded += bool((labels == 255).any())
        # The brighter pixels are those of class 1, but for the border that interpolation blurs.
        inside = labels != 255
        bright = changed.mean(0) > (changed.max() + changed[:, inside].min()) / 2
        assert (bright == (labels == 1))[inside].float().mean() > 0.97
    assert 0 < padded < 50


def test_mean_iou():
    generator = torch.Generator().manual_seed(0)
    predictions, labels = (torch.randint(0, len(CLASSES), (3, 16, 24), generator=generator) for _ in range(2))
    values = []
    for k in range(len(CLASSES)):
        both, either = ((predictions == k) & (labels == k)).sum(), ((predictions == k) | (labels == k)).sum()
        values.append(float(both / either))
    assert ass.mean_iou(predictions, labels) == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert ass.mean_iou(labels, labels) == 1


def test_the_picture_says_what_it_shows(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    scenes = Scenes("target", "test", 5, seed=3)
    labels = torch.stack([torch.from_numpy(scenes[i].label).long() for i in range(5)])
    sky = torch.zeros_like(labels)
    settings = dataclasses.replace(FEW, seed=3, labelled=7, out=tmp_path)
    ass.draw(settings, scenes, labels, {"joint": sky, "ass": labels})
    found = [text.get_text() for text in drawn[0].findobj(Text)]
    titles = ["target image", "ground truth", f"joint\nmIoU {100 * ass.mean_iou(sky, labels):.1f}", "ASS\nmIoU 100.0"]
    assert [axes.get_title() for axes in drawn[0].axes[:4]] == titles
    assert any(all(part in text for part in ("labelled target images: 7", "one seed: 3", "5")) for text in found)
    legend = drawn[0].legends[0]
    assert [text.get_text() for text in legend.texts] == list(CLASSES)
    assert [patch.get_facecolor()[:3] for patch in legend.get_patches()] == [to_rgb(c) for c in CLASS_COLOURS]
    # A class has its legend's colour in every map.
    for axes in (drawn[0].axes[i] for i in (1, 2, 3, 5)):
        (image,) = axes.images
        assert image.to_rgba(image.get_array())[..., :3].reshape(-1, 3).tolist()[0] == pytest.approx(
            to_rgb(CLASS_COLOURS[int(image.get_array()[0, 0])])
        )


def test_segmenter_shapes():
    features, logits = ass.Segmenter(len(CLASSES))(torch.rand(2, 3, 64, 96))
    assert features.shape == (2, 64, 8, 12)
    assert logits.shape == (2, len(CLASSES), 64, 96)


def test_predictions_have_the_size_of_the_images():
    scenes = Scenes("target", "test", 3, seed=0)
    assert ass.predict(ass.Segmenter(len(CLASSES)).eval(), scenes).shape == (3, 64, 96)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--methods", "oracle"], ["--methods", "oracle"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--labelled", "201"], ["labelled", "200", "201"]),
        (["--batch-size", "0"], ["batch_size", "0"]),
        (["--seed", "x"], ["--seed", "x"]),
    ],
)
def test_bad_options_are_one_line(options, fragments, capsys):
    with pytest.raises(SystemExit):
        ass.main(options)
    last = capsys.readouterr().err.splitlines()[-1]
    assert all(fragment in last for fragment in fragments)


def test_one_file_to_read():
    """It imports the library, the scenes and published packages, and nothing of the workbench."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    roots = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert roots == {"semshift", "examples", "numpy", "torch", "matplotlib", "torchmetrics", "tqdm"}
    assert {name for name in imported if name.startswith("examples")} == {"examples.scenes"}
    assert len(SOURCE.splitlines()) < 400

"""Self-training: what the teacher's labels become, and runs of `ass-plus` with its parts switched on and off."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import semshift
from examples.workbench.training import checkpoints, run_folder as runs
from examples.workbench.training import train as train_module
from examples.workbench.training.learners import source_schedule
from examples.workbench.data.images import open_images
from examples.workbench.training.self_training import Taught, rare_classes, soft_weights, taught, taught_cross_entropy
from examples.workbench.settings import Data, NetworkSettings, OptimiserSettings, SceneSettings, SelfTraining, Settings
from examples.workbench.training.train import train

pytestmark = pytest.mark.filterwarnings("default")

PLUS = SelfTraining(start=0.0, ramp=0.0, threshold=0.2)
TINY = Settings(
    method="ass-plus",
    steps=6,
    labelled=2,
    log_every=1,
    save_every=3,
    data=Data(size=(32, 32), scenes=SceneSettings(source=6, target=6, validation=2, test=2)),
    network=NetworkSettings(width=8),
    optimiser=OptimiserSettings(images=2, unlabelled=3),
    self_training=PLUS,
)
CLASSES = len(TINY.data.classes)


def batch_of(generator, unlabelled=3):
    """Source images are all 10, labelled 20, unlabelled 30, so that it shows where a pixel comes from."""

    def label(images):
        return torch.randint(0, CLASSES, (images, 32, 32), generator=generator)

    inside = torch.ones(unlabelled, 32, 32, dtype=torch.bool)
    inside[:, :, 28:] = False
    return {
        "source": {"image": torch.full((2, 3, 32, 32), 10.0), "label": label(2)},
        "labelled": {"image": torch.full((2, 3, 32, 32), 20.0), "label": label(2)},
        "unlabelled": {"image": torch.full((unlabelled, 3, 32, 32), 30.0), "inside": inside},
    }


def taught_with(step=0, **plus):
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(generator)
    logits = 3 * torch.randn(3, CLASSES, 8, 8, generator=generator)
    settings = dataclasses.replace(TINY, self_training=dataclasses.replace(PLUS, threshold=0.8, **plus))
    return taught(batch, logits, settings, step), batch, logits


def test_without_mixing_the_labels_are_the_teachers():
    images, batch, logits = taught_with(mixed_from="nothing")
    probabilities = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False).softmax(1)
    assert torch.equal(images.image, batch["unlabelled"]["image"])
    assert torch.equal(images.label, probabilities.argmax(1))
    assert images.weight.shape == images.label.shape
    # The last columns are not in the image.
    sure = (probabilities.amax(1) > 0.8)[:, :, :28].float().mean((1, 2))
    assert 0 < sure.min() < sure.max() < 1
    assert torch.allclose(images.weight[:, :, :28], sure[:, None, None].expand(3, 32, 28))
    assert not images.weight[:, :, 28:].any()


def test_weighted_by_pixel_only_what_is_sure_counts():
    images, _, logits = taught_with(mixed_from="nothing", weighted_by="pixel")
    sure = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False).softmax(1).amax(1) > 0.8
    assert torch.equal(images.weight[:, :, :28], sure[:, :, :28].float())
    assert not images.weight[:, :, 28:].any()


@pytest.mark.parametrize(
    ("mixed_from", "donors"),
    [
        ("source", [("source", 0), ("source", 1), ("source", 0)]),
        ("labelled", [("labelled", 0), ("labelled", 1), ("labelled", 0)]),
        ("both", [("source", 0), ("labelled", 0), ("source", 1)]),
    ],
)
def test_pasted_classes_come_with_their_labels(mixed_from, donors):
    images, batch, _ = taught_with(mixed_from=mixed_from)
    bare, _, _ = taught_with(mixed_from="nothing")
    for i, (domain, place) in enumerate(donors):
        pasted = images.image[i, 0] != 30
        colour = {"source": 10.0, "labelled": 20.0}[domain]
        assert torch.equal(images.image[i], torch.where(pasted, colour, 30.0).expand(3, 32, 32))
        donor = batch[domain]["label"][place]
        assert torch.equal(images.label[i], torch.where(pasted, donor, bare.label[i]))
        assert torch.equal(images.weight[i], torch.where(pasted, 1.0, bare.weight[i]))
        # Whole classes, half of those that the donor has.
        classes = set(donor[pasted].tolist())
        assert len(classes) == CLASSES // 2
        assert not classes & set(donor[~pasted].tolist())


def test_the_pasted_classes_are_a_function_of_the_step():
    first, again, other = (taught_with(step=step)[0] for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.image, other.image)


def test_cross_entropy_counts_every_pixel():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(2, 4, 4, dtype=torch.int64)
    weight = torch.zeros(2, 4, 4)
    weight[0, 0, 0], weight[1, 2, 3] = 1.0, 0.25
    expected = -(logits[0, :, 0, 0].log_softmax(0)[0] + 0.25 * logits[1, :, 2, 3].log_softmax(0)[0]) / 32
    assert torch.allclose(taught_cross_entropy(logits, Taught(logits, label, weight)), expected)


def test_soft_weights_are_of_sure_cells_in_the_image():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 0, 0] = 10.0
    inside = torch.ones(1, 8, 8, dtype=torch.bool)
    inside[0, :, 7] = False
    weights = soft_weights(logits, inside, (2, 2), threshold=0.9)
    expected = torch.zeros(1, 2, 2, 2)
    expected[0, :, 0, 0] = torch.tensor([10.0, 0.0]).softmax(0)
    assert torch.allclose(weights, expected)


class _Two:
    """One image without the rare class, one with it, and pixels without a class in both."""

    names = ("common", "rare")

    def __len__(self):
        return 2

    def __getitem__(self, index):
        label = np.zeros((8, 8), np.uint8)
        label[0] = 255
        if index:
            label[1, :4] = 1
        return Sample(np.zeros((8, 8, 3), np.uint8), label, self.names[index])


def test_rare_classes_are_drawn_more_often():
    settings = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, classes=["common", "rare"]))
    common, rare = rare_classes(_Two(), settings, progress="test")
    assert 0 <= common < rare
    # 64 pixels: 8 without a class, 4 of the rare one in the second image.
    expected = semshift.rare_class_weights(np.array([[56, 0], [52, 4]]), temperature=0.1)
    assert [common, rare] == pytest.approx(expected.tolist())


def final_weights(out):
    return torch.load(checkpoints.newest_checkpoint(out), weights_only=True)["stateful"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def run(out, **changes):
    part = {name: value for name, value in changes.items() if name in SelfTraining.__dataclass_fields__}
    rest = {name: value for name, value in changes.items() if name not in part}
    return train(dataclasses.replace(TINY, self_training=dataclasses.replace(PLUS, **part), **rest), out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("plus") / "run"
    run(out)
    return out


def test_the_teacher_is_the_running_mean(whole):
    state = final_weights(whole)
    assert {"segmenter", "teacher", "source bank", "labelled bank"} <= state.keys()
    assert state["teacher"]["n_averaged"] == TINY.steps
    teacher = checkpoints.load_weights(checkpoints.newest_checkpoint(whole), teacher=True)
    student = checkpoints.load_weights(checkpoints.newest_checkpoint(whole))
    assert teacher.keys() == student.keys()
    assert not same(teacher, student)
    row = run_folder.read_history(whole)[-1]
    assert row["loss/self-training"] > 0
    assert row["weight/self-training"] == 1


@pytest.mark.parametrize(
    "off",
    [
        {"weight": 0.5},
        {"momentum": 0.5},
        {"threshold": 0.3},
        {"mixed_from": "nothing"},
        {"mixed_from": "source"},
        {"rare_classes": False},
        {"source_fade": 0.5},
        {"weighted_by": "pixel"},
        {"bank": False},
        {"soft_pooling": False},
    ],
    ids=lambda off: next(iter(off)),
)
@pytest.mark.slow
def test_each_part_matters(off, whole, tmp_path):
    run(tmp_path / "run", **off)
    assert not same(final_weights(tmp_path / "run")["segmenter"], final_weights(whole)["segmenter"])


@pytest.mark.slow
def test_either_of_the_two_is_evaluated(whole, tmp_path, monkeypatch):
    evaluated = []
    evaluate = train_module.evaluate

    def remembered(segmenter, *arguments, **options):
        evaluated.append({name: tensor.clone() for name, tensor in segmenter.state_dict().items()})
        return evaluate(segmenter, *arguments, **options)

    monkeypatch.setattr(train_module, "evaluate", remembered)
    for final in ("teacher", "segmenter"):
        run(tmp_path / final, final=final)
        assert same(evaluated[-1], checkpoints.load_weights(checkpoints.newest_checkpoint(whole), teacher=final == "teacher"))


@pytest.mark.slow
def test_resumed_is_uninterrupted(whole, tmp_path, monkeypatch):
    save = checkpoints.save_checkpoint

    def stop_after(out, progress, *arguments, **options):
        save(out, progress, *arguments, **options)
        if progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.undo()
    settings = dataclasses.replace(TINY, self_training=PLUS)
    train(settings, tmp_path / "run", resume=True)
    resumed, uninterrupted = final_weights(tmp_path / "run"), final_weights(whole)
    for name in ("segmenter", "teacher", "source bank", "labelled bank"):
        assert same(resumed[name], uninterrupted[name])


@pytest.mark.slow
def test_labels_of_unlabelled_images_do_not_matter(whole, tmp_path, monkeypatch):
    class Spoilt:
        def __init__(self, samples, kept):
            self.samples, self.kept, self.names = samples, kept, samples.names

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            sample = self.samples[index]
            return sample if self.names[index] in self.kept else sample._replace(label=np.zeros_like(sample.label))

    def spoilt(*arguments):
        images = open_images(*arguments)
        kept = (whole / "labelled.txt").read_text().split()
        return images._replace(target=Spoilt(images.target, kept))

    monkeypatch.setattr(train_module, "open_images", spoilt)
    run(tmp_path / "run")
    assert same(final_weights(tmp_path / "run")["segmenter"], final_weights(whole)["segmenter"])


@pytest.mark.parametrize(
    ("fade", "method", "expected"),
    [
        (0.5, "ass-plus", [1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3, 0.0]),
        (1.0, "ass-plus", [1 - step / 6 for step in range(7)]),
        (0.0, "ass-plus", [1.0] * 7),
        (0.5, "ass", [1.0] * 7),
    ],
)
def test_the_source_fades_at_the_end(fade, method, expected):
    plus = dataclasses.replace(PLUS, source_fade=fade)
    weight = source_schedule(dataclasses.replace(TINY, method=method, self_training=plus))
    assert [weight(step) for step in range(7)] == pytest.approx(expected)


@pytest.mark.slow
def test_soft_pooling_works_without_mixing(tmp_path):
    for soft in (True, False):
        run(tmp_path / str(soft), weight=0.0, soft_pooling=soft)
    assert not same(*(final_weights(tmp_path / str(soft))["segmenter"] for soft in (True, False)))
    assert "loss/self-training" not in run_folder.read_history(tmp_path / "True")[-1]


@pytest.mark.slow
def test_each_part_can_stand_alone(tmp_path):
    """Without weights there is no discriminator and no self-training: what is left is `joint` and its running mean."""
    none = {"rare_classes": False, "weight": 0.0}
    without = {
        name: dataclasses.replace(getattr(TINY, name), weight=0.0)
        for name in ("global_alignment", "semantic_alignment")
    }
    run(tmp_path / "plus", **none, **without)
    train(dataclasses.replace(TINY, method="joint"), tmp_path / "joint")
    plus, joint = final_weights(tmp_path / "plus"), final_weights(tmp_path / "joint")
    assert plus.keys() == joint.keys() | {"teacher"}
    assert same(plus["segmenter"], joint["segmenter"])


def test_the_teacher_answers_as_it_would_be_evaluated(tmp_path, monkeypatch):
    """Without dropout, and by running statistics."""
    modes = []

    class Watched(build_module.AveragedModel):
        def forward(self, *arguments):
            modes.append(any(module.training for module in self.modules()))
            return super().forward(*arguments)

    monkeypatch.setattr(build_module, "AveragedModel", Watched)
    run(tmp_path / "run", steps=2)
    assert modes == [False, False]

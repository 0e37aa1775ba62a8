"""Self-training: labels of the teacher, pasted classes, and runs of `ass-plus` with parts switched off."""

from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

import semshift
from examples.workbench.data.samples import Subset
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.training import checkpoints, learners, run_folder, self_training
from examples.workbench.training import train as train_module
from examples.workbench.training.self_training import mix_images, self_training_losses
from examples.workbench.training.train import train
from tests.examples.workbench.tiny import checkpoint, equal, tiny

pytestmark = pytest.mark.filterwarnings("default")

K = 8
PLUS = {"start": 0.0, "ramp": 0.0, "threshold": 0.2}


def plus(**changes):
    """Settings of a tiny run of ass-plus; changes are of its self-training."""
    return tiny(method="ass-plus", self_training=PLUS | changes)


def mixed(step=0, **changes):
    """Source images are all 10, labelled 20, unlabelled 30, which shows where a pixel comes from."""
    generator = torch.Generator().manual_seed(0)

    def label(images):
        return torch.randint(0, K, (images, 32, 32), generator=generator)

    inside = torch.ones(3, 32, 32, dtype=torch.bool)
    inside[:, :, 28:] = False
    batch = {
        "source": {"image": torch.full((2, 3, 32, 32), 10.0), "label": label(2)},
        "labelled": {"image": torch.full((2, 3, 32, 32), 20.0), "label": label(2)},
        "unlabelled": {"image": torch.full((3, 3, 32, 32), 30.0), "inside": inside},
    }
    logits = 3 * torch.randn(3, K, 8, 8, generator=generator)
    return mix_images(batch, logits, plus(threshold=0.8, **changes), step), batch, logits


@pytest.mark.parametrize("weighted_by", ["image", "pixel"])
def test_without_mixing_the_labels_are_the_teachers(weighted_by):
    images, batch, logits = mixed(mixed_from="nothing", weighted_by=weighted_by)
    probabilities = F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False).softmax(1)
    assert torch.equal(images.image, batch["unlabelled"]["image"])
    assert torch.equal(images.label, probabilities.argmax(1))
    # The last columns lie outside the image.
    assert not images.weight[:, :, 28:].any()
    sure = (probabilities.amax(1) > 0.8)[:, :, :28].float()
    share = sure.mean((1, 2), keepdim=True)
    assert 0 < share.min() < share.max() < 1
    torch.testing.assert_close(images.weight[:, :, :28], sure if weighted_by == "pixel" else share.expand(3, 32, 28))
    assert torch.equal(images.sure, F.pad(sure.bool(), (0, 4)))


@pytest.mark.parametrize(
    ("mixed_from", "donors"),
    [
        ("source", [("source", 0), ("source", 1), ("source", 0)]),
        ("labelled", [("labelled", 0), ("labelled", 1), ("labelled", 0)]),
        ("both", [("source", 0), ("labelled", 0), ("source", 1)]),
    ],
)
def test_pasted_classes_come_with_their_labels(mixed_from, donors):
    images, batch, _ = mixed(mixed_from=mixed_from)
    bare, _, _ = mixed(mixed_from="nothing")
    for i, (domain, place) in enumerate(donors):
        pasted = images.image[i, 0] != 30
        colour = {"source": 10.0, "labelled": 20.0}[domain]
        assert torch.equal(images.image[i], torch.where(pasted, colour, 30.0).expand(3, 32, 32))
        donor = batch[domain]["label"][place]
        assert torch.equal(images.label[i], torch.where(pasted, donor, bare.label[i]))
        assert torch.equal(images.weight[i], torch.where(pasted, 1.0, bare.weight[i]))
        assert torch.equal(images.sure[i], pasted | bare.sure[i])
        # Whole classes, half of the donor's.
        classes = set(donor[pasted].tolist())
        assert len(classes) == K // 2
        assert not classes & set(donor[~pasted].tolist())


def test_the_pasted_classes_are_a_function_of_the_step():
    first, again, other = (mixed(step=step)[0] for step in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.image, other.image)


def test_the_loss_is_the_weighted_mean_over_all_pixels():
    settings = plus(threshold=0.8, mixed_from="nothing", weighted_by="pixel")
    _, batch, logits = mixed(mixed_from="nothing", weighted_by="pixel")
    answers = torch.randn(3, K, 32, 32, generator=torch.Generator().manual_seed(1))
    teacher, segmenter = (lambda image, of=of: Segmentation(of, of) for of in (logits, answers))
    images = mix_images(batch, logits, settings, 0)
    expected = (F.cross_entropy(answers, images.label, reduction="none") * images.weight).sum() / images.label.numel()
    outputs = {domain: segmenter(None) for domain in ("source", "labelled")}
    parts = SimpleNamespace(teacher=teacher, segmenter=segmenter, prototypes={})

    def losses(step, settings):
        return self_training_losses(step, outputs, batch, parts, settings, Fabric(accelerator="cpu", devices=1))

    assert losses(0, settings).keys() == {"self-training"}
    torch.testing.assert_close(losses(0, settings)["self-training"], expected)
    assert losses(0, plus(weight=0.0)) == losses(2, plus(start=0.5)) == {}


def test_the_strong_view_changes_what_the_segmenter_sees_alone(monkeypatch):
    """Image by image and rank by rank, by draws that are a function of the step, and others than those of classes."""
    seen, keys, class_mix = [], [], semshift.class_mix

    def watched(*arguments, **options):
        keys.append(options["keys"])
        return class_mix(*arguments, **options)

    monkeypatch.setattr(semshift, "class_mix", watched)

    def shift(images, strength, draws):
        seen.append(draws)
        return images + strength * draws[:, :1, None, None]

    monkeypatch.setattr(self_training, "strengthen", shift)
    plain, strong, _, _ = (
        mixed(step=step, strong=value)[0] for step, value in ((3, 0.0), (3, 0.5), (3, 0.5), (4, 0.5))
    )
    assert all(torch.equal(plain[i], strong[i]) for i in (1, 2, 3))
    first, again, other = seen
    assert torch.equal(strong.image, plain.image + 0.5 * first[:, :1, None, None])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (3, 6)
    assert first.unique().numel() == 18
    assert not torch.isin(first, torch.cat(keys)).any()
    _, batch, logits = mixed()
    mix_images(batch, logits, plus(strong=0.5), 3, rank=1)
    assert not torch.isin(seen[-1], first).any()
    assert not torch.isin(keys[-1], keys[0]).any()


def test_the_contrast_draws_on_both_banks():
    """Equal to the loss over the means of everything that the banks have seen, the step's own batch included."""
    generator = torch.Generator().manual_seed(2)
    settings = plus(contrast_weight=1.0, contrast_temperature=0.5, threshold=0.8, weighted_by="pixel")
    _, batch, logits = mixed(weighted_by="pixel")
    features = {domain: torch.randn(n, 5, 8, 8, generator=generator) for domain, n in (("source", 2), ("labelled", 2))}
    seen = torch.randn(3, 5, 8, 8, generator=generator)
    banks = {domain: semshift.PrototypeBank(5, K) for domain in features}
    parts = SimpleNamespace(
        teacher=lambda image: Segmentation(logits, logits),
        segmenter=lambda image: Segmentation(seen, logits),
        prototypes=banks,
    )
    outputs = {domain: Segmentation(of, logits) for domain, of in features.items()}
    found = self_training_losses(0, outputs, batch, parts, settings, Fabric(accelerator="cpu", devices=1))
    means = torch.stack([semshift.class_sums(features[d], batch[d]["label"], K).means for d in features])
    images = mix_images(batch, logits, settings, 0)
    labels = [batch["source"]["label"], batch["labelled"]["label"], images.label.where(images.sure, 255)]
    expected = [
        semshift.prototype_contrast_loss(of, label, means, temperature=0.5)
        for of, label in zip((*features.values(), seen), labels)
    ]
    torch.testing.assert_close(found["contrast"], torch.stack(expected).mean())
    assert 0 < (labels[2] == 255).float().mean() < 1
    for domain, bank in banks.items():
        torch.testing.assert_close(bank.means, means[0 if domain == "source" else 1])
    # The next step's features, with the same labels: the mean of both, the first at a weight of 0.99.
    outputs = {domain: Segmentation(-2 * of, logits) for domain, of in features.items()}
    self_training_losses(0, outputs, batch, parts, settings, Fabric(accelerator="cpu", devices=1))
    for domain, bank in banks.items():
        torch.testing.assert_close(bank.means, (0.99 - 2) / 1.99 * means[0 if domain == "source" else 1])


def run(out, **changes):
    return train(plus(**changes), out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("plus") / "run"
    run(out)
    return out


def test_the_teacher_is_the_running_mean(whole):
    state = checkpoint(whole)["stateful"]
    assert state["teacher"]["n_averaged"] == 6
    newest = checkpoints.newest_checkpoint(whole)
    teacher, student = checkpoints.load_weights(newest, teacher=True), checkpoints.load_weights(newest)
    assert teacher.keys() == student.keys()
    assert not equal(teacher, student)
    row = run_folder.read_history(whole)[-1]
    assert row["loss/self-training"] > 0
    assert row["weight/self-training"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0.5},
        {"momentum": 0.5},
        {"threshold": 0.3},
        {"mixed_from": "nothing"},
        {"rare_classes": False},
        {"source_fade": 0.5},
        {"weighted_by": "pixel"},
        {"strong": 0.5},
        {"contrast_weight": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_part_matters(change, whole, tmp_path):
    run(tmp_path / "run", **change)
    assert not equal(checkpoint(tmp_path / "run")["stateful"]["segmenter"], checkpoint(whole)["stateful"]["segmenter"])


@pytest.mark.slow
def test_without_its_parts_it_is_joint_training_and_its_running_mean(tmp_path):
    none = {name: {"weight": 0.0} for name in ("global_alignment", "semantic_alignment")}
    train(tiny(method="ass-plus", self_training={"weight": 0.0, "rare_classes": False}, **none), tmp_path / "plus")
    train(tiny(method="joint"), tmp_path / "joint")
    with_teacher, joint = (checkpoint(tmp_path / name)["stateful"] for name in ("plus", "joint"))
    assert with_teacher.keys() == joint.keys() | {"teacher"}
    assert equal(with_teacher["segmenter"], joint["segmenter"])


@pytest.mark.slow
def test_the_chosen_network_is_evaluated(whole, tmp_path, monkeypatch):
    evaluated, evaluate = [], train_module.evaluate

    def remember(segmenter, *arguments, **options):
        evaluated.append({name: tensor.clone() for name, tensor in segmenter.state_dict().items()})
        return evaluate(segmenter, *arguments, **options)

    monkeypatch.setattr(train_module, "evaluate", remember)
    for final in ("teacher", "segmenter"):
        run(tmp_path / final, final=final)
        newest = checkpoints.newest_checkpoint(whole)
        assert equal(evaluated[-1], dict(checkpoints.load_weights(newest, teacher=final == "teacher")))


@pytest.mark.slow
def test_labels_of_unlabelled_images_do_not_matter(whole, tmp_path, monkeypatch):
    open_images = train_module.open_images

    class Spoilt:
        def __init__(self, samples, kept):
            self.samples, self.kept, self.names = samples, kept, samples.names

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            sample = self.samples[index]
            return sample if self.names[index] in self.kept else sample._replace(label=0 * sample.label)

    def spoilt(*arguments):
        images = open_images(*arguments)
        target = Spoilt(images.target, (whole / "labelled.txt").read_text().split())
        return images._replace(target=target, labelled=Subset(target, images.labelled.indices))

    monkeypatch.setattr(train_module, "open_images", spoilt)
    run(tmp_path / "run")
    assert equal(checkpoint(tmp_path / "run")["stateful"]["segmenter"], checkpoint(whole)["stateful"]["segmenter"])


def test_the_teacher_is_in_evaluation_mode(tmp_path, monkeypatch):
    """Without dropout, and by running statistics."""
    modes = []

    class Watched(learners.AveragedModel):
        def forward(self, *arguments):
            modes.append(any(module.training for module in self.modules()))
            return super().forward(*arguments)

    monkeypatch.setattr(learners, "AveragedModel", Watched)
    train(tiny(method="ass-plus", self_training=PLUS, steps=2), tmp_path / "run")
    assert modes == [False, False]

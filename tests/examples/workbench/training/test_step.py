"""The step: what each loss compares, which networks it moves, and figures of its row."""

import dataclasses
import math

import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

import semshift
from examples.workbench.errors import InputError
from examples.workbench.networks.segmentation import Segmentation, Segmenter
from examples.workbench.training import step as step_module
from examples.workbench.training.learners import build_learners
from examples.workbench.training.step import _output_maps, _penalty, learn
from tests.errors import refuses
from tests.examples.workbench.tiny import TINY, tiny

K = 8


class _Linear(Segmenter):
    """Features are a convolution of the images, logits one of the features."""

    feature_channels = 4

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.head = torch.nn.Conv2d(4, K, 1)

    def forward(self, images):
        features = self.encoder(images)
        return Segmentation(features, self.head(features))

    def classifier_parameters(self):
        return list(self.head.parameters())


def case(seed=0):
    """A batch with other labels in each domain, and the learners' first state."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        domain: {
            "image": torch.randn(count, 3, 32, 32, generator=generator),
            "label": torch.randint(0, K, (count, 32, 32), generator=generator),
        }
        for domain, count in (("source", 2), ("labelled", 2), ("unlabelled", 3))
    }
    del batch["unlabelled"]["label"]
    batch["unlabelled"]["inside"] = torch.ones(3, 32, 32, dtype=torch.bool)
    torch.manual_seed(seed)
    return batch, _Linear()


def start_at_once(**changes):
    """Full weights from the first step on, and no decay, so that a plain computation follows."""
    at_once = {"start": 0.0, "ramp": 0.0}
    parts = {name: at_once | changes.pop(name, {}) for name in ("global_alignment", "semantic_alignment")}
    return tiny(**parts, **changes)


def test_a_step_equals_the_losses_by_hand():
    """One backward of the sum, one step of plain SGD and of Adam."""
    settings = start_at_once(
        optimiser={"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.0},
        global_alignment={"weight": 0.5},
        semantic_alignment={"weight": 0.25},
    )
    batch, segmenter = case()
    learners = build_learners(settings, segmenter)
    before = {name: p.detach().clone() for name, p in segmenter.named_parameters()}

    outputs = {domain: segmenter(part["image"]) for domain, part in batch.items()}
    logits = {d: F.interpolate(o.logits, size=(32, 32), mode="bilinear") for d, o in outputs.items()}
    loss = sum(F.cross_entropy(logits[d], batch[d]["label"]) for d in ("source", "labelled"))
    views = learners.alignments["global"], learners.alignments["semantic"]
    confusion = semshift.confusion_loss(views[0].discriminator(logits["unlabelled"].softmax(1)))
    pooled = [
        semshift.class_sums(outputs[d].features, batch[d]["label"], K, per_image=True) for d in ("source", "labelled")
    ]
    confusion_s = semshift.confusion_loss(views[1].discriminator(pooled[1].means), weight=pooled[1].present)
    gradients = torch.autograd.grad(loss + 0.5 * confusion + 0.25 * confusion_s, list(segmenter.parameters()))
    discriminator_loss = semshift.discriminator_loss(
        views[0].discriminator(logits["source"].softmax(1)), views[0].discriminator(logits["unlabelled"].softmax(1))
    )
    of_discriminator = torch.autograd.grad(discriminator_loss, list(views[0].parameters()))

    row = learn(0, batch, learners, settings, Fabric(accelerator="cpu", devices=1), log=True)
    for (name, parameter), gradient in zip(segmenter.named_parameters(), gradients):
        torch.testing.assert_close(parameter, before[name] - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    for parameter, gradient in zip(views[0].parameters(), of_discriminator):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert row["loss/global"] == pytest.approx(confusion.item(), rel=1e-5)
    assert row["loss/semantic"] == pytest.approx(confusion_s.item(), rel=1e-5)
    assert row["loss/global_discriminator"] == pytest.approx(discriminator_loss.item(), rel=1e-5)
    assert (row["weight/global"], row["weight/semantic"]) == (0.5, 0.25)


def test_a_balanced_weight_is_a_ratio_of_gradients():
    batch, segmenter = case()
    settings = start_at_once(method="semantic", semantic_alignment={"weight": 0.3, "balanced": True})
    fabric = Fabric(accelerator="cpu", devices=1)
    row = learn(0, batch, build_learners(settings, segmenter), settings, fabric, log=True)
    assert row["weight/semantic"] == 0.3
    # The row's norm for the cross-entropy is over both domains, the ratio is at the labelled images' features.
    outputs = {domain: case()[1](part["image"]) for domain, part in batch.items()}
    loss = sum(
        F.cross_entropy(F.interpolate(outputs[d].logits, (32, 32), mode="bilinear"), batch[d]["label"])
        for d in ("source", "labelled")
    )
    norm = torch.autograd.grad(loss, outputs["labelled"].features)[0].norm()
    assert row["gradient/semantic"] == pytest.approx(0.3 * float(norm), rel=1e-3)


def test_the_losses_of_self_training_have_weights_of_their_own(monkeypatch):
    how = {"start": 0.0, "ramp": 0.0, "weight": 0.5, "contrast_weight": 0.25}
    settings, fabric = tiny(method="self-training", self_training=how), Fabric(accelerator="cpu", devices=1)

    def gradient(**factors):
        """Of the bias, with losses that are these multiples of its sum."""
        batch, segmenter = case()
        losses = {name.replace("_", "-"): factor * segmenter.head.bias.sum() for name, factor in factors.items()}
        monkeypatch.setattr(step_module, "self_training_losses", lambda *arguments: losses)
        row = learn(0, batch, build_learners(settings, segmenter), settings, fabric, log=True)
        assert {name: row[f"weight/{name}"] for name in losses} == {
            name: {"self-training": 0.5, "contrast": 0.25}[name] for name in losses
        }
        return segmenter.head.bias.grad

    added = gradient(self_training=2.0, contrast=8.0) - gradient()
    torch.testing.assert_close(added, torch.full((K,), 0.5 * 2 + 0.25 * 8))


def test_a_discriminator_learns_at_each_step_divisible_by_every():
    settings = start_at_once(method="semantic", semantic_alignment={"every": 2})
    batch, segmenter = case()
    learners = build_learners(settings, segmenter)
    weights = []
    for step in range(3):
        learn(step, batch, learners, settings, Fabric(accelerator="cpu", devices=1), log=False)
        weights.append(torch.cat([p.detach().flatten() for p in learners.alignments["semantic"].parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_class_takes_part_once_the_other_domain_has_shown_it():
    settings = start_at_once(method="semantic")
    batch, segmenter = case()
    batch["source"]["label"].fill_(0)
    batch["labelled"]["label"].fill_(5)
    learners = build_learners(settings, segmenter)
    fabric = Fabric(accelerator="cpu", devices=1)
    row = learn(0, batch, learners, settings, fabric, log=True)
    assert row["loss/semantic"] == 0
    assert math.isnan(row["accuracy/semantic_source"])
    batch["source"]["label"].fill_(5)
    assert learn(1, batch, learners, settings, fabric, log=True)["loss/semantic"] > 0
    seen = [[0, 5], [5]]
    assert [of.nonzero().flatten().tolist() for of in learners.alignments["semantic"].seen] == seen


def output_maps(settings, *, auxiliary=False):
    generator = torch.Generator().manual_seed(0)
    outputs, batch = {}, {}
    for domain, count in (("source", 2), ("labelled", 2), ("unlabelled", 3)):
        logits, second = (torch.randn(count, K, 16, 16, generator=generator).requires_grad_() for _ in range(2))
        outputs[domain] = Segmentation(logits, logits, second)
        batch[domain] = {"image": torch.zeros(count, 3, 32, 32)}
    learners = build_learners(settings, case()[1])
    learners.class_counts.counts.copy_(torch.randint(1, 100, (2, K), generator=generator))
    return outputs, learners, _output_maps("auxiliary" if auxiliary else "global", outputs, batch, learners, settings)


def wide(logits):
    return F.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize(
    ("against", "domains"), [("source", ["source"]), ("labelled", ["labelled"]), ("both", ["source", "labelled"])]
)
def test_unlabelled_outputs_are_compared_with_the_reference(against, domains, auxiliary):
    outputs, _, (reference, unlabelled) = output_maps(tiny(global_alignment={"against": against}), auxiliary=auxiliary)
    of = {domain: output.auxiliary if auxiliary else output.logits for domain, output in outputs.items()}
    assert torch.equal(reference, torch.cat([wide(of[domain]) for domain in domains]))
    assert torch.equal(unlabelled, wide(of["unlabelled"]))
    assert not reference.requires_grad


def test_balanced_maps_are_divided_by_the_shares_of_their_own_domain():
    settings = tiny(global_alignment={"against": "both", "inputs": "balanced"})
    outputs, learners, maps = output_maps(settings)
    counts = learners.class_counts.counts + 1
    expected = []
    for domain, of in (("source", counts[0]), ("labelled", counts[1]), ("unlabelled", counts[1])):
        weighed = wide(outputs[domain].logits).softmax(1) / (of / of.sum())[:, None, None]
        expected.append(weighed / weighed.sum(1, keepdim=True))
    torch.testing.assert_close(maps[0].softmax(1), torch.cat(expected[:2]))
    torch.testing.assert_close(maps[1].softmax(1), expected[2])


@pytest.mark.parametrize("per_image", [True, False])
def test_r1_on_prototypes_is_the_mean_over_those_that_count(per_image):
    settings = start_at_once(method="semantic", semantic_alignment={"r1": 1.0, "per_image": per_image})
    batch, segmenter = case()
    batch["source"]["label"].clamp_(max=2)
    learners = build_learners(settings, segmenter)
    align = learners.alignments["semantic"]
    align.seen[1, :2] = True
    outputs = {domain: segmenter(part["image"]) for domain, part in batch.items()}
    penalty = _penalty("semantic", outputs, batch, learners, settings)
    means = semshift.class_sums(outputs["source"].features, batch["source"]["label"], K, per_image=per_image).means
    means = means.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(align.discriminator(means).sum(), means)
    torch.testing.assert_close(penalty, gradient[..., :2, :].square().sum(-1).mean() / 2)
    penalty.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in align.parameters())


@pytest.mark.parametrize("inputs", ["probabilities", "entropy"])
def test_r1_on_output_maps(inputs):
    settings = start_at_once(method="global", global_alignment={"r1": 2.0, "inputs": inputs})
    batch, segmenter = case()
    learners = build_learners(settings, segmenter)
    outputs = {domain: segmenter(part["image"]) for domain, part in batch.items()}
    penalty = _penalty("global", outputs, batch, learners, settings)
    source = wide(outputs["source"].logits).softmax(1)
    source = (semshift.entropy_map(source) if inputs == "entropy" else source).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(learners.alignments["global"].discriminator(source).sum(), source)
    torch.testing.assert_close(penalty, gradient.square().sum((1, 2, 3)).mean() / 2)


@pytest.mark.parametrize("ignored", [0.3, 1.0])
def test_cross_entropy_is_the_mean_over_labelled_pixels(ignored):
    settings = tiny(method="joint")
    batch, segmenter = case()
    for domain in ("source", "labelled"):
        label = batch[domain]["label"]
        label[torch.rand(label.shape, generator=torch.Generator().manual_seed(1)) < ignored] = 255
    expected = 0.0
    if ignored < 1:
        losses = [
            F.cross_entropy(wide(segmenter(batch[d]["image"]).logits), batch[d]["label"], ignore_index=255)
            for d in ("source", "labelled")
        ]
        expected = sum(losses).item()
    del batch["unlabelled"]
    row = learn(
        0, batch, build_learners(settings, segmenter), settings, Fabric(accelerator="cpu", devices=1), log=False
    )
    assert row["loss/segmentation"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused_and_nothing_learns():
    settings = dataclasses.replace(TINY, method="joint")
    batch, segmenter = case()
    batch["source"]["image"][0, 0, 0, 0] = math.inf
    before = {name: p.detach().clone() for name, p in segmenter.named_parameters()}
    with refuses(InputError, "finite", "nan", "step 4"):
        learn(4, batch, build_learners(settings, segmenter), settings, Fabric(accelerator="cpu", devices=1), log=False)
    assert all(torch.equal(parameter, before[name]) for name, parameter in segmenter.named_parameters())

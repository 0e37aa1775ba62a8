"""The alignment modules against the recipe by hand, bit for bit, and against slow float64 loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import semshift
from tests.alignment import (
    EPS32,
    EPS64,
    RECIPES,
    C,
    K,
    equal,
    mean,
    semantic,
    spatial,
    state,
    train,
)


class Recipe(nn.Module):
    """The recipe by hand, as the documentation writes it."""

    def __init__(self, per_image=False, objective="bce", **options):
        super().__init__()
        self.discriminator = semshift.PrototypeDiscriminator(C, K, hidden_channels=(8,), **options)
        self.register_buffer("seen", torch.zeros(2, K, dtype=torch.bool))
        self.per_image, self.objective = per_image, {"objective": objective}
        self.confuse, self.tell = semshift.confusion_loss, semshift.discriminator_loss
        if options.get("conditioning") == "class-and-domain":
            self.confuse, self.tell = semshift.class_confusion_loss, semshift.class_discriminator_loss
            self.objective = {}

    def forward(self, features_s, labels_s, features_t, labels_t):
        source = semshift.class_sums(features_s, labels_s, K, per_image=self.per_image)
        target = semshift.class_sums(features_t, labels_t, K, per_image=self.per_image)
        shown = [sums.present.any(0) if self.per_image else sums.present for sums in (source, target)]
        self.seen |= torch.stack(shown)
        mask_s, mask_t = source.present & self.seen[1], target.present & self.seen[0]
        judged = semshift.frozen(self.discriminator)(target.means)
        confusion = self.confuse(judged, weight=mask_t, **self.objective)
        logits = self.discriminator(source.means.detach()), self.discriminator(target.means.detach())
        return confusion, self.tell(*logits, source_weight=mask_s, target_weight=mask_t, **self.objective)


@pytest.mark.parametrize("options", RECIPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_semantic_alignment_equals_the_recipe_by_hand(per_image, options):
    modules = []
    for kind in (semantic, Recipe):
        torch.manual_seed(2)
        modules.append(kind(per_image=per_image, **options))
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
    assert equal(train(modules[0]), train(modules[1]))
    assert modules[0].seen.tolist() == [[True, True, True], [True, True, True]]


class GlobalRecipe(nn.Module):
    """The loop of AdaptSegNet, or of ADVENT, by hand."""

    def __init__(self, inputs="probabilities", objective="bce", spectral_norm=False):
        super().__init__()
        self.discriminator = semshift.FCDiscriminator(K, base_channels=2, spectral_norm=spectral_norm)
        self.map = semshift.entropy_map if inputs == "entropy" else lambda probabilities: probabilities
        self.objective = objective

    def forward(self, source, target, size, align_corners=False):
        if size is not None:
            source, target = (
                F.interpolate(x, size, mode="bilinear", align_corners=align_corners) for x in (source, target)
            )
        source, target = self.map(source.softmax(1)).detach(), self.map(target.softmax(1))
        confusion = semshift.confusion_loss(semshift.frozen(self.discriminator)(target), objective=self.objective)
        logits = self.discriminator(source), self.discriminator(target.detach())
        return confusion, semshift.discriminator_loss(*logits, objective=self.objective)


@pytest.mark.parametrize(
    "call", [{"size": None}, {"size": (40, 64)}, {"size": (40, 64), "align_corners": True}], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"inputs": "entropy"}, {"objective": "hinge"}, {"spectral_norm": True}], ids=str
)
def test_global_alignment_equals_the_recipe_by_hand(call, options):
    found = []
    for kind in (spatial, GlobalRecipe):
        torch.manual_seed(3)
        align = kind(**options)
        # Two heads of unlike stride: without `size` the maps of the domains differ in size, and in number.
        heads = nn.ModuleList([nn.Conv2d(3, K, 1), nn.Conv2d(3, K, 1, stride=(1, 2))])
        optimiser = torch.optim.SGD(heads.parameters(), 0.1)
        own = torch.optim.Adam(align.parameters(), 1e-3)
        for step in range(5):
            images = torch.randn(3, 3, 32, 96, generator=torch.Generator().manual_seed(step))
            confusion, discriminator = align(heads[0](images[:1]), heads[1](images[1:]), **call)[:2]
            optimiser.zero_grad()
            own.zero_grad()
            (confusion + discriminator).backward()
            optimiser.step()
            own.step()
        found.append(state(heads) + state(align))
    assert equal(*found)


def slow_prototypes(maps, labels):
    """The mean of each class, one cell after another."""
    cells = {}
    for image, row in zip(maps.detach(), labels.tolist()):
        for cell, k in enumerate(row):
            if k != 255:
                cells.setdefault(k, []).append(image[:, cell])
    return {k: mean(vectors) for k, vectors in sorted(cells.items())}


def slow_distance(source, target):
    both = source.keys() & target.keys()
    middle = {k: (source[k] + target[k]) / 2 for k in both}
    unit = mean((middle[a] - middle[b]).norm().item() for a in both for b in both if a != b)
    return mean((source[k] - target[k]).norm().item() / unit for k in both)


def softplus(logit):
    return math.log1p(math.exp(logit))


# The classes that each image of a domain shows.
SHOWN = st.lists(st.sets(st.integers(0, K - 1)), min_size=1, max_size=3)


@given(st.lists(st.tuples(SHOWN, SHOWN), min_size=1, max_size=3), st.booleans())
def test_classes_losses_and_figures_equal_a_slow_loop(batches, per_image):
    torch.manual_seed(5)
    align = semantic(per_image=per_image).double()
    seen = [set(), set()]
    for batch in batches:
        maps = [torch.randn(len(shown), C, 8, dtype=torch.float64, requires_grad=True) for shown in batch]
        rows = [[sorted(classes) or [255] for classes in shown] for shown in batch]
        labels = [torch.tensor([[row[i % len(row)] for i in range(7)] + [255] for row in side]) for side in rows]
        found = align(maps[0], labels[0], maps[1], labels[1])

        seen = [before.union(*shown) for before, shown in zip(seen, batch)]
        logits = []
        for x, y, other in zip(maps, labels, reversed(seen)):
            groups = zip(x.split(1), y.split(1)) if per_image else [(x, y)]
            vectors = [(k, v) for group in groups for k, v in slow_prototypes(*group).items() if k in other]
            logits.append([align.discriminator.layers(v)[k].item() for k, v in vectors])
        confusion = mean((softplus(-z) for z in logits[1]), 0.0)
        told = mean((softplus(-z) for z in logits[0]), 0.0) + mean((softplus(z) for z in logits[1]), 0.0)
        # No sum has a hundred terms.
        assert found.confusion.item() == pytest.approx(confusion, rel=100 * EPS64, abs=0)
        assert found.discriminator.item() == pytest.approx(told / 2, rel=100 * EPS64, abs=0)
        assert {name: figure.item() for name, figure in found.figures.items()} == pytest.approx(
            {
                "source_accuracy": mean(z > 0 for z in logits[0]),
                "target_accuracy": mean(z < 0 for z in logits[1]),
                "prototype_distance": slow_distance(*(slow_prototypes(x, y) for x, y in zip(maps, labels))),
            },
            rel=EPS32,
            nan_ok=True,
        )
    assert [set(row.nonzero().flatten().tolist()) for row in align.seen] == seen

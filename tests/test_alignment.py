"""The alignment modules: what each owes its user."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import semshift
from tests.alignment import (
    EPS32,
    RECIPES,
    C,
    K,
    domain,
    equal,
    features,
    gradients,
    mean,
    semantic,
    spatial,
    state,
    train,
    vanish,
)


@pytest.mark.parametrize(
    "options",
    [
        {"resample": "nearest"},
        {"resample": "majority"},
        {"resample": "area"},
        {"align_corners": True},
        {"ignore_index": 2},
        {"ignore_index": None},
    ],
    ids=str,
)
def test_options_reach_the_pooling(options):
    align, plain, (_, labels) = semantic(**options), semantic(), domain(0)
    plain.load_state_dict(align.state_dict())
    found, other = (module(features(1), labels, features(2), labels).confusion for module in (align, plain))
    sums = [semshift.class_sums(features(seed), labels, K, per_image=True, **options) for seed in (1, 2)]
    assert torch.equal(found, align.compare(*sums).confusion)
    # No label is ignored here, so None is as good as 255.
    assert torch.equal(found, other) == (options == {"ignore_index": None})


def test_seen_is_kept_in_training_with_gradients_alone():
    align, (_, labels) = semantic(), domain(0)
    with torch.no_grad():
        quiet = [align(features(1), labels, features(2).detach(), labels)]
    with torch.inference_mode():
        quiet.append(align(features(1), labels, features(2).detach(), labels))
    align.eval()
    quiet.append(align(features(1), labels, features(2).detach(), labels))
    assert not align.seen.any()
    align.train()
    loud = align(features(1), labels, features(2), labels)
    assert align.seen.all()
    for losses in quiet:
        assert torch.equal(losses.confusion, loud.confusion)
        assert torch.equal(losses.discriminator, loud.discriminator)
        assert losses.figures == loud.figures


@pytest.mark.parametrize("per_image", [False, True])
def test_a_batch_of_one_image_meets_classes_of_earlier_batches(per_image):
    align = semantic(per_image=per_image)

    def step(source, target):
        labels = [domain(seed, [k], images=1)[1] for seed, k in enumerate((source, target))]
        return align(features(1, 1), labels[0], features(2, 1), labels[1])

    assert step(0, 1).confusion == 0
    losses = step(1, 0)
    assert losses.confusion > 0
    assert losses.discriminator > 0
    # Class 2 is new to both, and no class is in both images.
    assert step(2, 0).confusion > 0
    assert align.seen.tolist() == [[True, True, True], [True, True, False]]
    assert align.eval()(*(features(1, 1), domain(0, [0], 1)[1]) * 2).figures["prototype_distance"].isnan()


@pytest.mark.parametrize("kind", [semantic, lambda: semantic(spectral_norm=True)])
def test_a_resumed_run_goes_on_identically(kind, tmp_path):
    torch.manual_seed(2)
    align, network = kind(), nn.Conv2d(3, C, 2, stride=2)
    train(align, range(2), network)
    torch.save({"align": align.state_dict(), "network": network.state_dict()}, tmp_path / "checkpoint.pt")
    whole = train(align, range(2, 5), network)
    align, network = kind(), nn.Conv2d(3, C, 2, stride=2)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    align.load_state_dict(stored["align"])
    network.load_state_dict(stored["network"])
    assert align.seen.tolist() == [[True, False, False], [False, True, False]]
    assert equal(train(align, range(2, 5), network), whole)


@pytest.mark.parametrize("classes", [([0], [1, 2]), ([], [1]), ([1], []), ([], [])], ids=str)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("options", RECIPES, ids=str)
def test_nothing_in_common_is_0_and_attached(classes, per_image, options):
    align, maps = semantic(per_image=per_image, **options), (features(1), features(2))
    losses = align(maps[0], domain(1, classes[0])[1], maps[1], domain(2, classes[1])[1])
    assert losses.confusion == losses.discriminator == 0
    assert all(figure.isnan() for figure in losses.figures.values())
    (losses.confusion + losses.discriminator).backward()
    assert vanish([maps[1].grad, *gradients(align)])
    assert maps[0].grad is None


def run(kind, seed=1):
    """A module, its two inputs and its losses."""
    if kind is spatial:
        module = spatial()
        inputs = torch.randn(2, K, 32, 32, requires_grad=True), torch.randn(1, K, 32, 64, requires_grad=True)
        return module, inputs, module(*inputs)
    module, inputs = kind(), (features(seed), features(seed + 1))
    return module, inputs, module(inputs[0], domain(seed)[1], inputs[1], domain(seed + 1)[1])


@pytest.mark.parametrize("kind", [semantic, lambda: semantic(per_image=False), spatial])
def test_the_losses_share_no_gradient(kind):
    module, (source, target), losses = run(kind)
    assert losses.confusion.dtype == losses.discriminator.dtype == torch.float32
    assert losses.confusion.shape == losses.discriminator.shape == ()
    losses.confusion.backward()
    assert target.grad.abs().sum() > 0
    assert gradients(module) == [None] * len(list(module.parameters()))
    target.grad = None
    losses.discriminator.backward()
    assert target.grad is source.grad is None
    assert all(gradient.abs().sum() > 0 for gradient in gradients(module))


@pytest.mark.parametrize("kind", [semantic, spatial])
def test_figures_are_alike_at_every_step(kind):
    names = ["source_accuracy", "target_accuracy", *(["prototype_distance"] if kind is semantic else [])]
    for _ in range(2):
        figures = run(kind)[2].figures
        assert list(figures) == names
        assert all(figure.dtype == torch.float32 and figure.shape == () for figure in figures.values())
        assert not any(figure.requires_grad or figure.isnan() for figure in figures.values())


def test_accuracies_of_maps_are_shares_of_patches():
    module, inputs, losses = run(spatial)
    logits = [module.discriminator(maps.softmax(1)).flatten().tolist() for maps in inputs]
    assert losses.figures["source_accuracy"] == mean(z > 0 for z in logits[0])
    assert losses.figures["target_accuracy"] == mean(z < 0 for z in logits[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_precision(dtype):
    _, labels = domain(0)
    align, maps = semantic(), [features(seed).detach().to(dtype).requires_grad_() for seed in (1, 2)]
    losses = align(maps[0], labels, maps[1], labels)
    assert losses.confusion.dtype == losses.discriminator.dtype == torch.float32
    assert all(figure.dtype == torch.float32 for figure in losses.figures.values())
    losses.confusion.backward()
    assert maps[1].grad.dtype == dtype
    align, maps = spatial(), [torch.randn(1, K, 8, 8, dtype=dtype, requires_grad=True) for _ in range(2)]
    losses = align(*maps, (32, 32))
    assert losses.confusion.dtype == losses.discriminator.dtype == torch.float32
    if dtype != torch.float64:
        # Up-sampled and softmaxed in float32.
        assert equal(losses[:2], align(*(x.float() for x in maps), (32, 32))[:2])


def test_no_value_is_read():
    """Reading a value would force a device sync. The meta device has no values, so reading one there is an error."""
    align, (_, labels) = semantic().to("meta"), domain(0)
    inputs = features(1).detach().to("meta").requires_grad_(), labels.to("meta")
    losses = align(*inputs, *inputs)
    (losses.confusion + losses.discriminator).backward()
    maps = torch.randn(1, K, 32, 32, device="meta", requires_grad=True)
    losses = spatial(inputs="entropy").to("meta")(maps, maps)
    (losses.confusion + losses.discriminator).backward()


def test_arguments_are_shown_and_numpy_counts_taken():
    align = semshift.SemanticAlignment(np.int64(C), np.int32(K), resample="area", per_image=False, objective="hinge")
    assert type(align.num_classes) is type(align.in_channels) is int
    assert re.search("objective='hinge', resample='area', .*per_image=False, ignore_index=255", repr(align))
    assert "inputs='entropy', objective='bce'" in repr(spatial(inputs="entropy"))


def test_compare_takes_sums_of_either_shape():
    _, labels = domain(0)
    for per_image in (False, True):
        align = semantic(per_image=per_image)
        sums = [semshift.class_sums(features(seed), labels, K, per_image=per_image) for seed in (1, 2)]
        assert equal(align.compare(*sums)[:2], align(features(1), labels, features(2), labels)[:2])
    # A bank's rows against one batch's images.
    maps = features(1)
    pooled = semshift.class_sums(maps, labels, K)
    mixed = align.compare(pooled, sums[1])
    sum(mixed[:2]).backward()
    assert maps.grad is None
    expected = semshift.discriminator_loss(align.discriminator(pooled.means), align.discriminator(sums[1].means))
    torch.testing.assert_close(mixed.discriminator, expected, rtol=10 * EPS32, atol=0)


def test_compare_confuses_with_other_sums():
    align, (_, labels) = semantic(), domain(0)
    source, target = (semshift.class_sums(features(seed), labels.clamp(max=1), K) for seed in (1, 2))
    # Of its two classes the source shows one.
    few = semshift.class_sums(features(3), domain(1, [1, 2])[1], K)
    plain, other = align.compare(source, target), align.compare(source, target, target_confusion=few)
    assert torch.equal(plain.discriminator, other.discriminator)
    assert torch.equal(other.confusion, F.softplus(-align.discriminator(few.means)[1]))


def test_compare_of_detached_sums_trains_the_discriminator():
    align, (_, labels) = semantic(), domain(0)
    sums = [semshift.class_sums(features(seed).detach(), labels, K) for seed in (1, 2)]
    own = torch.optim.Adam(align.parameters(), 1e-2)
    first = align.compare(*sums)
    assert not first.confusion.requires_grad
    for _ in range(20):
        own.zero_grad()
        align.compare(*sums).discriminator.backward()
        own.step()
    assert align.compare(*sums).discriminator < first.discriminator
    assert align.seen.all()


def test_a_penalty_can_be_computed_on_the_discriminator():
    found = []
    for factor in (0.0, 10.0):
        torch.manual_seed(6)
        align, _, losses = run(semantic)
        prototypes = torch.randn(K, C, requires_grad=True)
        penalty = semshift.r1_penalty(align.discriminator(prototypes), prototypes)
        (losses.discriminator + factor * penalty).backward()
        # Of the weights: leaky ReLUs are linear but for their corners, so biases do not change the gradient at inputs.
        found.append([gradient for gradient in gradients(align) if gradient.dim() > 1])
    assert not any(torch.equal(*pair) for pair in zip(*found))


@pytest.mark.parametrize("kind", [semantic, lambda: semantic(spectral_norm=True), spatial])
def test_the_discriminator_may_step_before_the_confusion(kind):
    found = []
    for first in ("discriminator", "confusion"):
        torch.manual_seed(6)
        module, (_, target), losses = run(kind)
        own = torch.optim.Adam(module.parameters(), 0.1)
        if first == "confusion":
            losses.confusion.backward()
        losses.discriminator.backward()
        own.step()
        if first == "discriminator":
            losses.confusion.backward()
        found.append([target.grad, *state(module)])
    assert equal(*found)

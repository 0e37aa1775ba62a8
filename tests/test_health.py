"""Figures of the discriminator's health: against counts and distances done by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

import semshift
from semshift._gradients import _fix as fix
from tests.errors import mentions, refuses

# While compiling, torch warns that it is slow on Python 3.13.0, and about a `.grad` that its own tracer reads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

NAN = math.nan
LOGITS = st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, NAN])


def share(right, weights):
    counted = [hit for hit, weight in zip(right, weights) if weight > 0]
    return torch.tensor(sum(counted)).float() / len(counted) if counted else torch.tensor(NAN)


def same(a, b):
    return torch.equal(a, b) or (a.isnan().all().item() and b.isnan().all().item())


@given(st.lists(st.tuples(LOGITS, st.sampled_from([0.0, 0.5, 2.0]))), st.lists(LOGITS), st.booleans())
def test_domain_accuracy_counts(source, target, as_bool):
    logits = torch.tensor([logit for logit, _ in source]).reshape(-1, 1)
    weights = torch.tensor([weight for _, weight in source]).reshape(-1, 1)
    accuracy = semshift.domain_accuracy(logits, torch.tensor(target), source_weight=weights > 0 if as_bool else weights)
    assert isinstance(accuracy, semshift.DomainAccuracy)
    assert accuracy.source.dtype == accuracy.target.dtype == torch.float32
    assert same(accuracy.source, share([logit > 0 for logit, _ in source], [weight for _, weight in source]))
    assert same(accuracy.target, share([logit < 0 for logit in target], [1] * len(target)))


def test_a_logit_of_zero_is_wrong_on_both_sides():
    assert semshift.domain_accuracy(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0)


def test_domains_and_their_weights_are_kept_apart():
    here = torch.tensor([True, False, False])
    logits = torch.tensor([1.0, -1.0, 1.0])
    accuracy = semshift.domain_accuracy(logits, logits, source_weight=here, target_weight=~here)
    assert accuracy == (1.0, 0.5)
    accuracy = semshift.class_domain_accuracy(
        torch.stack([logits, -logits], -1), torch.stack([logits, -logits], -1), source_weight=here, target_weight=~here
    )
    assert accuracy == (1.0, 0.5)


@pytest.mark.parametrize("classes", [1, 3])
def test_accuracy_is_nan_where_nothing_takes_part(classes):
    logits, nothing = torch.randn(4, 2 * classes), torch.zeros(4)
    for accuracy in (
        semshift.domain_accuracy(logits[:, 0], logits[:, 0], source_weight=nothing, target_weight=nothing > 0),
        semshift.class_domain_accuracy(logits, logits, source_weight=nothing, target_weight=nothing > 0),
        semshift.domain_accuracy(logits[:0], logits[:0]),
        semshift.class_domain_accuracy(logits[:0], logits[:0]),
    ):
        assert accuracy.source.isnan()
        assert accuracy.target.isnan()


def test_class_domain_accuracy_weighs_halves_not_peaks():
    """The largest single output is of one domain, the larger half of the other."""
    logits = torch.tensor([1.2, 1.2, 1.2, 2.0, -9.0, -9.0])
    assert semshift.class_domain_accuracy(logits, logits) == (1.0, 0.0)
    large = 1000 * torch.tensor([[1.0, -1.0, 0.9, 0.9]])
    assert semshift.class_domain_accuracy(large, large) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_domain_accuracy_of_half_logits(dtype):
    """Both halves sum to log 2 in half precision, where one is larger."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 1e-4]], dtype=dtype)
    assert semshift.class_domain_accuracy(logits, logits) == (0.0, 1.0)


def test_figures_hold_no_graph():
    logits = torch.randn(3, 4, requires_grad=True)
    figures = [
        *semshift.domain_accuracy(logits, logits),
        *semshift.class_domain_accuracy(logits, logits),
        semshift.gradient_norm(logits.sum(), logits),
        semshift.prototype_distance(logits, logits * 2),
    ]
    assert not any(figure.requires_grad for figure in figures)


INTEGERS, ELSEWHERE = torch.ones(2, dtype=torch.int64), torch.zeros(2, device="meta")
Z = torch.zeros


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: semshift.domain_accuracy([1.0], Z(1)), ("source_logits", "list")),
        (lambda: semshift.domain_accuracy(Z(2), INTEGERS), ("target_logits", torch.int64)),
        (lambda: semshift.domain_accuracy(Z(1), Z(1), source_weight=[1]), ("source_weight", "list")),
        (lambda: semshift.class_domain_accuracy(Z(2, 2), None), ("target_logits", "NoneType")),
        (
            lambda: semshift.class_domain_accuracy(Z(2, 2), Z(2, 2), target_weight=INTEGERS),
            ("target_weight", torch.int64),
        ),
        (lambda: semshift.gradient_norm(0.0, Z(1)), ("loss", "float")),
        (lambda: semshift.gradient_norm(Z(()), None), ("features", "NoneType")),
        (lambda: semshift.gradient_norm(Z(()), INTEGERS), ("features", torch.int64)),
        (lambda: semshift.prototype_distance(None, Z(2, 2)), ("source_means", "NoneType")),
        (lambda: semshift.prototype_distance(Z(2, 2), INTEGERS), ("target_means", torch.int64)),
        (lambda: semshift.prototype_distance(Z(2, 2), Z(2, 2), weight=[1, 1]), ("weight", "list")),
    ],
)
def test_type_errors(call, says):
    with refuses(TypeError, *says):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: semshift.domain_accuracy(Z(2), Z(2), source_weight=Z(1)),
            ("source_weight", "source_logits", [2], [1]),
        ),
        (lambda: semshift.domain_accuracy(Z(2), Z(2, 3), target_weight=Z(2)), ("target_weight", [2, 3], [2])),
        (
            lambda: semshift.domain_accuracy(Z(2), Z(2), target_weight=ELSEWHERE),
            ("target_weight", "target_logits", "meta", "cpu"),
        ),
        (
            lambda: semshift.class_domain_accuracy(Z(4, 2), Z(4, 2), target_weight=Z(4, 2)),
            ("target_weight", [4], [4, 2]),
        ),
        (lambda: semshift.class_domain_accuracy(Z(4, 3), Z(4, 2)), ("source_logits", "[..., 2K]", [4, 3])),
        (lambda: semshift.class_domain_accuracy(Z(4, 2), Z(4, 0)), ("target_logits", "[..., 2K]", [4, 0])),
        (lambda: semshift.class_domain_accuracy(Z(()), Z(4, 2)), ("source_logits", "[..., 2K]", [])),
        (lambda: semshift.gradient_norm(Z(1), Z(1)), ("loss", "scalar", [1])),
        (lambda: semshift.prototype_distance(Z(2), Z(2)), ("source_means", "target_means", "[K, C]", [2])),
        (lambda: semshift.prototype_distance(Z(2, 1), Z(3, 1)), ("source_means", "target_means", [2, 1], [3, 1])),
        (lambda: semshift.prototype_distance(Z(2, 1), Z(2, 1), weight=Z(1)), ("weight", [2], [1])),
        (
            lambda: semshift.prototype_distance(Z(2, 3), Z(2, 3, device="meta")),
            ("source_means", "target_means", "meta", "cpu"),
        ),
    ],
)
def test_value_errors(call, says):
    with refuses(ValueError, *says):
        call()


@pytest.mark.parametrize("scale", [1.0, 2.0**-60])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_norm(dtype, scale):
    """Of [3, 4] the norm is 5; scaled by 2 ** -60 the squares leave float32's range, and half cannot hold them."""
    if scale < 1 and dtype == torch.float16:
        scale = 2.0**-20
    features = torch.ones(2, dtype=dtype, requires_grad=True)
    weights = torch.tensor([3.0, 4.0], dtype=dtype) * scale
    norm = semshift.gradient_norm((features * weights).sum(), features)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert norm.item() == 5 * scale
    assert not norm.requires_grad


def test_gradient_norm_keeps_the_graph_and_writes_nothing():
    weight = torch.tensor([2.0, -1.0], requires_grad=True)
    features = weight * 3
    loss = features.square().sum()
    assert semshift.gradient_norm(loss, features).item() == semshift.gradient_norm(loss, features).item()
    semshift.gradient_norm(loss, weight)
    assert weight.grad is None
    loss.backward()
    assert torch.equal(weight.grad, 18 * weight.detach())


@pytest.mark.parametrize(
    ("loss", "features"),
    [
        (torch.ones(()), torch.ones(1, requires_grad=True)),
        (torch.ones((), requires_grad=True) * 2, torch.ones(1)),
        (torch.ones((), requires_grad=True) * 2, torch.ones(1, requires_grad=True)),
    ],
    ids=["constant loss", "constant features", "no way between"],
)
def test_gradient_norm_without_a_gradient(loss, features):
    with refuses(ValueError, "loss", "features"):
        semshift.gradient_norm(loss, features)


def two_parts():
    """A backbone's features, and a head that saves its own activations."""
    backbone = nn.Conv2d(2, 3, 1)
    return backbone, nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1)), torch.randn(2, 2, 3, 3)


def test_gradient_norm_at_a_slice_or_a_copy():
    backbone, head, images = two_parts()
    features = backbone(images)
    loss = head(features).square().mean()
    for other in (features[:1], features.clone(), backbone(images)):
        with refuses(ValueError, "features", "loss", "slice", "copy"):
            semshift.gradient_norm(loss, other)
    assert semshift.gradient_norm(loss, features) > 0
    # The loss may be of a slice.
    part = semshift.gradient_norm(head(features[:1]).square().mean(), features)
    alone = semshift.gradient_norm(head(first := features[:1]).square().mean(), first)
    # A norm of 27 squares, in any order.
    torch.testing.assert_close(part, alone, rtol=27 * torch.finfo(torch.float32).eps, atol=0)


def test_gradient_norm_through_checkpoints():
    backbone, head, images = two_parts()
    features = backbone(images)
    plain = semshift.gradient_norm(head(features).square().mean(), features)
    again = semshift.gradient_norm(checkpoint(head, features, use_reentrant=False).square().mean(), features)
    assert torch.equal(again, plain)
    with refuses(RuntimeError, "features", "loss", "use_reentrant=False"):
        semshift.gradient_norm(checkpoint(head, features, use_reentrant=True).square().mean(), features)
    # The message of older torch versions, which does not name a fix.
    mentions(fix("Checkpointing is not compatible with .grad()"), "use_reentrant=False")


def test_gradient_norm_of_a_network_that_was_compiled_whole():
    backbone, head, images = two_parts()
    torch._dynamo.reset()
    network = torch.compile(lambda x: (features := backbone(x), head(features)), backend="aot_eager")
    features, logits = network(images)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # because its message is looked at below
        semshift.gradient_norm(logits.square().mean(), features)
    mentions(caught.value, "features", "loss", "compiled", "backbone", "head")
    for other in ("slice", "copy", "use_reentrant"):
        assert other not in str(caught.value)
    # Features of a compiled backbone are another matter.
    features = torch.compile(backbone, backend="aot_eager")(images)
    with refuses(ValueError, "features", "loss", "slice", "copy"):
        semshift.gradient_norm(head(features).square().mean(), features[:1])
    with refuses(ValueError, "features", "loss", "slice", "copy"):
        semshift.gradient_norm(head(backbone(images)).square().mean(), features)
    # Apart, as the message says.
    features = torch.compile(backbone, backend="aot_eager")(images)
    found = semshift.gradient_norm(torch.compile(head, backend="aot_eager")(features).square().mean(), features)
    assert torch.equal(found, semshift.gradient_norm(head(features).square().mean(), features))


def test_gradient_norm_of_a_network_that_was_checkpointed_whole():
    backbone, head, images = two_parts()

    def network(x):
        return (features := backbone(x)), head(features)

    def norm(use_reentrant):
        features, logits = checkpoint(network, images.clone().requires_grad_(), use_reentrant=use_reentrant)
        return semshift.gradient_norm(logits.square().mean(), features)

    with refuses(ValueError, "features", "loss", "use_reentrant=False"):
        norm(True)
    features, logits = network(images)
    assert torch.equal(norm(False), semshift.gradient_norm(logits.square().mean(), features))


def test_gradient_norm_after_the_backward():
    backbone, head, images = two_parts()
    features = backbone(images)
    loss = head(features).square().mean()
    loss.backward()
    with refuses(RuntimeError, "features", "loss", "backward", "before"):
        semshift.gradient_norm(loss, features)


@pytest.mark.skipif(
    not hasattr(functorch, "donated_buffer"), reason="because torch 2.4 donates no buffers, so nothing is freed early"
)
def test_gradient_norm_of_a_network_compiled_with_donated_buffers():
    """A backward that was first run without `retain_graph` may free what it was given."""
    backbone, head, images = two_parts()

    def norm():
        torch._dynamo.reset()
        compiled = torch.compile(head, backend="aot_eager")
        compiled(backbone(images)).square().mean().backward()
        features = backbone(images)
        return semshift.gradient_norm(compiled(features).square().mean(), features)

    with (
        functorch.patch(donated_buffer=True),
        refuses(RuntimeError, "features", "donated_buffer = False"),
    ):
        norm()
    with functorch.patch(donated_buffer=False):
        features = backbone(images)
        assert torch.equal(norm(), semshift.gradient_norm(head(features).square().mean(), features))


def test_gradient_norm_of_a_term_in_which_nothing_takes_part():
    features = torch.randn(3, requires_grad=True)
    assert semshift.gradient_norm(semshift.confusion_loss(features, weight=torch.zeros(3)), features).item() == 0


def distance(source, target, here):
    """The definition, in a loop."""
    middle = [[(a + b) / 2 for a, b in zip(s, t)] for s, t in zip(source, target)]
    pairs = [math.dist(middle[i], middle[j]) for i in here for j in here if i != j]
    unit = sum(pairs) / len(pairs) if pairs else NAN
    return [math.dist(s, t) / unit if k in here else NAN for k, (s, t) in enumerate(zip(source, target))]


@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 99), st.data())
def test_prototype_distance_is_its_definition(classes, channels, seed, data):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, classes, channels, generator=generator, dtype=torch.float64)
    here = [data.draw(st.booleans()) for _ in range(classes)]
    taking_part = torch.tensor(here, dtype=torch.bool)
    expected = torch.tensor(
        distance(source.tolist(), target.tolist(), [k for k in range(classes) if here[k]]), dtype=torch.float64
    )
    # Elements that are left out may hold any value.
    source[~taking_part] = NAN
    for weight in (taking_part, taking_part.float() / 2):
        found = semshift.prototype_distance(source, target, weight=weight)
        assert found.dtype == torch.float64
        # Two norms and a mean of K (K - 1) terms, none of which cancel after the first difference.
        bound = (classes**2 + 2 * channels + 8) * torch.finfo(torch.float64).eps
        # The middles' difference may cancel: normal draws lie within 6.
        torch.testing.assert_close(found, expected, rtol=100 * bound, atol=100 * bound, equal_nan=True)


def test_prototype_distance_of_many_classes_far_from_the_origin():
    """Eighths beside 2 ** 18: their differences are exact in float32, and the products of a fast cdist would cancel."""
    source, target = 2**18 + torch.randint(-99, 100, (2, 150, 16)).float() / 8
    expected = torch.tensor(distance(source.tolist(), target.tolist(), range(150)), dtype=torch.float64)
    found = semshift.prototype_distance(source, target)
    assert found.dtype == torch.float32
    # Two norms of 16 squares and a root each, the mean of 150 * 149 distances and the quotient.
    bound = (2 * 18 + 150**2 + 2) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(semshift.prototype_distance(source, target), found)


def test_prototype_distance_holds_no_pair_of_classes_channel_by_channel():
    """`[K, K, C]` would take 64 MiB here."""
    source, target = torch.rand(2, 256, 256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        semshift.prototype_distance(source, target)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 256 * 256 * 256 * 4 / 32


@given(st.integers(-20, 20), st.integers(0, 99))
def test_prototype_distance_has_no_scale(exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, 4, 3, generator=generator)
    # Powers of two round nothing.
    scaled = semshift.prototype_distance(source * 2.0**exponent, target * 2.0**exponent)
    assert torch.equal(scaled, semshift.prototype_distance(source, target))


@pytest.mark.parametrize("weight", [None, torch.zeros(3), torch.tensor([False, True, False])])
def test_prototype_distance_needs_two_classes(weight):
    classes = 1 if weight is None else 3
    assert semshift.prototype_distance(torch.zeros(classes, 2), torch.ones(classes, 2), weight=weight).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prototype_distance_of_half_means_does_not_overflow(dtype):
    """An overflowing unit would make every distance 0: the look of perfect alignment."""
    source, target = ((1000 * torch.rand(3, 6000)).to(dtype) for _ in range(2))
    assert torch.equal(
        semshift.prototype_distance(source, target), semshift.prototype_distance(source.float(), target.float())
    )


def test_prototype_distance_of_collapsed_features_is_not_alignment():
    assert semshift.prototype_distance(torch.ones(3, 4), torch.ones(3, 4)).isnan().all()

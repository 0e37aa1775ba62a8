"""Pooling and labels under forward mode and the transforms of torch.func, and all of semshift on fake tensors."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import semshift
from tests.errors import refuses

pytestmark = [
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
    # Whole label maps of a batch are looked at one by one.
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning"),
    # What torch's own forward mode and linearize do.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.usefixtures("few_or_many"),
]

MODES = [None, "nearest", "majority", "area", "bilinear", "weighted"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def cases(mode, layout=torch.contiguous_format):
    """A pooling function of features, and two batches `[2, 3, 4, 5]` for it."""
    one, other = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 3, 255])[torch.randint(0, 4, (2, 4, 5) if mode is None else (2, 8, 9))]
    weights = torch.rand(2, 4, 4, 5, dtype=torch.float64)

    def pool(features, per_image=False):
        if mode == "weighted":
            return semshift.weighted_class_sums(features, weights, per_image=per_image)
        return semshift.class_sums(features, labels, 4, resample=mode, per_image=per_image)

    return pool, one.to(memory_format=layout), other


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_tangents(mode, layout, per_image):
    """Sums are linear in the features, so that the tangent of sums are the sums of the tangent."""
    pool, features, tangent = cases(mode, layout)

    def sums(x):
        return pool(x, per_image).sums

    torch.testing.assert_close(jvp(sums, (features,), (tangent,))[1], sums(tangent))
    torch.testing.assert_close(linearize(sums, features)[1](tangent), sums(tangent))
    for requires_grad in (False, True):
        leaf = features.detach().clone().requires_grad_(requires_grad)
        with forward_ad.dual_level():
            pooled = sums(forward_ad.make_dual(leaf, tangent))
            torch.testing.assert_close(forward_ad.unpack_dual(pooled).tangent, sums(tangent))


@pytest.mark.parametrize("mode", MODES)
def test_a_tangent_of_the_gradient_alone(mode):
    pool, features, _ = cases(mode)
    leaf = features.clone().requires_grad_()
    sums = pool(leaf).sums
    (want,) = torch.autograd.grad(sums, leaf, torch.ones_like(sums), retain_graph=True)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(sums, leaf, forward_ad.make_dual(0 * sums.detach(), torch.ones_like(sums)))
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_torch_func(mode, layout):
    pool, features, _ = cases(mode, layout)

    def cube(x):
        return (pool(x, True).means ** 3).sum()

    leaf = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cube(leaf), leaf)
    torch.testing.assert_close(grad(cube)(features), gradient)
    jacobian = torch.autograd.functional.jacobian(lambda x: pool(x).sums, features)
    for transform in (jacfwd, jacrev):
        torch.testing.assert_close(transform(lambda x: pool(x).sums)(features), jacobian)
    want = torch.autograd.functional.hessian(cube, features)
    for found in (hessian(cube), jacrev(jacfwd(cube)), jacrev(jacrev(cube))):
        torch.testing.assert_close(found(features), want)


def test_tangents_of_weights_reach_places_that_no_class_weighs():
    features, weights = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 2, 4, dtype=torch.float64)
    weights[0, :, 1] = 0
    tangent = torch.randn_like(weights)

    def sums(w):
        return semshift.weighted_class_sums(features, w).sums

    torch.testing.assert_close(jvp(sums, (weights,), (tangent,))[1], sums(tangent))
    features[0, 0, 1] = torch.inf
    assert jvp(sums, (weights,), (tangent,))[0].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_vmap_of_features(mode):
    pool, one, other = cases(mode)
    want = torch.stack([pool(one).sums, pool(other).sums])
    torch.testing.assert_close(vmap(lambda x: pool(x).sums)(torch.stack([one, other])), want)
    torch.testing.assert_close(vmap(lambda x: pool(x).sums, in_dims=2)(torch.stack([one, other], 2)), want)


@pytest.mark.parametrize("resample", MODES[:-1])
def test_vmap_of_labels(resample):
    _, features, _ = cases(resample)
    maps = torch.tensor([0, 1, 3, 255])[torch.randint(0, 4, (2, 2, 4, 5) if resample is None else (2, 2, 8, 9))]

    def pool(labels, x=features):
        return semshift.class_sums(x, labels, 4, resample=resample)

    def cube(x, labels):
        return (pool(labels, x).sums ** 3).sum()

    for name in ("sums", "mass"):
        want = torch.stack([getattr(pool(labels), name) for labels in maps])
        torch.testing.assert_close(vmap(lambda labels, name=name: getattr(pool(labels), name))(maps), want)
    per_map = vmap(grad(cube), in_dims=(None, 0))(features, maps)
    torch.testing.assert_close(per_map, torch.stack([grad(cube)(features, labels) for labels in maps]))
    maps[1, 1, 2, 2] = 7
    for run in (
        lambda: vmap(lambda x: pool(x).sums)(maps),
        lambda: jvp(lambda x: cube(x, maps[1]), (features,), (features,)),
    ):
        with refuses(ValueError, "labels", "[0, 4)", "7 (1 pixel)"):
            run()


@pytest.mark.parametrize("mode", [None, "nearest", "bilinear", "weighted"])
def test_compiled_transforms_equal_eager(mode):
    pool, features, tangent = cases(mode)
    transforms = {
        "jvp": lambda x: jvp(lambda y: pool(y).sums, (x,), (tangent,))[1],
        "grad": grad(lambda x: (pool(x).sums ** 3).sum()),
        "vmap": lambda x: vmap(lambda y: pool(y).sums)(torch.stack([x, x])),
    }
    for run in transforms.values():
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(features), run(features))


X = torch.linspace(-2, 3, 12).view(3, 4).double()
W = torch.linspace(0, 1, 12).view(3, 4).double()
DIFFERENTIABLE = {
    "weight of a loss": (lambda w: semshift.confusion_loss(X, weight=w), W + 0.5),
    "entropy_map": (semshift.entropy_map, X.softmax(1)),
    "means": (lambda x: semshift.ClassSums(x, torch.tensor([2, 0, 5])).means, X),
}


@pytest.mark.parametrize(("function", "at"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_what_is_not_linear(function, at):
    tangent = torch.randn_like(at)
    slope = (function(at + 1e-6 * tangent) - function(at - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(jvp(function, (at,), (tangent,))[1], slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(vmap(function)(torch.stack([at, at])), torch.stack([function(at)] * 2))


def test_checks_read_beneath_the_wrappers():
    """A wrong value in one map of several, as without vmap."""
    labels = torch.tensor([[[0, 1]], [[1, 3]]])
    keys = torch.rand(2, 1, 4)
    assert torch.equal(
        vmap(lambda ids, key: semshift.class_mix(ids, 4, keys=key))(labels, keys),
        torch.stack([semshift.class_mix(ids, 4, keys=key) for ids, key in zip(labels, keys)]),
    )
    mapped = vmap(lambda ids: semshift.remap_labels(ids, {0: 5, 1: 6, 3: 8}))(labels)
    assert mapped.flatten().tolist() == [5, 6, 6, 8]
    for wrong in (
        lambda ids: semshift.check_labels(ids, 3),
        lambda ids: semshift.class_mix(ids, 3, keys=keys[0, :, :3]),
        lambda ids: semshift.remap_labels(ids, {0: 5, 1: 6}),
        lambda ids: semshift.confusion_loss(X[0, :2], weight=ids[0] - 0.5),
        lambda ids: semshift.entropy_map(ids - 0.5),
        lambda ids: semshift.pseudo_labels(ids.log().log()[:, :, None].float()),
    ):
        with pytest.raises(ValueError, match="expected"):
            vmap(wrong)(labels)


def without_values(device):
    """Every call that has no need of values."""
    labels, image = torch.zeros(2, 8, 10, dtype=torch.int64, device=device), torch.randn(2, 3, 4, 5, device=device)
    logits, weight = torch.randn(3, 4, device=device, requires_grad=True), torch.rand(3, 4, device=device)
    masks = {"source_weight": weight, "target_weight": weight}
    with torch.device(device):
        bank, align = semshift.PrototypeBank(3, 4), semshift.SemanticAlignment(3, 4)
    pooled = semshift.class_sums(image, labels, 4)
    bank.update(pooled)
    yield from (semshift.class_sums(image, labels, 4, resample=mode).sums for mode in MODES[1:-1])
    yield semshift.weighted_class_sums(image, torch.rand(2, 4, 4, 5, device=device)).means
    yield from bank(pooled)
    yield from (semshift.class_mix(labels, 4), semshift.class_mix(labels, 4, keys=torch.rand(2, 4, device=device)))
    yield from semshift.pseudo_labels(image)
    yield semshift.entropy_map(image.softmax(1))
    yield from (semshift.remap_labels(labels, {0: 1}), semshift.remap_labels(labels, {0: 1}, default=3))
    yield semshift.resize_labels(labels, (3, 4), 4, resample="majority")
    yield semshift.class_shares(labels, (3, 4), 4, resample="area")
    yield semshift.discriminator_loss(logits, logits, **masks)
    yield semshift.confusion_loss(logits, weight=weight)
    yield semshift.class_discriminator_loss(logits, logits, source_classes=weight[:, :2], target_classes=weight[:, :2])
    yield semshift.class_confusion_loss(logits, classes=weight[:, :2], weight=weight[:, 0])
    yield semshift.r1_penalty(logits.square().sum(1), logits, weight=weight[:, 0])
    yield from semshift.domain_accuracy(logits, logits, **masks)
    yield semshift.prototype_distance(pooled.means, pooled.means, weight=pooled.present)
    yield semshift.prototype_contrast_loss(image, labels, torch.stack([pooled.means, bank.means]))
    yield align(image.clone().requires_grad_(), labels, image.clone().requires_grad_(), labels).confusion


def test_fake_tensors():
    with FakeTensorMode():
        for result in without_values("cpu"):
            assert isinstance(result, FakeTensor)
        labels = torch.zeros(1, 2, 3, dtype=torch.int64)
        with refuses(ValueError, "labels", [1, 2, 3]):
            semshift.check_labels(labels, 4)
        with refuses(ValueError, "table", "[7]"):
            semshift.remap_labels(labels, torch.arange(7))


def test_meta_tensors():
    for result in without_values("meta"):
        assert result.is_meta


@pytest.mark.parametrize("tracing_mode", ["fake", "symbolic"])
def test_make_fx(tracing_mode):
    labels, logits = torch.randint(0, 4, (2, 4, 5)), torch.randn(2, 4, 4, 5)

    def figures(labels, logits):
        pooled = semshift.class_sums(logits, labels, 4)
        mixed = semshift.class_mix(labels, 4, keys=logits[:, :, 0, 0])
        return pooled.means, mixed, semshift.entropy_map(logits.softmax(1)), semshift.pseudo_labels(logits).weight

    traced = make_fx(figures, tracing_mode=tracing_mode)(labels, logits)
    for found, want in zip(traced(labels, logits), figures(labels, logits)):
        assert torch.equal(found, want)

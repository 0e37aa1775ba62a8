"""The prototype contrast: against a loop over cells, absent classes, ignored cells, precision, and errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import semshift
from tests.errors import refuses
from tests.pooling_definition import Case, cases, shares

K, C = 4, 6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MODES = ["bilinear", "nearest", "majority", "area"]


def cosine(x, y):
    sizes = math.hypot(*x) * math.hypot(*y)
    return math.fsum(a * b for a, b in zip(x, y)) / sizes if sizes else 0.0


def cost(feature, label, domains, temperature):
    """Of one pixel, None where no domain has its class; `domains` are lists of rows."""
    rows = [(k, row) for rows in domains for k, row in enumerate(rows) if any(row)]
    logits = [cosine(feature, row) / temperature for _, row in rows]
    of_class = [z for (k, _), z in zip(rows, logits) if k == label]
    if not of_class:
        return None
    largest = max(logits)
    log_sum = largest + math.log(math.fsum(math.exp(z - largest) for z in logits))
    return math.fsum(log_sum - z for z in of_class) / len(of_class)


def definition(case, prototypes, temperature):
    """The mean over pixels, each of them shared out among cells as its mode says; in float64."""
    domains = (prototypes if prototypes.dim() == 3 else prototypes[None]).double().tolist()
    total = mass = 0.0
    for image, weights in zip(case.features.double(), shares(case), strict=True):
        cells = image.unsqueeze(-1).flatten(1).T.tolist()
        for (label, cell), weight in weights.items():
            if label < case.num_classes and (one := cost(cells[cell], label, domains, temperature)) is not None:
                total, mass = total + float(weight) * one, mass + float(weight)
    return total / mass if mass else 0.0


def bound(features, prototypes, temperature, eps, weights=0):
    """Bound of the rounding error in a mean of costs: relative errors, times the largest cost.

    A cosine is a sum of C products and two lengths, log-softmax a sum over all prototypes, pooling one over pixels; a
    resampled weight is itself some 8 roundings off for each of those it is made of.
    """
    rows, channels = math.prod(prototypes.shape[:-1]), prototypes.shape[-1]
    cells = features[:, :1].numel()
    largest = 2 / temperature + math.log(rows)
    return (3 * channels + 2 * rows + 2 * cells + 8 * weights + 24) * eps * largest


def drawn(seed=0, domains=2, size=(16, 20), dtype=torch.float64, ignored=0.2):
    """Features `[2, C, 4, 5]`, labels of a different size, and prototypes of all classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, C, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, K, (2, *size), generator=generator)
    labels[torch.rand(2, *size, generator=generator) < ignored] = 255
    prototypes = torch.randn(domains, K, C, generator=generator, dtype=torch.float64)
    return features.to(dtype), labels, prototypes


def loss_and_gradients(features, labels, prototypes, **options):
    leaves = features.detach().clone().requires_grad_(), prototypes.detach().clone().requires_grad_()
    loss = semshift.prototype_contrast_loss(leaves[0], labels, leaves[1], **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


# Values.


@st.composite
def contrasts(draw):
    """A case of pooling, and prototypes of 0 to 3 domains ([K, C] for 0) that may lack classes."""
    case = draw(cases(per_image=False))
    shape = (*[draw(st.integers(1, 3))] * draw(st.booleans()), case.num_classes, case.features.shape[1])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lacking = torch.rand(shape[:-1], generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    prototypes = torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(lacking[..., None], 0.0)
    return case, prototypes, draw(st.sampled_from([0.05, 0.1, 1, 3.0]))


@given(contrasts())
def test_it_is_its_definition(drawn):
    case, prototypes, temperature = drawn
    options = {name: value for name, value in case.options.items() if name != "per_image"}
    found = semshift.prototype_contrast_loss(case.features, case.labels, prototypes, temperature=temperature, **options)
    assert (found.shape, found.dtype) == ((), torch.float64)
    # A small class may be all that counts, of a mass of one sliver of a cell: hence the product of both sizes.
    many = case.features[:, :1].numel() * max(case.labels.numel(), 1)
    error = bound(case.features, prototypes, temperature, torch.finfo(torch.float64).eps, many)
    assert abs(found.item() - definition(case, prototypes, temperature)) <= error


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_is_the_loss_of_up_sampled_log_probabilities(align_corners):
    features, labels, prototypes = drawn(size=(17, 23))
    directions = F.normalize(features, dim=1), F.normalize(prototypes.flatten(0, 1), dim=1)
    log_probabilities = torch.einsum("bchw,kc->bkhw", *directions).div(0.1).log_softmax(1)
    maps = F.interpolate(log_probabilities, (17, 23), mode="bilinear", align_corners=align_corners)
    expected = sum(F.nll_loss(of_domain, labels, ignore_index=255) for of_domain in maps.split(K, 1)) / 2
    found = semshift.prototype_contrast_loss(features, labels, prototypes, align_corners=align_corners)
    error = bound(features, prototypes, 0.1, torch.finfo(torch.float64).eps, labels.numel())
    torch.testing.assert_close(found, expected, rtol=0, atol=error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bank_dtype", DTYPES)
def test_every_dtype(dtype, bank_dtype):
    """Computed in float32 at least: what half precision costs is the rounding of the input, and of the gradient."""
    features, labels, prototypes = drawn(dtype=dtype, size=(4, 5))
    prototypes = prototypes.to(bank_dtype)
    loss, to_features, to_prototypes = loss_and_gradients(features, labels, prototypes)
    wide = torch.float64 if torch.float64 in (dtype, bank_dtype) else torch.float32
    assert (loss.dtype, to_features.dtype, to_prototypes.dtype) == (wide, dtype, bank_dtype)
    exact = loss_and_gradients(features.double(), labels, prototypes.double())
    error = bound(features, prototypes, 0.1, torch.finfo(wide).eps)
    assert abs(loss - exact[0]) <= error
    for found, want in zip((to_features, to_prototypes), exact[1:]):
        # By the chain rule 1 / t, and both shares of a cosine's gradient, come on top.
        allowed = 4 * error / 0.1 * want.abs().max() + torch.finfo(found.dtype).eps * want.abs()
        assert ((found.double() - want).abs() <= allowed + torch.finfo(found.dtype).smallest_normal).all()


def test_lengths_of_features_and_prototypes_do_not_matter():
    features, labels, prototypes = drawn(dtype=torch.float32)
    want = semshift.prototype_contrast_loss(features, labels, prototypes.float())
    # Powers of two, so exact.
    for scale, other in ((2.0**30, 2.0**-20), (2.0**-30, 2.0**40)):
        assert torch.equal(semshift.prototype_contrast_loss(scale * features, labels, prototypes.float() * other), want)
    half = semshift.prototype_contrast_loss(torch.full((1, C, 2), 6e4).half(), torch.zeros(1, 2).long(), prototypes)
    one = semshift.prototype_contrast_loss(torch.ones(1, C, 2).half(), torch.zeros(1, 2).long(), prototypes)
    torch.testing.assert_close(half, one)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 3, 2, 2), (0, 3, 2, 2), (7, 3, 0)])
def test_any_dimensions_of_pixels(shape):
    """Features `[B, C]` are pixels too."""
    features, labels = torch.randn(shape[0], C, *shape[1:]), torch.randint(0, K, shape)
    prototypes = torch.randn(K, C)
    found = semshift.prototype_contrast_loss(features, labels, prototypes, resample=None)
    flat = semshift.prototype_contrast_loss(features.movedim(1, -1).reshape(-1, C), labels.flatten(), prototypes)
    torch.testing.assert_close(found, flat)


def test_domains():
    features, labels, prototypes = drawn()
    one = loss_and_gradients(features, labels, prototypes[0])
    assert all(map(torch.equal, one[:2], loss_and_gradients(features, labels, prototypes[:1])[:2]))
    torch.testing.assert_close(
        semshift.prototype_contrast_loss(features, labels, prototypes.flip(0)),
        semshift.prototype_contrast_loss(features, labels, prototypes),
    )
    # The same prototypes twice: every probability is half as large.
    torch.testing.assert_close(
        semshift.prototype_contrast_loss(features, labels, prototypes[:1].expand(2, -1, -1)), one[0] + math.log(2)
    )


@pytest.mark.parametrize("mode", MODES)
def test_absent_classes(mode):
    """Absent from one domain: the other decides. Absent from both: as if its pixels had no label."""
    features, labels, prototypes = drawn()
    prototypes[1, 1] = 0
    prototypes[:, 2] = 0
    loss, to_features, to_prototypes = loss_and_gradients(features, labels, prototypes, resample=mode)
    want = definition(Case(features, labels, K, {"ignore_index": 255, "resample": mode}), prototypes, 0.1)
    assert abs(loss.item() - want) <= bound(features, prototypes, 0.1, torch.finfo(torch.float64).eps, labels.numel())
    # An absent class stays absent: its row is a constant.
    assert (to_prototypes == 0).all(-1).tolist() == [[False, False, True, False], [False, True, True, False]]
    if mode == "majority":
        # There a pixel without a label has no say in which class a cell gets.
        return
    ignored = labels.where(labels != 2, 255)
    again = loss_and_gradients(features, ignored, prototypes, resample=mode)
    for found, want in zip((loss, to_features, to_prototypes), again):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    # Without the third class at all.
    kept = [0, 1, 3]
    renamed = semshift.remap_labels(ignored, {0: 0, 1: 1, 3: 2, 255: 255})
    torch.testing.assert_close(
        semshift.prototype_contrast_loss(features, renamed, prototypes[:, kept], resample=mode), loss
    )


@pytest.mark.parametrize("lacking", ["labels", "prototypes", "images", "classes in common"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_counts(lacking, mode):
    features, labels, prototypes = drawn()
    if lacking == "labels":
        labels.fill_(255)
    elif lacking == "prototypes":
        prototypes.zero_()
    elif lacking == "images":
        features, labels = features[:0], labels[:0]
    else:
        labels.fill_(2)
        prototypes[:, 2] = 0
    # No nan on the way either, which this mode refuses.
    with torch.autograd.set_detect_anomaly(True):
        loss, *gradients = loss_and_gradients(features, labels, prototypes, resample=mode)
    assert loss == 0
    assert not loss.signbit()
    assert all((gradient == 0).all() for gradient in gradients)


# Pixels without a class or a direction.


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("label", [255, 2])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_ignored_pixels_may_hold_anything(mode, label, value):
    """Those without a label, and those of a class without a prototype."""
    features, labels, prototypes = drawn(size=(4, 5) if mode is None else (16, 20))
    prototypes[:, 2] = 0
    # Bilinear weights reach the neighbouring cells.
    labels[:, : labels.shape[1] // 2] = label
    broken = features.clone()
    broken[:, 2, 0] = value
    for found, want in zip(
        loss_and_gradients(broken, labels, prototypes, resample=mode),
        loss_and_gradients(features, labels, prototypes, resample=mode),
    ):
        assert torch.equal(found, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("mode", [None, *MODES])
def test_what_is_not_finite_shows_where_it_counts(mode, value):
    features, labels, prototypes = drawn(size=(4, 5) if mode is None else (16, 20), ignored=0)
    features[1, 2, 3, 3] = value
    loss, *gradients = loss_and_gradients(features, labels, prototypes, resample=mode)
    assert loss.isnan()
    # So that a GradScaler skips the step.
    assert all(gradient.isnan().any() for gradient in gradients)


def test_one_channel_whose_square_is_not_finite():
    """Its length is, where torch takes the absolute value; the cosine would be 0."""
    features, labels = torch.tensor([[[1e30, 1.0]]]), torch.tensor([[0, 0]])
    prototypes = torch.tensor([[1.0], [-1.0]])
    assert semshift.prototype_contrast_loss(features, labels, prototypes).isnan()
    labels[0, 0] = 255
    assert semshift.prototype_contrast_loss(features, labels, prototypes).isfinite()


def test_features_of_zero_have_no_direction():
    """As a ReLU leaves them: uniform probabilities, and a gradient of 0 where 1 / |f| would be huge."""
    features, labels, prototypes = drawn(size=(4, 5), ignored=0)
    features[0, :, 0] = 0
    loss, gradient, _ = loss_and_gradients(features, labels, prototypes)
    assert (gradient[0, :, 0] == 0).all()
    assert (gradient[0, :, 1:] != 0).any(0).all()
    alone = semshift.prototype_contrast_loss(features[:1, :, :1], labels[:1, :1], prototypes)
    torch.testing.assert_close(alone, torch.tensor(math.log(2 * K), dtype=torch.float64))
    assert loss.isfinite()


# Precision.


def test_autocast_and_precision_switches_change_nothing():
    features, labels, prototypes = drawn(dtype=torch.float32)
    want = loss_and_gradients(features, labels, prototypes.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, loss_and_gradients(features, labels, prototypes.float()), want))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = loss_and_gradients(features, labels, prototypes.float())
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(found, want):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Errors.


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"features": torch.zeros(2)}, ValueError, ("features", "[2]")),
        ({"features": torch.zeros(2, C, 4, 5).long()}, TypeError, ("features", torch.int64)),
        ({"features": None}, TypeError, ("features", "NoneType")),
        ({"labels": torch.zeros(2, 4)}, TypeError, ("labels", torch.float32)),
        ({"labels": torch.zeros(3, 16, 20).long()}, ValueError, ("labels", [2, C, 4, 5], [3, 16, 20])),
        ({"labels": torch.zeros(2, 20, 16).long().repeat(1, 3, 1)}, ValueError, ("labels", [2, 60, 16], [2, C, 4, 5])),
        ({"labels": torch.full((2, 16, 20), K)}, ValueError, ("labels", f"[0, {K})", f"{K} (640 pixels)")),
        ({"prototypes": None}, TypeError, ("prototypes", "NoneType")),
        ({"prototypes": torch.zeros(K, C).long()}, TypeError, ("prototypes", torch.int64)),
        ({"prototypes": torch.zeros(C)}, ValueError, ("prototypes", f"[K, {C}]", f"[{C}]")),
        ({"prototypes": torch.zeros(2, K, C + 1)}, ValueError, ("prototypes", [2, K, C + 1], [2, C, 4, 5])),
        ({"prototypes": torch.zeros(1, 2, K, C)}, ValueError, ("prototypes", [1, 2, K, C])),
        ({"prototypes": torch.zeros(0, K, C)}, ValueError, ("prototypes", [0, K, C])),
        ({"prototypes": torch.zeros(0, C)}, ValueError, ("prototypes", [0, C])),
        ({"prototypes": torch.tensor([[math.nan] * C] * K)}, ValueError, ("prototypes", "finite", "nan")),
        ({"prototypes": torch.tensor([[1.0, -math.inf] * 3] * K)}, ValueError, ("prototypes", "finite", "inf")),
        ({"prototypes": torch.full((K, C), -(2.0**100))}, ValueError, ("prototypes", "squares", 2.0**100)),
        ({"prototypes": torch.zeros(K, C, device="meta")}, ValueError, ("prototypes", "features", "meta", "cpu")),
        ({"prototypes": torch.zeros(300, C)}, ValueError, ("ignore_index", 300)),
        ({"temperature": 0}, ValueError, ("temperature", 0)),
        ({"temperature": -0.1}, ValueError, ("temperature", -0.1)),
        ({"temperature": math.nan}, ValueError, ("temperature", "nan")),
        ({"temperature": math.inf}, ValueError, ("temperature", "inf")),
        ({"temperature": torch.tensor(0.1)}, TypeError, ("temperature", "tensor(0.1000)")),
        ({"ignore_index": 2.0}, TypeError, ("ignore_index", "2.0")),
        ({"resample": "bicubic"}, ValueError, ("resample", "'bicubic'")),
        ({"resample": None}, ValueError, ("resample", [4, 5], [2, 16, 20], [2, C, 4, 5])),
        ({"resample": "area", "align_corners": True}, ValueError, ("align_corners", "'area'")),
        ({"align_corners": 1}, TypeError, ("align_corners", 1)),
    ],
)
def test_what_is_refused(changed, error, says):
    features, labels, prototypes = drawn(dtype=torch.float32)
    arguments = {"features": features, "labels": labels, "prototypes": prototypes.float()} | changed
    with refuses(error, *says):
        semshift.prototype_contrast_loss(**arguments)

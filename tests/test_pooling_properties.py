"""The promises of class pooling, one by one, against the definition in rational numbers, on drawn cases."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

import semshift
from tests.errors import refuses
from tests.pooling_definition import (
    HARD,
    INTEGERS,
    NON_FINITE,
    SOFT,
    Case,
    axis,
    bound,
    cases,
    definition,
    laid_out,
    look_transposed,
    near,
    shares,
    slots,
)

pytestmark = pytest.mark.usefixtures("few_or_many")


@given(cases())
def test_equals_the_definition(case):
    pooled = case.pool()
    sums, mass = definition(case)
    near(pooled.sums, sums, bound(case))
    if case.options["resample"] == "area":
        near(pooled.mass, mass, bound(case, 1.0))
    else:
        near(pooled.mass, mass.long(), 0)
    divisor = mass[..., None].masked_fill(mass[..., None] == 0, 1)
    eps = torch.finfo(torch.float64).eps
    # The smallest mass is one pixel or one sliver of a cell, 1 / (H * W) of it.
    near(pooled.means, sums / divisor, max(100 * eps, 50 * 50 * bound(case, 100.0)))
    assert torch.equal(pooled.present, mass > 0)


@given(cases(), st.integers(-5, 5), st.integers(-5, 5))
def test_linear_in_the_features(case, a, b):
    other = case.features.flip(0) * case.features
    both = case.pool(a * case.features + b * other)
    apart = a * case.pool().sums + b * case.pool(other).sums
    near(both.sums, apart, bound(case, 10 * 13 * 13))
    assert torch.equal(both.mass, case.pool().mass)


def flat(case: Case) -> tuple[Tensor, Tensor]:
    """All pixels of the batch, each as an image of no extent: features `[N, C]`, labels `[N]`."""
    return case.features.movedim(1, -1).flatten(0, -2), case.labels.flatten()


def subset(case: Case, members: Tensor) -> semshift.ClassSums:
    if case.options["resample"] is None:
        features, labels = flat(case)
        return case.pool(features[members], labels[members])
    return case.pool(case.features[members], case.labels[members])


@given(cases(per_image=False), st.integers(1, 4), st.randoms(use_true_random=False))
def test_merging_parts_equals_pooling_the_whole(case, parts, random):
    """Pixels are dealt to parts as they come, images where labels are resampled; some parts may be empty."""
    count = flat(case)[1].numel() if case.options["resample"] is None else len(case.labels)
    dealt = [random.randrange(parts) for _ in range(count)]
    members = [torch.tensor([i for i, p in enumerate(dealt) if p == part], dtype=torch.int64) for part in range(parts)]
    random.shuffle(members)
    merged, whole = sum(subset(case, m) for m in members), case.pool()
    near(merged.sums, whole.sums, bound(case))
    near(merged.mass, whole.mass, bound(case, 1.0) if whole.mass.is_floating_point() else 0)


@given(cases(per_image=True))
def test_rows_of_images_add_up_to_the_batch(case):
    rows, batch = case.pool(), case.pool(per_image=False)
    near(rows.sums.sum(0), batch.sums, bound(case))
    near(rows.mass.sum(0), batch.mass, bound(case, 1.0) if batch.mass.is_floating_point() else 0)


@given(cases(modes=(None,), per_image=False), st.randoms(use_true_random=False))
def test_permuting_pixels_changes_nothing(case, random):
    features, labels = flat(case)
    order = torch.tensor(random.sample(range(len(labels)), len(labels)), dtype=torch.int64)
    shuffled, whole = case.pool(features[order], labels[order]), case.pool()
    assert torch.equal(shuffled.sums, whole.sums)
    assert torch.equal(shuffled.mass, whole.mass)


@given(cases(modes=(None, "nearest", *SOFT)), st.randoms(use_true_random=False))
def test_permuting_classes_permutes_rows(case, random):
    """Not so for majority, whose ties go to the lower id."""
    assume(case.options["ignore_index"] != 0)
    order = torch.tensor(random.sample(range(case.num_classes), case.num_classes))
    wide = case.labels.long()
    is_class = (wide >= 0) & (wide < case.num_classes)
    renamed = torch.where(is_class, order[wide.clamp(0, case.num_classes - 1)], wide).to(case.labels.dtype)
    after, before = case.pool(labels=renamed), case.pool()
    near(after.sums[..., order, :], before.sums, bound(case))
    near(after.mass[..., order], before.mass, bound(case, 1.0) if before.mass.is_floating_point() else 0)


@given(cases(per_image=True), st.lists(st.integers(-3, 3), min_size=3, max_size=3))
def test_means_lie_in_the_convex_hull(case, direction):
    """Seen along any direction, a mean lies between the extremes of the cells that the class touches."""
    along = torch.tensor(direction[: case.features.shape[1]], dtype=torch.float64)
    seen = torch.einsum("c,bc...->b...", along, case.features).flatten(1) if case.features.dim() > 2 else None
    assume(seen is not None)
    means, eps = case.pool().means @ along, torch.finfo(torch.float64).eps
    slack = 50 * bound(case, 3 * 3 * 13.0) + 32 * eps * 3 * 3 * 13
    for image, weights in enumerate(shares(case)):
        for k in range(case.num_classes):
            cells = [cell for (slot, cell), w in weights.items() if slot == k and w > 0]
            if cells:
                assert seen[image, cells].min() - slack <= means[image, k] <= seen[image, cells].max() + slack


@given(cases(), st.integers(-800, 800))
def test_a_constant_field_pools_to_the_constant(case, eighths):
    pooled = case.pool(torch.full_like(case.features, eighths / 8))
    want = torch.where(pooled.present[..., None], eighths / 8, torch.zeros_like(pooled.sums))
    near(pooled.means, want, 50 * bound(case, 100.0))


@given(cases(modes=HARD), st.sampled_from(NON_FINITE))
def test_ignored_pixels_have_no_effect_whatever_they_hold(case, value):
    poisoned = case.features.clone()
    for image, weights in enumerate(shares(case)):
        for (slot, cell), _ in weights.items():
            if slot == case.num_classes:
                poisoned[image].movedim(0, -1)[np.unravel_index(cell, poisoned.shape[2:])] = value
    poisoned.requires_grad_()
    pooled, clean = case.pool(poisoned), case.pool()
    assert torch.equal(pooled.sums, clean.sums)
    assert torch.equal(pooled.mass, clean.mass)
    assert torch.equal(pooled.means, clean.means)
    (grad,) = torch.autograd.grad(pooled.sums.sum(), poisoned)
    assert not grad[~poisoned.detach().isfinite()].any()


@given(cases(modes=SOFT), st.sampled_from(NON_FINITE))
def test_a_soft_cell_of_no_class_contributes_nothing_on_the_cpu(case, value):
    poisoned = case.features.clone()
    for image, weights in enumerate(shares(case)):
        touched = {cell for (slot, cell), w in weights.items() if slot < case.num_classes and w > 0}
        h, w = case.features.shape[2:]
        for cell in set(range(h * w)) - touched:
            poisoned[image, :, cell // w, cell % w] = value
    near(case.pool(poisoned).sums, case.pool().sums, bound(case))


@given(cases(modes=HARD, per_image=True), st.data(), st.sampled_from(NON_FINITE))
def test_a_non_finite_feature_reaches_its_own_class_alone(case, data, value):
    places = [
        (image, k, cell)
        for image, weights in enumerate(shares(case))
        for (k, cell), w in weights.items()
        if w > 0 and k < case.num_classes
    ]
    assume(places and case.features.shape[1])
    image, k, cell = data.draw(st.sampled_from(places))
    channel = data.draw(st.integers(0, case.features.shape[1] - 1))
    features = case.features.clone(memory_format=torch.contiguous_format)
    features.view(*features.shape[:2], -1)[image, channel, cell] = value
    want = case.pool().sums
    want[image, k, channel] = value
    near(case.pool(features).sums, want, 0)
    near(case.pool(features, per_image=False).sums, want.sum(0), 0)


@given(cases(), st.sampled_from((1.0, *NON_FINITE)))
def test_an_absent_class_gives_exact_zeros_and_zero_gradients(case, value):
    case = case._replace(num_classes=case.num_classes + 1)
    assume(case.options["ignore_index"] != case.num_classes - 1)
    if value != 1 and case.options["resample"] in SOFT:
        assume(False)
    features = (case.features * 0 + value).requires_grad_()
    pooled = case.pool(features)
    assert not pooled.present[..., -1].any()
    absent = ~pooled.present[..., None].expand_as(pooled.sums)
    assert torch.equal(pooled.means[absent], torch.zeros_like(pooled.means[absent]))
    (grad,) = torch.autograd.grad(pooled.means[absent].sum(), features)
    assert torch.equal(grad, torch.zeros_like(grad))
    (grad,) = torch.autograd.grad(case.pool(features).means.sum(), features)
    assert grad.isfinite().all()


@given(cases(), st.integers(0, 2**32 - 1))
def test_the_backward_is_the_adjoint(case, seed):
    """<pool(f), g> = <f, pool^T(g)>, and pool^T(g) gives each cell the rows of its classes by their weights."""
    features = case.features.clone().requires_grad_()
    sums = case.pool(features).sums
    rows = torch.randint(-9, 10, sums.shape, generator=torch.Generator().manual_seed(seed)).double()
    (spread,) = torch.autograd.grad(sums, features, rows)
    slack = bound(case, 9 * 13 * 3.0)
    near((sums * rows).sum().detach(), (case.features * spread).sum(), slack * max(1, sums.numel()))
    want = torch.zeros_like(case.features, memory_format=torch.contiguous_format)
    by_cell = want.unsqueeze(-1).flatten(2)
    for image, weights in enumerate(shares(case)):
        mine = rows[image] if case.options["per_image"] else rows
        for (slot, cell), w in weights.items():
            if slot < case.num_classes:
                by_cell[image, :, cell] += float(w) * mine[slot]
    near(spread, by_cell.view_as(want), slack)


sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))


@given(sizes, sizes, st.sampled_from(("nearest", "majority", *SOFT)))
def test_labels_that_look_transposed_are_refused(grid, size, resample):
    features, labels = torch.zeros(1, 2, *grid), torch.zeros(1, *size, dtype=torch.uint8)
    if look_transposed(grid, size):
        with refuses(ValueError, "labels", "features", [1, *size], [1, 2, *grid], "transposed"):
            semshift.class_sums(features, labels, 2, resample=resample)
    else:
        assert semshift.class_sums(features, labels, 2, resample=resample).present.tolist() == [True, False]


@given(sizes, sizes, st.booleans(), st.integers(0, 2**32 - 1))
def test_bilinear_equals_pooling_what_was_upsampled(grid, size, align_corners, seed):
    assume(not look_transposed(grid, size))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 3, *grid, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (2, *size), generator=generator)]
    case = Case(features, labels, 3, {"resample": "bilinear", "align_corners": align_corners})
    upsampled = interpolate(features, size, mode="bilinear", align_corners=align_corners)
    want = semshift.class_sums(upsampled, labels, 3)
    near(case.pool().sums, want.sums, bound(case))
    assert torch.equal(case.pool().mass, want.mass)


@given(sizes, sizes, st.integers(0, 2**32 - 1))
def test_area_equals_exact_overlap_at_any_ratio(grid, size, seed):
    assume(any(max(a, b) % min(a, b) for a, b in zip(grid, size)))
    labels = torch.tensor([0, 1, 255])[torch.randint(0, 3, (1, *size), generator=torch.Generator().manual_seed(seed))]
    want = torch.zeros(1, 2, *grid)
    rows, columns = (axis(pixels, cells, "area") for pixels, cells in zip(size, grid))
    for (y, i, a), (x, j, b) in itertools.product(rows, columns):
        if labels[0, y, x] != 255:
            # Fractions add up in integers of 1 / (H * W) of a cell, so nothing is lost before the division.
            want[0, labels[0, y, x], i, j] += float(a * b * size[0] * size[1])
    got = semshift.class_shares(labels, grid, 2, resample="area")
    # One rounding in float64 and one to float32.
    torch.testing.assert_close(got, want / (size[0] * size[1]), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@given(cases(modes=(None, *HARD, *SOFT)))
def test_label_dtypes_agree(case):
    assume(case.options["ignore_index"] not in (255, 300, -1))
    first = case.pool()
    for dtype in INTEGERS:
        other = case.pool(labels=case.labels.to(dtype))
        assert torch.equal(other.sums, first.sums)
        assert torch.equal(other.mass, first.mass)


@given(sizes, sizes, st.integers(0, 2**32 - 1))
def test_nearest_is_nearest_exact(grid, size, seed):
    """Where a cell's centre lies on the border of two pixels PyTorch's float arithmetic may fall either way."""
    assume(not any((2 * j + 1) * n % (2 * to) == 0 and n % to for n, to in zip(size, grid) for j in range(to)))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 200, (2, *size), generator=generator, dtype=torch.uint8)
    got = semshift.resize_labels(labels, grid, 200, resample="nearest")
    assert torch.equal(got, interpolate(labels[:, None], grid, mode="nearest-exact")[:, 0])
    assume(not look_transposed(grid, size))
    features = torch.randint(-9, 9, (2, 3, *grid), generator=generator).double()
    pooled = semshift.class_sums(features, labels, 200, resample="nearest")
    want = semshift.class_sums(features, got, 200)
    assert torch.equal(pooled.sums, want.sums)
    assert torch.equal(pooled.mass, want.mass)


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([(None, False), ("bilinear", False), ("bilinear", True)]),
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    sizes,
    st.integers(0, 2**32 - 1),
)
def test_every_precision_is_within_the_bound_of_any_order_of_summation(dtype, mode, size, grid, seed):
    resample, align_corners = mode
    assume(not (resample and look_transposed(grid, size)))
    generator = torch.Generator().manual_seed(seed)
    grid = grid if resample else size
    features = (torch.randn(1, 2, *grid, generator=generator, dtype=torch.float64) * 50).to(dtype)
    labels = torch.randint(0, 3, (1, *size), generator=generator)
    pooled = semshift.class_sums(features, labels, 3, resample=resample, align_corners=align_corners)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert pooled.sums.dtype == pooled.means.dtype == wide
    exact = features.double()
    if resample:
        # Weights are not negative, so up-sampling |x| gives the sum of |w x|.
        exact, of_absolutes = (
            interpolate(x, size, mode="bilinear", align_corners=align_corners) for x in (exact, exact.abs())
        )
    else:
        of_absolutes = exact.abs()
    chosen = one_hot(labels.flatten(), 3).double().mT
    error = (pooled.sums.double() - chosen @ exact[0].flatten(1).mT).abs()
    # As many terms as cells, and one rounding of each weight, whose coordinates are off by some float64 roundings.
    terms = math.prod(grid) + 1
    slack = 8 * torch.finfo(torch.float64).eps * sum(grid) * labels.numel() * features.double().abs().max()
    assert (error <= terms * torch.finfo(wide).eps * (chosen @ of_absolutes[0].flatten(1).mT) + slack).all()


@pytest.mark.parametrize(("dtype", "stalls_at"), [(torch.float16, 2048), (torch.bfloat16, 256)])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_half_accumulator_would_stall(dtype, stalls_at, layout):
    """Adding ones in half precision comes to a halt far outside the bound; pooling them is exact."""
    pixels = 5000
    features = laid_out(torch.ones(1, 2, pixels, dtype=dtype), layout)
    labels = torch.zeros(1, pixels, dtype=torch.uint8)
    total = torch.zeros((), dtype=dtype)
    for one in features[0, 0]:
        total = total + one
    assert total == stalls_at
    assert pixels - total > pixels * torch.finfo(torch.float32).eps * pixels
    assert (semshift.class_sums(features, labels, 1).sums == pixels).all()
    assert (semshift.weighted_class_sums(features, torch.ones_like(features)).sums == pixels).all()


@given(cases(modes=(None,)), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_weights_equal_the_definition_and_are_linear_on_both_sides(case, rows, seed):
    """Integers over 8, so that every product and sum is exact."""
    features, per_image = case.features, case.options["per_image"]
    shape = (features.shape[0], rows, *features.shape[2:])
    weights = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)).double() / 8
    got = semshift.weighted_class_sums(features, weights, per_image=per_image)
    sums = torch.zeros(features.shape[0], rows, features.shape[1], dtype=torch.float64)
    by_cell, weight_of = features.unsqueeze(-1).flatten(2), weights.unsqueeze(-1).flatten(2)
    for image in range(len(features)):
        for cell in range(by_cell.shape[2]):
            for k in range(rows):
                sums[image, k] += weight_of[image, k, cell] * by_cell[image, :, cell]
    mass = weight_of.sum(2)
    assert torch.equal(got.sums, sums if per_image else sums.sum(0))
    assert torch.equal(got.mass, mass if per_image else mass.sum(0))
    more = semshift.weighted_class_sums(3 * features, 2 * weights, per_image=per_image)
    assert torch.equal(more.sums, 6 * got.sums)
    assert torch.equal(more.mass, 2 * got.mass)


@given(cases(modes=(None,)))
def test_one_hot_weights_equal_labels(case):
    labels = torch.tensor(slots(case), dtype=torch.int64).view(case.labels.shape)
    weights = one_hot(labels, case.num_classes + 1)[..., : case.num_classes].movedim(-1, 1).double()
    got = semshift.weighted_class_sums(case.features, weights, per_image=case.options["per_image"])
    assert torch.equal(got.sums, case.pool().sums)
    assert torch.equal(got.mass.long(), case.pool().mass)

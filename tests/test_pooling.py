"""Pooling as an op: gradients, compilation, layouts, and what bad arguments say."""

import pytest
import torch
from torch.nn.functional import interpolate

import semshift
from semshift import _pooling_ops
from tests.errors import refuses

# While compiling on Python 3.13.0, torch warns that it is slow there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
    # What opcheck of torch 2.14 does itself.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.usefixtures("few_or_many"),
]

RESAMPLES = [None, "nearest", "majority", "area", "bilinear"]


def batch(resample=None, dtype=torch.float64, ignore_index=255):
    """Features `[2, 3, 4, 5]` with labels of three of four classes and ignored pixels."""
    size = (7, 9) if resample else (4, 5)
    features = torch.randn(2, 3, 4, 5, dtype=dtype)
    return features, torch.tensor([0, 1, 3, ignore_index])[torch.randint(0, 4, (2, *size))]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_gradients(resample, per_image):
    features, labels = batch(resample)
    features = features[:, :2, :2, :3].requires_grad_()
    labels = labels if resample else labels[:, :2, :3]

    def means(f):
        return semshift.class_sums(f, labels, 4, resample=resample, per_image=per_image).means

    assert torch.autograd.gradcheck(means, features)
    # Pooling is linear: a cube makes the second derivative something else than zero.
    assert torch.autograd.gradgradcheck(lambda f: means(f) ** 3, features)


@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_of_weights(per_image):
    features, weights = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 2, 4, dtype=torch.float64)
    inputs = (features.requires_grad_(), weights.requires_grad_())

    def means(f, w):
        return semshift.weighted_class_sums(f, w, per_image=per_image).means

    assert torch.autograd.gradcheck(means, inputs)
    assert torch.autograd.gradgradcheck(means, inputs)


@pytest.mark.parametrize(("per_image", "layout"), [(True, torch.contiguous_format), (False, torch.channels_last)])
def test_hard_sums_pass_opcheck(per_image, layout):
    features, labels = batch(dtype=torch.float32)
    leaf = features.to(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.semshift.class_sums.default, (leaf, labels, 4, 255, per_image))


def test_soft_sums_pass_opcheck():
    """Mixed dtypes, which meet in the wider one."""
    features = torch.randn(2, 3, 20, requires_grad=True)
    weights = torch.rand(2, 4, 20, dtype=torch.float16, requires_grad=True)
    torch.library.opcheck(torch.ops.semshift.soft_class_sums.default, (features, weights))


@pytest.mark.parametrize(
    ("resample", "layout", "dynamic"),
    [
        *((resample, torch.contiguous_format, False) for resample in RESAMPLES),
        (None, torch.channels_last, False),
        ("bilinear", torch.contiguous_format, True),
    ],
)
def test_compiled_equals_eager(resample, layout, dynamic):
    """Backward included; the sums come in and go out of the graph as the value that they are."""

    def pool(features, labels, before):
        pooled = semshift.class_sums(features, labels, 4, resample=resample)
        merged = sum([before, pooled, pooled])
        return merged, merged.means

    torch._dynamo.reset()
    features, labels = batch(resample, torch.float32)
    features = features.to(memory_format=layout)
    before = semshift.class_sums(torch.randn(2, 3, 4, 5), torch.full((2, 4, 5), 2), 4, resample=None)
    before = semshift.ClassSums(before.sums, before.mass.float() if resample == "area" else before.mass)
    results = []
    for run in (pool, torch.compile(pool, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        leaf = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        merged, means = run(leaf, labels, before)
        assert isinstance(merged, semshift.ClassSums)
        (means**2).sum().backward()
        results.append((merged.sums, merged.mass, means, leaf.grad))
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)
        assert eager.dtype == compiled.dtype


def test_compiled_weights_equal_eager():
    torch._dynamo.reset()
    results = []
    for run in (
        semshift.weighted_class_sums,
        torch.compile(semshift.weighted_class_sums, fullgraph=True, backend="aot_eager"),
    ):
        torch.manual_seed(1)
        features = torch.randn(2, 3, 4, 5, requires_grad=True)
        weights = torch.rand(2, 4, 4, 5, dtype=torch.float16, requires_grad=True)
        pooled = run(features, weights, per_image=True)
        (pooled.means**2).sum().backward()
        results.append((pooled.sums, pooled.mass, features.grad, weights.grad))
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)
        assert eager.dtype == compiled.dtype


@pytest.mark.parametrize("resample", RESAMPLES)
def test_autocast_does_not_reach_the_sums(resample):
    features, labels = batch(resample, torch.float32)
    features.requires_grad_()
    plain = semshift.class_sums(features, labels, 4, resample=resample)
    (gradient,) = torch.autograd.grad((plain.means**2).sum(), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = semshift.class_sums(features, labels, 4, resample=resample)
        (under_autocast,) = torch.autograd.grad((pooled.means**2).sum(), features)
    assert pooled.sums.dtype == torch.float32
    assert torch.equal(pooled.sums, plain.sums)
    assert torch.equal(under_autocast, gradient)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_layouts_agree_and_gradients_follow_dtype_and_layout(resample, dtype, per_image, monkeypatch):
    # What a copy costs does not matter for few features, whose gradients may lie as they come.
    monkeypatch.setattr(_pooling_ops, "_SMALL", 0)
    features, labels = batch(resample, dtype)
    features = features.mul(8).round()
    rows = torch.randint(-9, 10, (2, 4, 3) if per_image else (4, 3)).float()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = features.detach().to(memory_format=layout).requires_grad_()
        sums = semshift.class_sums(leaf, labels, 4, resample=resample, per_image=per_image).sums
        (gradient,) = torch.autograd.grad(sums, leaf, rows)
        assert gradient.dtype == dtype
        if resample in (None, "nearest", "majority"):
            assert gradient.is_contiguous(memory_format=layout)
            results.append((sums, gradient))
    for first, second in zip(*results[:2]) if results else ():
        # Integers all of them, so that every sum is exact.
        assert torch.equal(first, second)


def test_the_paper_at_its_own_size():
    """From 512 x 1024 labels to 65 x 129 features, float32, both corners, against up-sampling in float32."""
    features = torch.randn(1, 3, 65, 129)
    labels = torch.randint(0, 19, (1, 512, 1024), dtype=torch.uint8)
    chosen = torch.nn.functional.one_hot(labels.flatten().long(), 19).double().mT
    for align_corners in (False, True):
        pooled = semshift.class_sums(features, labels, 19, resample="bilinear", align_corners=align_corners)
        upsampled = interpolate(features, (512, 1024), mode="bilinear", align_corners=align_corners)
        want = chosen @ upsampled[0].double().flatten(1).mT
        # Along an axis a float32 coordinate is off by at most 4 eps * its size, and the value by that times the slope.
        slope = 2 * features.abs().max().double()
        eps = torch.finfo(torch.float32).eps
        per_pixel = 4 * eps * (65 + 129) * slope
        in_sums = 65 * 129 * eps * (chosen @ upsampled[0].double().abs().flatten(1).mT)
        assert ((pooled.sums - want).abs() <= pooled.mass[:, None] * per_pixel + in_sums).all()
        assert torch.equal(pooled.mass, chosen.sum(1).long())


@pytest.mark.parametrize("resample", RESAMPLES)
def test_equal_sizes_give_the_same_sums_in_every_mode(resample):
    features, labels = batch(dtype=torch.float16)
    pooled, want = semshift.class_sums(features, labels, 4, resample=resample), semshift.class_sums(features, labels, 4)
    assert torch.equal(pooled.sums, want.sums)
    assert torch.equal(pooled.mass, want.mass.float() if resample == "area" else want.mass)
    assert pooled.mass.dtype == (torch.float32 if resample == "area" else torch.int64)


def test_shares_are_the_weights_of_both_soft_modes():
    features, _ = batch()
    labels = torch.randint(0, 2, (2, 7, 9))
    for resample in ("area", "bilinear"):
        weights = semshift.class_shares(labels, (4, 5), 3, resample=resample)
        by_hand = semshift.weighted_class_sums(features, weights)
        pooled = semshift.class_sums(features, labels, 3, resample=resample)
        # Shares are rounded to float32 at the public door.
        torch.testing.assert_close(pooled.sums, by_hand.sums, rtol=0, atol=7 * 9 * 2**-23 * features.abs().max() * 20)


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("labels_at", [(0, 1, 1), (1, 0, 0)])
def test_labels_out_of_range_are_named_on_the_cpu(resample, labels_at):
    """Wherever they lie: at (0, 1, 1) no cell's centre comes by."""
    labels = torch.zeros(2, 8, 8, dtype=torch.int16)
    labels[labels_at] = 4
    labels[1, 7, 6:] = -1
    grid = (2, 2) if resample else (8, 8)
    wrong = ("labels", "[0, 4)", "-1 (2 pixels)", "4 (1 pixel)")
    with refuses(ValueError, *wrong, "ignore_index", 255):
        semshift.class_sums(torch.zeros(2, 3, *grid), labels, 4, resample=resample)
    with refuses(ValueError, *wrong):
        semshift.class_sums(torch.zeros(2, 3, *grid), labels, 4, resample=resample, ignore_index=None)


def test_ignore_index_may_be_a_class_and_never_wraps():
    features = torch.tensor([[[1.0, 2.0, 4.0]]])
    pooled = semshift.class_sums(features, torch.tensor([[0, 1, 1]]), 2, ignore_index=0)
    assert pooled.mass.tolist() == [0, 2]
    assert pooled.means.flatten().tolist() == [0, 3]
    with refuses(ValueError, "labels", "[0, 2)", "ignore_index", -1, "255 (1 pixel)"):
        semshift.class_sums(features, torch.tensor([[0, 255, 1]], dtype=torch.uint8), 2, ignore_index=-1)
    pooled = semshift.class_sums(features, torch.tensor([[0, 255, 1]], dtype=torch.uint8), 300, ignore_index=None)
    assert pooled.mass.nonzero().flatten().tolist() == [0, 1, 255]


def test_meta_tensors_give_shapes_alone():
    """Shapes are known without values, as tracing and the estimation of memory need."""
    for per_image, rows in ((False, (4,)), (True, (2, 4))):
        for resample, mass in zip(RESAMPLES, (torch.int64, torch.int64, torch.int64, torch.float32, torch.int64)):
            features, labels = (x.to("meta") for x in batch(resample, torch.float16))
            pooled = semshift.class_sums(features, labels, 4, resample=resample, per_image=per_image)
            assert (pooled.sums.shape, pooled.sums.dtype) == ((*rows, 3), torch.float32)
            assert (pooled.mass.shape, pooled.mass.dtype) == (rows, mass)


F, L = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("features", "labels", "options", "error", "says"),
    [
        ([[1.0]], L, {}, TypeError, ("features", "list")),
        (F.long(), L, {}, TypeError, ("features", "float16", "bfloat16", "float32", "float64", torch.int64)),
        (F[0, 0, 0], L, {}, ValueError, ("features", "[B, C, *S]", [5])),
        (F, None, {}, TypeError, ("labels", "NoneType")),
        (F, L.float(), {}, TypeError, ("labels", torch.float32)),
        (F, L.bool(), {}, TypeError, ("labels", torch.bool)),
        (F, L, {"num_classes": 0}, ValueError, ("num_classes", 1, 0)),
        (F, L, {"num_classes": -3}, ValueError, ("num_classes", 1, -3)),
        (F, L, {"num_classes": 4.0}, TypeError, ("num_classes", 4.0)),
        (F, L, {"ignore_index": "255"}, TypeError, ("ignore_index", "'255'")),
        (F, L, {"num_classes": 256}, ValueError, ("ignore_index", None, 255, "num_classes", 256)),
        (F, L[0], {}, ValueError, ("labels", [2, 3, 4, 5], [4, 5])),
        (F, L[:1], {}, ValueError, ("labels", [2, 3, 4, 5], [1, 4, 5])),
        (F[..., 0], L, {}, ValueError, ("labels", [2, 3, 4], [2, 4, 5])),
        (F, L.to("meta"), {}, ValueError, ("features", "labels", "cpu", "meta")),
        (F, L, {"resample": "cubic"}, ValueError, ("resample", *map(repr, RESAMPLES), "'cubic'")),
        (F, L, {"align_corners": None}, TypeError, ("align_corners", None)),
        (F, L, {"per_image": 1}, TypeError, ("per_image", 1)),
        # Where sizes agree, too.
        (F, L, {"resample": "area", "align_corners": True}, ValueError, ("align_corners", "'bilinear'", "'area'")),
        (F, L, {"resample": None, "align_corners": True}, ValueError, ("align_corners", "'bilinear'", None)),
        (F, L[:, 1:], {"resample": None}, ValueError, ("labels", "resample", None, [4, 5], [2, 3, 5], [2, 3, 4, 5])),
        (F[..., 0], L[:, 1:, 0], {}, ValueError, ("features", "labels", "resample", [2, 3, 4], [2, 3])),
        (F, L[:, :0], {}, ValueError, ("features", "labels", [2, 3, 4, 5], [2, 0, 5])),
        (F[..., :0], L, {"resample": "majority"}, ValueError, ("features", "labels", [2, 3, 4, 0], [2, 4, 5])),
    ],
)
def test_bad_arguments(features, labels, options, error, says):
    with refuses(error, *says):
        semshift.class_sums(features, labels, **{"num_classes": 4, **options})


@pytest.mark.parametrize("resample", RESAMPLES[1:])
@pytest.mark.parametrize(
    ("grid", "size", "refused"),
    [
        ((4, 8), (8, 4), True),
        ((8, 4), (4, 8), True),
        ((33, 65), (1024, 512), True),
        ((33, 65), (512, 1024), False),
        # At exactly two times they pass, a pixel further they do not.
        ((4, 4), (6, 12), False),
        ((4, 4), (12, 6), False),
        ((4, 4), (6, 13), True),
        ((4, 4), (13, 6), True),
        ((5, 7), (70, 49), False),
        ((5, 7), (71, 49), True),
        ((7, 5), (49, 70), False),
        ((7, 5), (49, 71), True),
        # Below four cells a side a grid has no aspect ratio.
        ((3, 9), (9, 3), False),
        ((9, 3), (3, 9), False),
        ((1, 1), (1, 50), False),
        ((4, 100), (100, 4), True),
    ],
)
def test_transposed_labels(grid, size, refused, resample):
    features, labels = torch.ones(1, 1, *grid), torch.zeros(1, *size, dtype=torch.uint8)
    if refused:
        with refuses(ValueError, "labels", "features", [1, *size], [1, 1, *grid], "transposed"):
            semshift.class_sums(features, labels, 1, resample=resample)
    else:
        assert semshift.class_sums(features, labels, 1, resample=resample).means.item() == pytest.approx(1, rel=1e-6)


def test_bilinear_is_the_default():
    features, labels = batch("bilinear")
    for more in ({}, {"per_image": True}, {"align_corners": True}):
        found = semshift.class_sums(features, labels, 4, **more)
        want = semshift.class_sums(features, labels, 4, resample="bilinear", **more)
        assert torch.equal(found.sums, want.sums)
        assert torch.equal(found.mass, want.mass)
    assert not torch.equal(found.sums, semshift.class_sums(features, labels, 4, resample="area").sums)


@pytest.mark.parametrize(
    ("features", "weights", "options", "error", "says"),
    [
        (1.0, F, {}, TypeError, ("features", "float")),
        (F, [1.0], {}, TypeError, ("weights", "list")),
        (F, L, {}, TypeError, ("weights", "float16", "bfloat16", "float32", "float64", torch.int64)),
        (F, F[0], {}, ValueError, ("weights", "features", [3, 4, 5], [2, 3, 4, 5])),
        (F, F[..., 1:], {}, ValueError, ("weights", "features", [2, 3, 4, 4], [2, 3, 4, 5])),
        (F, F.to("meta"), {}, ValueError, ("weights", "features", "cpu", "meta")),
        (F, F, {"per_image": "yes"}, TypeError, ("per_image", "'yes'")),
    ],
)
def test_bad_weights(features, weights, options, error, says):
    with refuses(error, *says):
        semshift.weighted_class_sums(features, weights, **options)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_empty_and_flat_shapes(shape, dtype):
    features = torch.ones(shape, dtype=dtype, requires_grad=True)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.uint8)
    weights = torch.ones((shape[0], 4, *shape[2:]), dtype=dtype)
    for pooled in (semshift.class_sums(features, labels, 4), semshift.weighted_class_sums(features, weights)):
        assert pooled.sums.shape == (4, shape[1])
        assert (pooled.sums[0] == labels.numel()).all()
        assert pooled.mass[0] == labels.numel()
        (gradient,) = torch.autograd.grad(pooled.means.sum(), features)
        assert gradient.shape == shape


@pytest.mark.parametrize("ignore_index", [None, 255, 300])
@pytest.mark.parametrize("resample", RESAMPLES)
def test_an_unchecked_label_out_of_range_takes_no_part(resample, ignore_index, monkeypatch):
    """On CUDA label values are not checked."""
    features, labels = batch(resample)
    # Integers, since features that are not on the CPU are added up in another order.
    features = features.mul(8).round()
    want = semshift.class_sums(features, labels, 4, resample=resample)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    for dtype, stranger in ((torch.uint8, 77), (torch.int8, -1), (torch.int64, 2**40)):
        unchecked = labels.masked_fill(labels == 255, stranger).to(dtype)
        leaf = features.clone().requires_grad_()
        got = semshift.class_sums(leaf, unchecked, 4, resample=resample, ignore_index=ignore_index)
        assert torch.equal(got.sums, want.sums)
        assert torch.equal(got.mass, want.mass)
        got.means.sum().backward()
        assert leaf.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="because it needs a CUDA device")
@pytest.mark.parametrize("resample", RESAMPLES)
def test_on_cuda_a_label_out_of_range_takes_no_part(resample):
    features, labels = batch(resample)
    unchecked = torch.where(labels == 255, 77, labels).to(torch.uint8)
    want = semshift.class_sums(features, labels, 4, resample=resample)
    got = semshift.class_sums(features.cuda(), unchecked.cuda(), 4, resample=resample, ignore_index=None)
    torch.testing.assert_close(got.sums.cpu(), want.sums, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.mass.cpu(), want.mass, rtol=0, atol=1e-12)

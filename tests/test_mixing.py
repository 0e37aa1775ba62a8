"""Pseudo-labels against a loop, and ClassMix: half of the classes, whole, never an ignored pixel, by chance alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import semshift
from tests.errors import refuses

# While compiling on Python 3.13.0, torch warns that it is slow there.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Pseudo-labels.


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(2, 4), st.integers(0, 4), st.integers(0, 4)),
    threshold=st.sampled_from([0.0, 0.5, 0.968, 1.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pseudo_labels_against_a_loop(shape, threshold, dtype, seed):
    logits = (4 * torch.randn(shape, generator=seeded(seed))).to(dtype).requires_grad_()
    found = semshift.pseudo_labels(logits, threshold=threshold)
    images, num_classes, height, width = shape
    assert found.labels.shape == (images, height, width)
    assert found.labels.dtype == torch.int64
    assert found.weight.shape == (images,)
    assert found.weight.dtype == torch.float32
    assert not found.weight.requires_grad
    assert found.sure.shape == (images, height, width)
    assert found.sure.dtype == torch.bool
    for image, labels, weight, here in zip(*(x.tolist() for x in (logits, found.labels, found.weight, found.sure))):
        sure, unsure = 0, 0
        for y in range(height):
            for x in range(width):
                pixel = [image[k][y][x] for k in range(num_classes)]
                assert pixel[labels[y][x]] == max(pixel)
                probability = 1 / math.fsum(math.exp(value - max(pixel)) for value in pixel)
                # A logit of at most 40 is rounded in float32, its exponential too: within 64 units either may be true.
                near = abs(probability - threshold) <= 64 * torch.finfo(torch.float32).eps
                sure += probability > threshold and not near
                unsure += near
                assert near or here[y][x] == (probability > threshold)
        pixels = max(height * width, 1)
        assert torch.tensor(sure / pixels).item() <= weight <= torch.tensor((sure + unsure) / pixels).item()
        # The weight is exactly the share of the pixels that are sure.
        assert weight == torch.tensor(sum(map(sum, here)) / pixels).item()


def test_ties_and_certainty():
    found = semshift.pseudo_labels(torch.zeros(1, 2, 3), threshold=0.5)
    assert found.weight.tolist() == [0.0]
    assert not found.sure.any()
    assert semshift.pseudo_labels(torch.zeros(1, 2, 3), threshold=0.4).weight.tolist() == [1.0]
    # A class may be ruled out.
    assert semshift.pseudo_labels(torch.tensor([[[-math.inf], [0.0]]])).labels.tolist() == [[1]]
    flat = semshift.pseudo_labels(torch.tensor([[9.0, 0.0], [0.0, 0.1]]))
    assert (flat.labels.tolist(), flat.sure.tolist(), flat.weight.tolist()) == ([0, 1], [True, False], [1.0, 0.0])


def test_the_labels_of_which_the_network_is_sure():
    """Two columns are sure, of classes 0 and 1; the third is not."""
    pseudo = semshift.pseudo_labels(torch.tensor([[[[9.0, 0.0, 0.1]], [[0.0, 9.0, 0.0]]]]))
    assert torch.where(pseudo.sure, pseudo.labels, 255).tolist() == [[[0, 1, 255]]]
    assert pseudo.weight.tolist() == [pytest.approx(2 / 3)]


def test_a_binary_model_gives_two_logits():
    z = torch.tensor([[[-9.0, 0.5, 9.0]]])
    with refuses(ValueError, "logits", "binary", 0, "z", [1, 1, 3]):
        semshift.pseudo_labels(z)
    # What the message tells to do is the model's own probability.
    found = semshift.pseudo_labels(torch.cat([torch.zeros_like(z), z], 1), threshold=0.6)
    assert found.labels.tolist() == [[0, 1, 1]]
    assert found.sure.tolist() == [[True, z[0, 0, 1].sigmoid().item() > 0.6, True]]


def test_softmax_is_wide():
    # A probability of 0.9693. In bfloat16 it and the threshold are both 0.96875.
    logits = torch.tensor([[[3.453125], [0.0]]], dtype=torch.bfloat16)
    assert semshift.pseudo_labels(logits).weight.item() == 1.0
    share = torch.tensor([[[math.log(0.9679 / 0.0321)], [0.0]]])
    assert semshift.pseudo_labels(share).weight.item() == 0.0
    assert semshift.pseudo_labels(share, threshold=0.9678).weight.item() == 1.0


def test_nothing_is_known_where_values_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = semshift.pseudo_labels(torch.tensor([[[math.nan, 9.0], [0.0, 0.0]]]))
    assert found.weight.tolist() == [0.5]
    assert found.sure.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("logits", "options", "error", "says"),
    [
        ([1.0], {}, TypeError, ("logits", "list")),
        (torch.ones(1, 2, dtype=torch.int64), {}, TypeError, ("logits", torch.int64)),
        (torch.ones(2), {}, ValueError, ("logits", "[B, K, *S]", 2, [2])),
        (torch.ones(2, 0, 3), {}, ValueError, ("logits", "[B, K, *S]", 2, [2, 0, 3])),
        (torch.ones(1, 2), {"threshold": "0.9"}, TypeError, ("threshold", "'0.9'")),
        (torch.ones(1, 2), {"threshold": True}, TypeError, ("threshold", True)),
        (torch.ones(1, 2), {"threshold": 1.5}, ValueError, ("threshold", "[0, 1]", 1.5)),
        (torch.ones(1, 2), {"threshold": math.nan}, ValueError, ("threshold", "[0, 1]", "nan")),
        (torch.tensor([[[math.nan, math.inf, 0.0], [0.0] * 3]]), {}, ValueError, ("logits", "nan", "inf", "2 pixels")),
        (torch.full((1, 2, 1), -math.inf), {}, ValueError, ("logits", "-inf", "1 pixel")),
    ],
)
def test_errors_of_pseudo_labels(logits, options, error, says):
    with refuses(error, *says):
        semshift.pseudo_labels(logits, **options)


# ClassMix.


@st.composite
def label_maps(draw):
    num_classes = draw(st.integers(1, 6))
    ignore_index = draw(st.sampled_from([255, -1, 0, 300, None]))
    shape = [draw(st.integers(0, 4)), *draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))]
    generator = seeded(draw(st.integers(0, 2**32 - 1)))
    labels = torch.randint(0, num_classes + (ignore_index is not None), shape, generator=generator)
    labels[labels == num_classes] = ignore_index or 0
    fitting = [dtype for dtype in DTYPES if torch.equal(labels.to(dtype).long(), labels)]
    return labels.to(draw(st.sampled_from(fitting))), num_classes, ignore_index


@given(label_maps(), st.integers(0, 2**32 - 1))
def test_half_of_the_classes_whole(case, seed):
    labels, num_classes, ignore_index = case
    mask = semshift.class_mix(labels, num_classes, ignore_index=ignore_index, generator=seeded(seed))
    assert mask.shape == labels.shape
    assert mask.dtype == torch.bool
    for image, chosen in zip(labels.flatten(1).tolist(), mask.flatten(1).tolist()):
        classes = {value for value in image if value != ignore_index}
        over = {value for value, here in zip(image, chosen) if here}
        assert over <= classes
        assert len(over) == (len(classes) + 1) // 2
        assert chosen == [value in over for value in image]


@given(label_maps(), st.integers(0, 2**32 - 1))
def test_it_is_a_function_of_the_generator_and_of_which_classes_there_are(case, seed):
    labels, num_classes, ignore_index = case
    mask = semshift.class_mix(labels, num_classes, ignore_index=ignore_index, generator=seeded(seed))
    again = semshift.class_mix(labels, num_classes, ignore_index=ignore_index, generator=seeded(seed))
    assert torch.equal(mask, again)
    # Where the pixels lie, and in which dtype, has no say.
    flat = labels.flatten(1)
    order = torch.randperm(flat.shape[1], generator=seeded(seed))
    moved = semshift.class_mix(flat[:, order].long(), num_classes, ignore_index=ignore_index, generator=seeded(seed))
    assert torch.equal(moved, mask.flatten(1)[:, order])


def test_every_class_is_chosen_as_often():
    images, classes, others = 4000, (0, 2, 3, 5, 6), 8
    labels = torch.tensor([classes]).repeat(images, 1)
    mask = semshift.class_mix(labels, others, generator=seeded(0))
    share = 3 / 5
    # A binomial share, within 5 deviations; and each of the 10 sets of three as often.
    assert ((mask.double().mean(0) - share).abs() < 5 * (share * (1 - share) / images) ** 0.5).all()
    sets, counts = mask.unique(dim=0, return_counts=True)
    assert len(sets) == 10
    assert ((counts / images - 0.1).abs() < 5 * (0.1 * 0.9 / images) ** 0.5).all()
    # An image does not look at the one before it: the chance that they agree is that of two independent draws.
    agree = (mask[1:] == mask[:-1]).all(1).double().mean()
    assert abs(agree - 0.1) < 5 * (0.1 * 0.9 / images) ** 0.5


def test_without_a_generator_it_is_pytorchs_own():
    labels = torch.arange(7).expand(5, 7)
    torch.manual_seed(3)
    first, second = semshift.class_mix(labels, 7), semshift.class_mix(labels, 7)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(semshift.class_mix(labels, 7), first)
    assert torch.equal(semshift.class_mix(labels, 7, generator=seeded(3)), first)


def test_equal_keys_choose_no_class_too_many(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, 0.5))
    assert semshift.class_mix(torch.tensor([[0, 1, 2, 3, 4]]), 5).sum() == 3


def test_the_mixture_of_the_docstring():
    labels = torch.tensor([[[0, 0, 255], [1, 1, 1]]], dtype=torch.uint8)
    pseudo = semshift.pseudo_labels(torch.tensor([[[[9.0, 0.0, 0.0]] * 2, [[0.0, 0.0, 9.0]] * 2]]))
    mask = semshift.class_mix(labels, 2, generator=seeded(0))
    images = torch.where(mask[:, None], torch.ones(1, 3, 2, 3), torch.zeros(1, 3, 2, 3))
    mixed = torch.where(mask, labels, pseudo.labels)
    weight = torch.where(mask, 1.0, pseudo.weight[:, None, None])
    assert torch.equal(images[:, 0].bool(), mask)
    assert torch.equal(mixed[mask], labels[mask].long())
    assert mixed[~mask].max() <= 1
    assert torch.equal(weight == 1, mask)
    assert weight[~mask].unique().tolist() == pseudo.weight.tolist() == [pytest.approx(2 / 3)]


def test_keys_choose_what_their_generator_does_also_in_a_full_graph():
    labels = torch.tensor([[[0, 1, 2], [255, 3, 3]]] * 4)
    expected = semshift.class_mix(labels, 5, generator=seeded(5))
    keys = torch.rand(4, 5, generator=seeded(5))
    compiled = torch.compile(semshift.class_mix, fullgraph=True, backend="aot_eager")
    for mix in (semshift.class_mix, compiled):
        assert torch.equal(mix(labels, 5, keys=keys), expected)
        # Only their order counts, and the lower half is chosen.
        assert torch.equal(mix(labels, 5, keys=1000 * keys), expected)
    rising = torch.arange(5.0).expand(4, 5)
    assert labels[semshift.class_mix(labels, 5, keys=rising)].unique().tolist() == [0, 1]


def test_compiled_equals_eager():
    labels = torch.tensor([[[0, 1, 2], [255, 3, 3]]] * 4)
    logits = torch.randn(4, 5, 2, 3)

    def mix(labels, logits):
        return semshift.class_mix(labels, 5), *semshift.pseudo_labels(logits, threshold=0.5)

    results = []
    for run in (mix, torch.compile(mix, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(5)
        results.append(run(labels, logits))
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)


def test_where_labels_are_not_looked_at_a_wrong_one_is_never_chosen(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    labels = torch.tensor([[0, 7, -3, 255, 254, 1]])
    for seed in range(8):
        mask = semshift.class_mix(labels, 2, generator=seeded(seed))
        assert mask.tolist() in ([[True] + [False] * 5], [[False] * 5 + [True]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="because there is no GPU")
def test_a_generator_on_the_cpu_chooses_alike_on_cuda_without_waiting():
    labels = torch.randint(0, 9, (3, 8, 8), generator=seeded(1))
    labels[:, 0] = 255
    expected = semshift.class_mix(labels, 9, generator=seeded(2))
    on_gpu, logits = labels.cuda(), torch.randn(3, 9, 8, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = semshift.class_mix(on_gpu, 9, generator=seeded(2))
        own = semshift.class_mix(on_gpu, 9)
        semshift.pseudo_labels(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mask.cpu(), expected)
    assert not own[:, 0].any()


ONE = torch.tensor([[0]])


@pytest.mark.parametrize(
    ("labels", "num_classes", "options", "error", "says"),
    [
        (torch.tensor([0]), 2, {}, ValueError, ("labels", "[B, *S]", [1])),
        (torch.ones(1, 2), 2, {}, TypeError, ("labels", torch.float32)),
        (torch.tensor([[0, 2, 2]]), 2, {}, ValueError, ("labels", "[0, 2)", "ignore_index", 255, "2 (2 pixels)")),
        (ONE, 0, {}, ValueError, ("num_classes", 1, 0)),
        (ONE, 300, {}, ValueError, ("ignore_index", None, 255, "num_classes", 300)),
        (ONE, 2, {"generator": 3}, TypeError, ("generator", "int")),
        (ONE, 2, {"keys": 3}, TypeError, ("keys", "int")),
        (ONE, 2, {"keys": torch.zeros(1, 2).long()}, TypeError, ("keys", torch.int64)),
        (ONE, 2, {"keys": torch.zeros(1, 3)}, ValueError, ("keys", [1, 2], [1, 3])),
        (ONE, 2, {"keys": torch.zeros(1, 2), "generator": seeded(0)}, ValueError, ("keys", "generator")),
        (ONE, 2, {"keys": torch.tensor([[0.5, torch.inf]])}, ValueError, ("keys", "inf")),
        (ONE, 2, {"keys": torch.tensor([[torch.nan, 0.5]])}, ValueError, ("keys", "nan")),
    ],
)
def test_errors_of_class_mix(labels, num_classes, options, error, says):
    with refuses(error, *says):
        semshift.class_mix(labels, num_classes, **options)

"""Pseudo-labels against a loop, and ClassMix: half of the classes, whole, never an ignored pixel, by chance alone."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semshift.mixing import class_mix, pseudo_labels

# Compiling on Python 3.13.0 itself, torch warns of its own slowness there.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Pseudo-labels.


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 4), st.integers(0, 4)),
    threshold=st.sampled_from([0.0, 0.5, 0.968, 1.0]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_pseudo_labels_against_a_loop(shape, threshold, dtype, seed):
    logits = (4 * torch.randn(shape, generator=seeded(seed))).to(dtype).requires_grad_()
    found = pseudo_labels(logits, threshold=threshold)
    images, num_classes, height, width = shape
    assert found.labels.shape == (images, height, width)
    assert found.labels.dtype == torch.int64
    assert found.weight.shape == (images,)
    assert found.weight.dtype == torch.float32
    assert not found.weight.requires_grad
    for image, labels, weight in zip(logits.tolist(), found.labels.tolist(), found.weight.tolist()):
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
        pixels = max(height * width, 1)
        assert torch.tensor(sure / pixels).item() <= weight <= torch.tensor((sure + unsure) / pixels).item()


def test_ties_and_certainty():
    found = pseudo_labels(torch.zeros(1, 2, 3), threshold=0.5)
    assert found.weight.tolist() == [0.0]
    assert pseudo_labels(torch.zeros(1, 2, 3), threshold=0.4).weight.tolist() == [1.0]
    # A class may be ruled out, and a network of one class is sure.
    assert pseudo_labels(torch.tensor([[[-math.inf], [0.0]]])).labels.tolist() == [[1]]
    assert pseudo_labels(torch.zeros(2, 1, 2)).weight.tolist() == [1.0, 1.0]
    assert pseudo_labels(torch.tensor([[9.0, 0.0]])).labels.tolist() == [0]


def test_softmax_is_wide():
    # A probability of 0.9693. In bfloat16 it and the threshold are both 0.96875.
    logits = torch.tensor([[[3.453125], [0.0]]], dtype=torch.bfloat16)
    assert pseudo_labels(logits).weight.item() == 1.0
    share = torch.tensor([[[math.log(0.9679 / 0.0321)], [0.0]]])
    assert pseudo_labels(share).weight.item() == 0.0
    assert pseudo_labels(share, threshold=0.9678).weight.item() == 1.0


def test_nothing_is_known_where_values_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = pseudo_labels(torch.tensor([[[math.nan, 9.0], [0.0, 0.0]]]))
    assert found.weight.tolist() == [0.5]


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "expected logits to be a tensor, got list"),
        (torch.ones(1, 2, dtype=torch.int64), {}, TypeError, "expected logits to be floating point, got torch.int64"),
        (torch.ones(2), {}, ValueError, "expected logits [B, K, *S] with K of at least 1, got [2]"),
        (torch.ones(2, 0, 3), {}, ValueError, "expected logits [B, K, *S] with K of at least 1, got [2, 0, 3]"),
        (torch.ones(1, 2), {"threshold": "0.9"}, TypeError, "expected threshold to be a number, got '0.9'"),
        (torch.ones(1, 2), {"threshold": True}, TypeError, "expected threshold to be a number, got True"),
        (torch.ones(1, 2), {"threshold": 1.5}, ValueError, "expected threshold in [0, 1], got 1.5"),
        (torch.ones(1, 2), {"threshold": math.nan}, ValueError, "expected threshold in [0, 1], got nan"),
        (
            torch.tensor([[[math.nan, math.inf, 0.0], [0.0, 0.0, 0.0]]]),
            {},
            ValueError,
            "expected logits of which there is a softmax, got nan, inf or only -inf at 2 pixels",
        ),
        (
            torch.full((1, 2, 1), -math.inf),
            {},
            ValueError,
            "expected logits of which there is a softmax, got nan, inf or only -inf at 1 pixel",
        ),
    ],
)
def test_errors_of_pseudo_labels(logits, options, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        pseudo_labels(logits, **options)


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
    mask = class_mix(labels, num_classes, ignore_index=ignore_index, generator=seeded(seed))
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
    mask = class_mix(labels, num_classes, ignore_index=ignore_index, generator=seeded(seed))
    again = class_mix(labels, num_classes, ignore_index=ignore_index, generator=seeded(seed))
    assert torch.equal(mask, again)
    # Where the pixels lie, and in which dtype, has no say.
    flat = labels.flatten(1)
    order = torch.randperm(flat.shape[1], generator=seeded(seed))
    moved = class_mix(flat[:, order].long(), num_classes, ignore_index=ignore_index, generator=seeded(seed))
    assert torch.equal(moved, mask.flatten(1)[:, order])


def test_every_class_is_chosen_as_often():
    images, classes, others = 4000, (0, 2, 3, 5, 6), 8
    labels = torch.tensor([classes]).repeat(images, 1)
    mask = class_mix(labels, others, generator=seeded(0))
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
    first, second = class_mix(labels, 7), class_mix(labels, 7)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(class_mix(labels, 7), first)
    assert torch.equal(class_mix(labels, 7, generator=seeded(3)), first)


def test_equal_keys_choose_no_class_too_many(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, 0.5))
    assert class_mix(torch.tensor([[0, 1, 2, 3, 4]]), 5).sum() == 3


def test_the_mixture_of_the_docstring():
    labels = torch.tensor([[[0, 0, 255], [1, 1, 1]]], dtype=torch.uint8)
    pseudo = pseudo_labels(torch.tensor([[[[9.0, 0.0, 0.0]] * 2, [[0.0, 0.0, 9.0]] * 2]]))
    mask = class_mix(labels, 2, generator=seeded(0))
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
    expected = class_mix(labels, 5, generator=seeded(5))
    keys = torch.rand(4, 5, generator=seeded(5))
    compiled = torch.compile(class_mix, fullgraph=True, backend="aot_eager")
    for mix in (class_mix, compiled):
        assert torch.equal(mix(labels, 5, keys=keys), expected)
        # Only their order counts, and the lower half is chosen.
        assert torch.equal(mix(labels, 5, keys=1000 * keys), expected)
    rising = torch.arange(5.0).expand(4, 5)
    assert labels[class_mix(labels, 5, keys=rising)].unique().tolist() == [0, 1]


def test_compiled_equals_eager():
    labels = torch.tensor([[[0, 1, 2], [255, 3, 3]]] * 4)
    logits = torch.randn(4, 5, 2, 3)

    def mix(labels, logits):
        return class_mix(labels, 5), *pseudo_labels(logits, threshold=0.5)

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
        mask = class_mix(labels, 2, generator=seeded(seed))
        assert mask.tolist() in ([[True] + [False] * 5], [[False] * 5 + [True]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="because there is no GPU")
def test_a_generator_on_the_cpu_chooses_alike_on_cuda_without_waiting():
    labels = torch.randint(0, 9, (3, 8, 8), generator=seeded(1))
    labels[:, 0] = 255
    expected = class_mix(labels, 9, generator=seeded(2))
    on_gpu, logits = labels.cuda(), torch.randn(3, 9, 8, 8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = class_mix(on_gpu, 9, generator=seeded(2))
        own = class_mix(on_gpu, 9)
        pseudo_labels(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mask.cpu(), expected)
    assert not own[:, 0].any()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.tensor([0]), 2), {}, ValueError, "expected labels [B, *S], got [1]"),
        (
            (torch.ones(1, 2), 2),
            {},
            TypeError,
            "expected labels of dtype uint8, int8, int16, int32 or int64, got torch.float32",
        ),
        (
            (torch.tensor([[0, 2, 2]]), 2),
            {},
            ValueError,
            "expected labels in [0, 2) or ignore_index 255, got 2 (2 pixels)",
        ),
        ((torch.tensor([[0]]), 0), {}, ValueError, "expected num_classes to be at least 1, got 0"),
        (
            (torch.tensor([[0]]), 2),
            {"generator": 3},
            TypeError,
            "expected generator to be a torch.Generator or None, got int",
        ),
        ((torch.tensor([[0]]), 2), {"keys": 3}, TypeError, "expected keys to be a tensor, got int"),
        (
            (torch.tensor([[0]]), 2),
            {"keys": torch.zeros(1, 2, dtype=torch.int64)},
            TypeError,
            "expected keys to be floating point, got torch.int64",
        ),
        (
            (torch.tensor([[0]]), 2),
            {"keys": torch.zeros(1, 3)},
            ValueError,
            "expected keys [B, K] [1, 2], got [1, 3]",
        ),
        (
            (torch.tensor([[0]]), 2),
            {"keys": torch.zeros(1, 2), "generator": seeded(0)},
            ValueError,
            "expected generator or keys, got both",
        ),
        (
            (torch.tensor([[0]]), 2),
            {"keys": torch.tensor([[0.5, torch.inf]])},
            ValueError,
            "expected keys to be finite, got inf",
        ),
        (
            (torch.tensor([[0]]), 2),
            {"keys": torch.tensor([[torch.nan, 0.5]])},
            ValueError,
            "expected keys to be finite, got nan",
        ),
        (
            (torch.tensor([[0]]), 300),
            {},
            ValueError,
            "expected an explicit ignore_index (None, or an id that is no class) with more than 255 classes, "
            "got 255 with num_classes 300",
        ),
    ],
)
def test_errors_of_class_mix(arguments, options, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        class_mix(*arguments, **options)

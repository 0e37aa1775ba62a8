"""The ways of pooling on the CPU: each gives the definition, reads features as they lie, and keeps float32 sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import semshift
from semshift import _pooling_ops
from tests.pooling_definition import NON_FINITE, cases, definition, laid_out, near

pytestmark = pytest.mark.usefixtures("few_or_many")

# Limits that make the CPU use each of its algorithms for the small features drawn here.
WAYS = {
    "small": {},
    "bags": {"_SMALL": 0},
    "by pixel": {"_SMALL": 0, "_NARROW": -1},
    "by channel": {"_SMALL": 0},
    "by channel, many classes": {"_SMALL": 0, "_TURNED": 0},
}


@pytest.mark.parametrize("way", WAYS)
@given(cases(modes=(None,)), st.sampled_from((0.5, *NON_FINITE)), st.integers(0, 2**32 - 1))
def test_every_way_gives_the_definition(way, case, value, seed):
    """In float32 sums of so few eighths are exact as well; a value that is not finite stays with its class."""
    features = case.features.float()
    features = laid_out(features, "channels-last") if way in ("bags", "by pixel") and features.dim() > 2 else features
    want, _ = definition(case)
    generator = torch.Generator().manual_seed(seed)
    if features.numel():
        image, channel, *cell = (int(torch.randint(0, n, (), generator=generator)) for n in features.shape)
        row = [
            case.num_classes if v == case.options["ignore_index"] else v for v in case.labels[image].flatten().tolist()
        ]
        slot = row[int(np.ravel_multi_index(cell, features.shape[2:])) if cell else 0]
        before = features[image, channel][tuple(cell)].item()
        features[image, channel][tuple(cell)] = value
        if slot < case.num_classes:
            place = (image, slot, channel) if case.options["per_image"] else (slot, channel)
            want[place] += value - before
    with pytest.MonkeyPatch.context() as patch:
        for name, number in WAYS[way].items():
            patch.setattr(_pooling_ops, name, number)
        pooled = case.pool(features)
    near(pooled.sums, want.float(), 0)
    assert torch.equal(pooled.mass, case.pool().mass)


def test_half_features_wider_than_a_block():
    """More pixels than are widened at once, in either layout; small integers, so that sums are exact."""
    features = torch.randint(-8, 9, (2, 300, 40, 50)).half()
    labels = torch.randint(0, 3, (2, 40, 50))
    want = torch.stack([features.float().movedim(1, -1)[labels == k].sum(0) for k in range(3)])
    assert torch.equal(semshift.class_sums(features, labels, 3).sums, want)
    assert torch.equal(semshift.class_sums(features.to(memory_format=torch.channels_last), labels, 3).sums, want)


@pytest.mark.parametrize("num_classes", [255, 256, 257, 300])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_about_as_many_classes_as_a_byte_holds(num_classes, layout):
    """Keys in a byte must not wrap, those of several images included."""
    features = torch.randint(-8, 9, (3, 2, 20, 30)).float().to(memory_format=layout)
    labels = torch.randint(0, num_classes, (3, 20, 30))
    labels[:, 0] = -1
    pooled = semshift.class_sums(features, labels, num_classes, ignore_index=-1, per_image=True)
    want = torch.zeros(3, num_classes, 2)
    for image, pixel_labels in enumerate(labels[:, 1:].tolist()):
        for y, line in enumerate(pixel_labels, 1):
            for x, label in enumerate(line):
                want[image, label] += features[image, :, y, x]
    assert torch.equal(pooled.sums, want)
    assert torch.equal(semshift.class_sums(features, labels, num_classes, ignore_index=-1).sums, want.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_are_read_as_they_lie(layout, dtype):
    """A copy of the features would take 32 or 64 MB; all that pooling allocates is labels, sums and small blocks."""
    features = torch.zeros(1, 256, 256, 256, dtype=dtype).to(memory_format=layout)
    labels = torch.zeros(1, 256, 256, dtype=torch.uint8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        semshift.class_sums(features, labels, 2)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < features.numel() * 4 / 8


@pytest.mark.parametrize("transposed", [False, True])
def test_many_vectors_without_extent(transposed):
    """Features `[B, C]`, such as tokens, in numbers beyond those that are simply copied."""
    features = torch.randint(-8, 9, (500, 40)).float()
    labels = torch.randint(0, 7, (500,), dtype=torch.uint8)
    want = torch.stack([features[labels == k].sum(0) for k in range(7)])
    features = features.T.contiguous().T if transposed else features
    assert torch.equal(semshift.class_sums(features, labels, 7).sums, want)
    assert torch.equal(semshift.class_sums(features, labels, 7, per_image=True).sums.sum(0), want)

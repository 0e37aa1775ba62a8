"""Consequences of shapes: the memory layout of features, and the division of the work into programs."""

import itertools

import torch

from semshift import _planes


def test_planes_merge_what_lies_together():
    features = torch.empty(2, 3, 4, 5)
    assert _planes.plane_of(features, False) == (2, 20, 20, 60, 0, 1, 20)
    # The pixels of all images follow each other.
    last = features.to(memory_format=torch.channels_last)
    assert _planes.plane_of(last, False) == (1, 40, 40, 0, 0, 3, 1)
    assert _planes.plane_of(last, True) == (2, 20, 20, 60, 0, 3, 1)
    crop = torch.empty(2, 3, 6, 7)[:, :, 1:5, 1:6]
    plane = _planes.plane_of(crop, True)
    assert plane == (2, 20, 5, 126, 7, 1, 42)
    assert not plane.flat
    assert _planes.plane_of(torch.empty(2, 3, 4, 5, 6)[:, :, ::2, ::2, ::2], False) is None


def test_programs_fill_the_device():
    spans = _planes._spans
    assert spans(4, 264, 1000) == 66
    # One span for each would leave a quarter of the device idle, and 6 a few programs for the end.
    assert spans(192, 264, 1000) == 4
    assert spans(48, 264, 1000) == 5
    # Columns enough, or pixels for no more than one.
    assert spans(1000, 264, 1000) == spans(4, 264, 1) == 1


def test_channels_need_no_mask_only_where_they_fill_all_tiles():
    """Else a program would read behind the features, which memcheck alone would see."""
    for channels, size in itertools.product((16, 19, 64, 65, 128, 512), ((8, 8), (5, 13))):
        plane = _planes.plane_of(torch.empty(2, channels, *size), False)
        *_, sizes = _planes.plan(plane, channels, 19, False, False, 4, torch.float32, torch.device("cpu"))
        assert sizes["EVEN"] == (sizes["tiles"] * sizes["BLOCK_C"] == channels)

"""Harnesses of the ops on labels: drawn shapes, dtypes, strides, values and options, mostly wrong ones."""

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import semshift
from semshift import _pooling_ops

__all__ = ["documented", "fuzz_class_shares", "fuzz_class_sums", "fuzz_resize_labels"]

EXTENTS = st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13])
SHAPES = st.lists(EXTENTS, max_size=4).map(tuple)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
OTHERS = [torch.bool, torch.complex64]
WEIRD: list[Any] = [None, True, 1.5, "3", (), [2], torch.tensor(3), torch.tensor([1.0]), float("nan"), np.int64(2)]
COUNTS = st.integers(1, 6) | st.sampled_from([-(2**70), -1, 0, 19, 255, 256, 300, *WEIRD])
IGNORED = st.sampled_from([255, 255, None, -1, 0, 3, 254, 300, 2**40, 2**63, -(2**70), *WEIRD])
FLAGS = st.booleans()
BOOLS = st.sampled_from([True, False] * 9 + WEIRD)


def documented(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """The result of a call, or None where our own code raises one of these errors."""
    try:
        return call()
    except errors as error:
        frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        if not frame.f_globals["__name__"].startswith(("semshift", "examples.")):
            raise AssertionError(f"an error that is not ours: {type(error).__name__}: {error}") from error
        return None


@st.composite
def label_maps(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """Labels, mostly such that a few classes explain them; any strides."""
    dtype = draw(st.sampled_from(INTEGERS * 3 + FLOATS[2:3] + OTHERS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    labels = torch.randint(0, draw(st.sampled_from([1, 2, 4, 4, 20, 127])), shape, generator=generator)
    odd = draw(st.sampled_from([255, 255, 255, -1, 3, 256, 2**31, -(2**63), 2**63 - 1]))
    labels = torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0, 0.3, 1])), odd, labels)
    return strided(draw, labels.to(dtype))


def strided(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    layout = draw(st.sampled_from(["plain", "plain", "channels-last", "doubled", "expanded", "turned"]))
    if tensor.dim() < 2 or layout == "plain":
        return tensor
    if layout == "channels-last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "doubled":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor) if tensor.shape[0] else tensor
    return tensor.flip(-1).contiguous().flip(-1).mT


def fuzz_class_sums(data: st.DataObject) -> None:
    """`class_sums`, its means and its backward."""
    draw = data.draw
    shape = draw(SHAPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(shape, generator=generator)
    poison = draw(st.sampled_from([0.0, 0.0, float("inf"), float("nan"), 1e38]))
    features = torch.where(torch.rand(shape, generator=generator) < 0.1, poison, features)
    features = strided(draw, features.to(draw(st.sampled_from(FLOATS * 2 + INTEGERS[-1:] + OTHERS))))
    if draw(FLAGS) and features.is_floating_point():
        features = features.detach().requires_grad_()
    fitting = (shape[0], *shape[2:]) if len(shape) > 1 else shape
    other = (shape[0], *draw(st.tuples(EXTENTS, EXTENTS))) if shape else shape
    labels = draw(label_maps(draw(st.sampled_from([fitting, fitting, other]) | SHAPES)))
    arguments = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "ignore_index": IGNORED,
                "resample": st.sampled_from([None, "nearest", "majority", "area", "bilinear", "bicubic", 3]),
                "align_corners": BOOLS,
                "per_image": BOOLS,
            },
        )
    )
    given_features = draw(st.sampled_from([features] * 9 + WEIRD[:4]))
    num_classes = draw(COUNTS)
    small = _pooling_ops._SMALL
    # So that small features go the ways of large ones too.
    _pooling_ops._SMALL = draw(st.sampled_from([0, small]))
    try:
        result = documented(
            lambda: semshift.class_sums(given_features, labels, num_classes, **arguments), TypeError, ValueError
        )
        if result is None:
            return
        rows = ((shape[0],) if arguments.get("per_image") else ()) + (num_classes,)
        assert result.sums.shape == (*rows, shape[1])
        assert result.mass.shape == rows
        assert (result.mass >= 0).all()
        assert result.mass.sum() <= max(labels.numel(), features[:, :1].numel())
        assert not result.means[~result.present].any()
        if features.requires_grad:
            result.means.sum().backward()
            assert features.grad is not None
            assert features.grad.shape == features.shape
    finally:
        _pooling_ops._SMALL = small


SIZES = st.tuples(EXTENTS, EXTENTS) | st.sampled_from(
    [(), (3,), (1, 2, 3), (-1, 2), (2.0, 2), (True, 2), ("2", 2), (np.int64(2), 3), None, 3, [2, 3], torch.Size([2, 2])]
)


def fuzz_resize_labels(data: st.DataObject) -> None:
    """`resize_labels`."""
    draw = data.draw
    labels = draw(label_maps(draw(st.tuples(EXTENTS, EXTENTS, EXTENTS) | SHAPES)))
    arguments: dict[str, Any] = {
        "resample": draw(st.sampled_from(["nearest", "majority", "majority", "bilinear", None]))
    }
    if draw(FLAGS):
        arguments["ignore_index"] = draw(IGNORED)
    if draw(FLAGS):
        arguments["min_share"] = draw(st.floats(-0.5, 1.5) | st.sampled_from([float("nan"), 1, None, "0.5"]))
    size, num_classes = draw(SIZES), draw(COUNTS)
    given_labels = draw(st.sampled_from([labels] * 9 + WEIRD[:4]))
    result = documented(
        lambda: semshift.resize_labels(given_labels, size, num_classes, **arguments), TypeError, ValueError
    )
    if result is None:
        return
    assert result.shape == (labels.shape[0], *size)
    assert result.dtype == labels.dtype
    wide = result.long()
    inside = (wide >= 0) & (wide < num_classes)
    ignore_index = arguments.get("ignore_index", 255)
    assert (inside if ignore_index is None else inside | (wide == ignore_index)).all()


def fuzz_class_shares(data: st.DataObject) -> None:
    """`class_shares`."""
    draw = data.draw
    labels = draw(label_maps(draw(st.tuples(EXTENTS, EXTENTS, EXTENTS) | SHAPES)))
    arguments: dict[str, Any] = {"resample": draw(st.sampled_from(["area", "bilinear", "bilinear", "nearest", None]))}
    if draw(FLAGS):
        arguments["ignore_index"] = draw(IGNORED)
    if draw(FLAGS):
        arguments["align_corners"] = draw(BOOLS)
    size, num_classes = draw(SIZES), draw(COUNTS)
    given_labels = draw(st.sampled_from([labels] * 9 + WEIRD[:4]))
    result = documented(
        lambda: semshift.class_shares(given_labels, size, num_classes, **arguments), TypeError, ValueError
    )
    if result is None:
        return
    assert result.shape == (labels.shape[0], num_classes, *size)
    assert result.dtype == torch.float32
    assert (result >= 0).all()
    if 0 in size:
        return
    total = result.double().sum((1, 2, 3))
    # Shares of cells, or pixels: no more than there are.
    most = size[0] * size[1] if arguments["resample"] == "area" else labels.shape[1] * labels.shape[2]
    assert (total <= most * (1 + 2**-20)).all()

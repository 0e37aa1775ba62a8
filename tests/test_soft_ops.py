"""Precision of sums: float32 at least, whatever torch's switches for float32 products say, and which these are."""

import contextlib

import pytest
import torch
from torch import backends

import semshift
from semshift import _soft_ops

NEWER = hasattr(backends.mkldnn, "matmul")
newer = pytest.mark.skipif(not NEWER, reason="torch 2.9 brought the newer switches")


@contextlib.contextmanager
def switched(*settings):
    """Set attributes or, by None, torch's older switch; what torch is left with is what it began with."""
    try:
        for owner, name, value in settings:
            if owner is None:
                torch.set_float32_matmul_precision(value)
            else:
                setattr(owner, name, value)
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        if NEWER:
            for owner in (backends, backends.cuda.matmul, backends.mkldnn.matmul):
                owner.fp32_precision = "none"


def of_newer(owner, value):
    return pytest.param([(owner, "fp32_precision", value)], marks=newer)


OLD = [(None, "", "medium")]
SWITCHES = [
    pytest.param(OLD, id="old medium"),
    pytest.param([(None, "", "high")], id="old high"),
    pytest.param([(backends.cuda.matmul, "allow_tf32", True)], id="allow_tf32"),
    of_newer(backends, "bf16"),
    of_newer(backends, "tf32"),
    of_newer(backends.cuda.matmul, "tf32"),
    of_newer(getattr(backends.mkldnn, "matmul", None), "bf16"),
    of_newer(backends.mkldnn, "tf32"),
    pytest.param([*OLD, (backends.cuda.matmul, "fp32_precision", "ieee")], marks=newer, id="old, then new"),
    pytest.param([(backends, "fp32_precision", "tf32"), *OLD], marks=newer, id="new, then old"),
]


def getters():
    """The result of torch's own getters, including an error."""
    found = []
    for owner, name in [
        (backends, "fp32_precision"),
        (backends.cuda.matmul, "fp32_precision"),
        (backends.cuda.matmul, "allow_tf32"),
        (getattr(backends.mkldnn, "matmul", None), "fp32_precision"),
    ]:
        try:
            found.append(getattr(owner, name, None))
        except RuntimeError as error:
            found.append(str(error))
    try:
        found.append(torch.get_float32_matmul_precision())
    except RuntimeError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("settings", SWITCHES)
def test_sums_are_float32_under_every_precision_switch(settings):
    """Against float64, forward and backward; without resampling, too, where a product could serve."""
    labels = torch.randint(0, 4, (2, 48, 64))
    features = torch.randn(2, 64, 24, 32)
    rows = torch.randn(4, 64)
    with switched(*settings):
        before = getters()
        for labelled, resample in ((labels, "bilinear"), (labels, "area"), (labels[:, ::2, ::2].contiguous(), None)):
            results = []
            for dtype in (torch.float32, torch.float64):
                leaf = features.to(dtype).requires_grad_()
                sums = semshift.class_sums(leaf, labelled, 4, resample=resample).sums
                (gradient,) = torch.autograd.grad(sums, leaf, rows.to(dtype))
                with torch.no_grad():
                    plain = semshift.class_sums(leaf, labelled, 4, resample=resample).sums
                results.append([sums, plain, gradient])
            for found, want in zip(*results):
                # A sum of n terms, each at most the largest: far below what bfloat16 or TF32 leaves.
                assert (found - want).abs().max() <= 1e-6 * want.abs().max()
        assert getters() == before


@pytest.mark.parametrize("settings", [pytest.param(OLD, id="old"), of_newer(backends, "bf16")])
def test_products_avoid_the_switch_where_it_rounds(settings):
    """This CPU may have no products in bfloat16: of float64 products only the last bit is rounded."""
    features, weights = torch.randn(2, 64, 3000), torch.rand(2, 3, 3000)
    exact = torch.bmm(weights.double(), features.double().mT)
    assert not _soft_ops._rounds_products(torch.device("cpu"))
    with switched(*settings):
        assert _soft_ops._rounds_products(torch.device("cpu"))
        assert _soft_ops._rounds_products(torch.device("cuda")) == (settings == OLD)
        torch.testing.assert_close(_soft_ops.soft_sums(features, weights), exact.float(), rtol=2**-23, atol=0)


@newer
def test_a_switch_of_cuda_costs_the_cpu_nothing():
    with switched((backends.cuda.matmul, "fp32_precision", "tf32")):
        assert not _soft_ops._rounds_products(torch.device("cpu"))
        assert _soft_ops._rounds_products(torch.device("cuda"))
        assert not _soft_ops._rounds_products(torch.device("mps"))

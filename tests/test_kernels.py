"""Where Triton's kernels run: on which devices, and with which of them as the current one."""

import contextlib
import importlib
import sys

import pytest
import torch

from semshift import _kernels, _label_ops, _pooling_ops, _soft_ops
from tests.kernels import DEVICE, QUIET, runs_kernels

pytest.importorskip("triton", reason="because the kernels need Triton")
pytestmark = QUIET
CUDA = torch.device("cuda", 1)


@pytest.fixture(params=["pooling", "label"])
def name(request):
    return request.param


@pytest.fixture
def device(monkeypatch):
    """torch's properties of a device that may be absent: from NVIDIA, with capability 8.0."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {CUDA: (8, 0)}[device])
    return CUDA


def test_nvidia_devices_of_capability_8_have_kernels(device, name):
    module = _kernels._kernels.__wrapped__(name, device)
    assert module is importlib.import_module(f"semshift._{name}_triton")


@pytest.mark.parametrize("capability", [(9, 0), (10, 3), (12, 0)])
def test_so_have_later_ones(device, name, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert _kernels._kernels.__wrapped__(name, device) is not None


def test_older_devices_have_none(device, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert _kernels._kernels.__wrapped__(name, device) is None


def test_devices_of_rocm_have_none(device, name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert _kernels._kernels.__wrapped__(name, device) is None


@pytest.mark.parametrize(("version", "served"), [("3.1.0", False), ("3.2.0", True), ("3.10.0+git1", True)])
def test_early_releases_of_triton_have_none_on_cuda(device, name, version, served, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    assert (_kernels._kernels.__wrapped__(name, device) is not None) == served
    assert _kernels._kernels.__wrapped__(name, torch.device("cpu")) is not None


def test_without_triton_there_are_none(device, name, monkeypatch):
    for module in ("pooling", "product", "label"):
        monkeypatch.delitem(sys.modules, f"semshift._{module}_triton", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert _kernels._kernels.__wrapped__(name, device) is None
    assert _kernels._kernels.__wrapped__(name, torch.device("cpu")) is None


def test_a_device_is_asked_once(device, name, monkeypatch):
    """To ask costs as long as to launch."""
    _kernels._kernels.cache_clear()
    first = _kernels._kernels(name, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)
    assert _kernels._kernels(name, device) is first
    _kernels._kernels.cache_clear()


LABELS = torch.randint(0, 3, (2, 4, 5), device=DEVICE)
FEATURES = torch.randn(2, 6, 4, 5, device=DEVICE)
# Op, its module, the launcher that its body for CUDA calls, the arguments.
BODIES = {
    "class_sums": (_pooling_ops._add_up_on_cuda, "add_up", (FEATURES, LABELS, 3, None, False)),
    "spread_rows": (_pooling_ops._spread_on_cuda, "spread", (FEATURES[0, :, :3, 0].mT, LABELS, 3, None, False, False)),
    "soft_class_sums": (_soft_ops._add_up_on_cuda, "multiply", (FEATURES.flatten(2), FEATURES[:, :3].flatten(2))),
    "label_shares": (_label_ops._share_out_on_cuda, "share_out", (LABELS, 2, 3, 3, "area", False, None)),
}


@runs_kernels
@pytest.mark.parametrize("op", BODIES)
def test_kernels_are_launched_on_the_device_of_their_tensors(op, monkeypatch):
    """Triton launches on the current device, which may be another."""
    body, launcher, arguments = BODIES[op]
    module = importlib.import_module(f"semshift._{'label' if op == 'label_shares' else 'pooling'}_triton")
    launch, current, launched = getattr(module, launcher), [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def record(*args):
        launched.append(list(current))
        return launch(*args)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(module, launcher, record)
    body(*arguments)
    ((tensor,),) = launched
    assert tensor is arguments[0]


@pytest.mark.parametrize("op", BODIES)
def test_without_kernels_the_default_body_serves_cuda(op, monkeypatch):
    body, _, arguments = BODIES[op]
    monkeypatch.setattr(_kernels, "_kernels", lambda *_: None)
    found, want = body(*arguments), getattr(torch.ops.semshift, op).default(*arguments)
    torch.testing.assert_close(found, want, rtol=0, atol=0)

"""`balanced_weight`: against finite differences, in float16, and where no gradient passes."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import semshift

C, K = 4, 3


def test_it_equals_finite_differences():
    align = semshift.SemanticAlignment(C, K, hidden_channels=(8,)).double().eval()
    source, target = (torch.randn(2, C, 2, 2, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, K, (2, 2, 2))

    def task(x):
        return x.square().sum().tanh() + x[:, 0].sum()

    def confusion(x):
        return align(source, labels, x, labels).confusion

    def norm(loss, step=1e-5):
        """Of the gradient, by central differences: off by step^2 and by eps / step, about 1e-10."""
        moves = step * torch.eye(target.numel(), dtype=torch.float64).view(-1, *target.shape)
        return math.hypot(*((loss(target + move) - loss(target - move)).item() / (2 * step) for move in moves))

    x = target.clone().requires_grad_()
    losses = task(x), confusion(x)
    weight = semshift.balanced_weight(*losses, x, 0.3)
    # The weight is float32.
    assert weight.item() == pytest.approx(0.3 * norm(task) / norm(confusion), rel=torch.finfo(torch.float32).eps)
    assert semshift.balanced_weight(*losses, x, 0) == 0
    assert weight.dtype == torch.float32
    assert weight.shape == ()
    assert not weight.requires_grad
    # The graph is still there, and nothing was added to the gradients.
    assert x.grad is None
    (losses[0] + weight * losses[1]).backward()


def test_it_is_0_where_either_gradient_vanishes():
    maps, labels = torch.randn(1, C, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, dtype=torch.int64)
    align = semshift.SemanticAlignment(C, K)
    nothing = align(maps, labels, maps, labels + 1).confusion
    something = align(maps, labels, maps, labels).confusion
    assert semshift.balanced_weight(maps.sum(), nothing, maps, 0.5) == 0
    assert semshift.balanced_weight(0 * maps.sum(), something, maps, 0.5) == 0
    assert semshift.balanced_weight(maps.sum(), something, maps, 0.5) > 0


@pytest.mark.parametrize("how", ["features", "autocast"])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e3])
def test_float16(how, size):
    """A gradient of 1e-8 vanishes in float16, and one of 1e3 overflows when it is scaled."""
    half = torch.float16
    maps = torch.ones(1, 8, dtype=half if how == "features" else torch.float32, requires_grad=True)
    with torch.autocast("cpu", half, enabled=how == "autocast"):
        # Its gradient is in float16 either way.
        logits = maps * 1 if how == "features" else F.linear(maps, torch.eye(8))
        assert logits.dtype == half
        weight = semshift.balanced_weight(size * logits.float().sum(), maps.float().sum(), maps, 0.5)
    assert weight.item() == pytest.approx(0.5 * size, rel=torch.finfo(half).eps)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, C, 1), nn.Conv2d(C, K, 1)

    def forward(self, images):
        features = self.backbone(images)
        return features, self.head(features)


class Donated(torch.autograd.Function):
    """Error of a compiled network with donated buffers. The compiler decides which networks have such buffers."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")


def run(how):
    """Features, and logits that no gradient leads to them from, by ways that users meet."""
    network, images = Network(), torch.randn(2, 3, 4, 4, requires_grad=True)
    features, logits = network(images)
    if how == "compiled":
        return torch.compile(network, backend="aot_eager")(images)
    if how == "checkpointed":
        return checkpoint(network, images, use_reentrant=True)
    if how == "checkpointed head":
        return features, checkpoint(network.head, features, use_reentrant=True)
    if how == "donated":
        return features, Donated.apply(network.head(features))
    return {"slice": features[:1], "copy": features.clone(), "detached": features.detach()}[how], logits


@pytest.mark.parametrize(
    ("how", "error", "fix"),
    [
        ("slice", ValueError, "slice"),
        ("copy", ValueError, "copy"),
        ("detached", ValueError, "features"),
        ("compiled", ValueError, "compile the backbone and the head separately"),
        ("checkpointed", ValueError, "use_reentrant=False"),
        ("checkpointed head", RuntimeError, "use_reentrant=False"),
        ("donated", RuntimeError, "donated_buffer = False"),
    ],
)
def test_where_no_gradient_passes_the_error_names_the_fix(how, error, fix):
    features, logits = run(how)
    for name, losses in (("loss", (logits.sum(), features.sum())), ("confusion", (features.sum(), logits.sum()))):
        # Detached features have no gradient from either.
        name = "loss" if how == "detached" else name
        with pytest.raises(error, match=rf"{name}\b.*{fix}|{fix}.*{name}\b"):
            semshift.balanced_weight(*losses, features, 0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
@pytest.mark.parametrize("how", ["compiled apart", "checkpointed"])
def test_the_fixes(how):
    network, images = Network(), torch.randn(2, 3, 4, 4)
    features, logits = network(images)
    expected = semshift.balanced_weight(logits.square().sum(), features.sum(), features, 0.1)
    if how == "compiled apart":
        network.backbone, network.head = (
            torch.compile(part, backend="aot_eager") for part in (network.backbone, network.head)
        )
        features, logits = network(images)
    else:
        features, logits = checkpoint(network, images, use_reentrant=False)
    found = semshift.balanced_weight(logits.square().sum(), features.sum(), features, 0.1)
    # The same operations on the same numbers.
    assert torch.equal(found, expected)

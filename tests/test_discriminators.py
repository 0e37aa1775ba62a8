"""Discriminators: shapes, float32 whatever comes, and `frozen`, which moves inputs and nothing else."""

import copy
import re

import pytest
import torch
from torch import nn

from semshift.discriminators import ClassPixelDiscriminator, FCDiscriminator, PrototypeDiscriminator, frozen
from semshift.health import class_domain_accuracy, domain_accuracy
from semshift.losses import class_discriminator_loss, discriminator_loss

CRITICS = {
    "map": (lambda **more: FCDiscriminator(4, base_channels=8, **more), (2, 4, 33, 70), (2, 1, 1, 2)),
    "prototype": (lambda **more: PrototypeDiscriminator(6, 4, **more), (2, 4, 6), (2, 4)),
    "prototype, none": (lambda **more: PrototypeDiscriminator(6, 4, conditioning="none", **more), (4, 6), (4,)),
    "prototype, class-and-domain": (
        lambda **more: PrototypeDiscriminator(6, 4, conditioning="class-and-domain", **more),
        (3, 2, 4, 6),
        (3, 2, 4, 8),
    ),
    "pixel": (lambda **more: ClassPixelDiscriminator(6, 4, hidden_channels=(8,), **more), (2, 6, 5, 7), (2, 8, 5, 7)),
}
every_critic = pytest.mark.parametrize("name", CRITICS)


@every_critic
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_shapes(name, spectral_norm):
    make, inputs, outputs = CRITICS[name]
    assert make(spectral_norm=spectral_norm)(torch.rand(inputs)).shape == outputs


@every_critic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stays_in_float32(name, dtype):
    make, shape, _ = CRITICS[name]
    critic, inputs = make(), torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = critic(inputs)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, critic(inputs.float()))


@every_critic
def test_has_no_batch_norm_and_shows_its_arguments(name):
    make, _, _ = CRITICS[name]
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in make().modules())
    assert "spectral_norm=True" in make(spectral_norm=True).extra_repr()
    assert not list(make().buffers())


def test_spectral_norm_bounds_every_layer():
    critic = PrototypeDiscriminator(6, 4, hidden_channels=(8, 8), spectral_norm=True)
    for _ in range(30):
        critic(torch.randn(4, 6))
    for layer in critic.layers:
        if isinstance(layer, nn.Linear):
            assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=0.05)


def test_fully_convolutional_is_the_published_size():
    critic = FCDiscriminator(19)
    assert sum(parameter.numel() for parameter in critic.parameters()) == 2_781_121
    assert [layer.negative_slope for layer in critic.layers if isinstance(layer, nn.LeakyReLU)] == [0.2] * 4


def test_prototypes_of_a_class_meet_their_own_output():
    critic = PrototypeDiscriminator(5, 3)
    prototypes = torch.randn(2, 3, 5)
    everything = critic.layers(prototypes)
    for k in range(3):
        assert torch.equal(critic(prototypes)[:, k], everything[:, k, k])


@every_critic
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_frozen_moves_inputs_and_nothing_else(name, spectral_norm):
    make, shape, _ = CRITICS[name]
    critic = make(spectral_norm=spectral_norm)
    before = copy.deepcopy(critic.state_dict())
    inputs = torch.randn(shape, requires_grad=True)
    expected = copy.deepcopy(critic)(inputs.detach())
    logits = frozen(critic)(inputs)
    torch.testing.assert_close(logits.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(logits.square().sum(), inputs, create_graph=True)
    assert gradient.abs().sum() > 0
    gradient.square().sum().backward()
    assert inputs.grad.isfinite().all()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in critic.parameters())
    assert all(torch.equal(value, before[key]) for key, value in critic.state_dict().items())


def test_frozen_of_a_module_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        critic = PrototypeDiscriminator(6, 4)
        wrapped = nn.parallel.DistributedDataParallel(critic)
        inputs = torch.randn(4, 6, requires_grad=True)
        frozen(wrapped)(inputs).sum().backward()
        assert inputs.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in critic.parameters())
        wrapped(inputs.detach()).sum().backward()
        assert all(parameter.grad is not None for parameter in critic.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("conditioning", ["none", "per-class", "class-and-domain"])
def test_learns_to_tell_two_blobs_apart(conditioning):
    critic = PrototypeDiscriminator(6, 3, hidden_channels=(16,), conditioning=conditioning)
    by_class = conditioning == "class-and-domain"
    optimiser = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(60):
        source, target = torch.randn(8, 3, 6) + 1, torch.randn(8, 3, 6) - 1
        loss = (class_discriminator_loss if by_class else discriminator_loss)(critic(source), critic(target))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    accuracy = (class_domain_accuracy if by_class else domain_accuracy)(critic(source), critic(target))
    assert min(accuracy.source.item(), accuracy.target.item()) > 0.9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FCDiscriminator(0), ValueError, "expected in_channels to be at least 1, got 0"),
        (lambda: FCDiscriminator(True), TypeError, "expected in_channels to be an int, got True"),
        (lambda: FCDiscriminator(3, base_channels=-1), ValueError, "expected base_channels to be at least 1, got -1"),
        (
            lambda: FCDiscriminator(3)(torch.rand(1, 2, 64, 64)),
            ValueError,
            "expected maps [B, 3, H, W], got [1, 2, 64, 64]",
        ),
        (
            lambda: FCDiscriminator(3)(torch.rand(1, 3, 64, 31)),
            ValueError,
            "expected maps of at least 32 x 32, got 64 x 31",
        ),
        (lambda: PrototypeDiscriminator(4, 2.0), TypeError, "expected num_classes to be an int, got 2.0"),
        (
            lambda: PrototypeDiscriminator(4, 2, hidden_channels=(8, 0)),
            ValueError,
            "expected hidden_channels to be at least 1, got 0",
        ),
        (
            lambda: PrototypeDiscriminator(4, 2, conditioning="some"),
            ValueError,
            "expected conditioning to be one of none, per-class, class-and-domain, got 'some'",
        ),
        (
            lambda: PrototypeDiscriminator(4, 2)(torch.rand(3, 4)),
            ValueError,
            "expected prototypes [..., 2, 4], got [3, 4]",
        ),
        (lambda: PrototypeDiscriminator(4, 2)(torch.rand(4)), ValueError, "expected prototypes [..., 2, 4], got [4]"),
        (
            lambda: ClassPixelDiscriminator(4, 2, hidden_channels=(0,)),
            ValueError,
            "expected hidden_channels to be at least 1, got 0",
        ),
        (
            lambda: ClassPixelDiscriminator(4, 2)(torch.rand(4, 8, 8)),
            ValueError,
            "expected features [B, 4, H, W], got [4, 8, 8]",
        ),
        (
            lambda: frozen(torch.tanh),
            TypeError,
            "expected module to be a torch.nn.Module, got builtin_function_or_method",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        call()

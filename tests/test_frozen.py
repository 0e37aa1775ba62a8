"""`frozen`: what it holds still, on our discriminators and on modules of all kinds."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import semshift
from tests.errors import refuses
from tests.test_discriminators import DISCRIMINATORS, built


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_frozen_wants_a_module():
    with refuses(TypeError, "module", "torch.nn.Module", "function"):
        semshift.frozen(lambda x: x)


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_frozen_reaches_inputs_and_changes_nothing(name, spectral_norm):
    discriminator, inputs = built(name, spectral_norm=spectral_norm)
    before, held = state(discriminator), dict(discriminator.named_parameters())
    inputs.requires_grad_()
    semshift.frozen(discriminator)(inputs).square().sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert_unchanged(discriminator, before)
    after = dict(discriminator.named_parameters())
    assert all(after[name] is held[name] and held[name].requires_grad and held[name].grad is None for name in held)
    # The buffers would have changed, had they not been held.
    discriminator(inputs)
    assert any(not torch.equal(b, before[name]) for name, b in discriminator.named_buffers()) == spectral_norm


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_frozen_equals_the_module(spectral_norm):
    """Value and gradient, first and second order, in `eval` mode, where the module is a function."""
    discriminator, inputs = built("rows-per-class", spectral_norm=spectral_norm)
    discriminator.eval()
    results = []
    for function in (discriminator, semshift.frozen(discriminator)):
        x = inputs.clone().requires_grad_()
        logits = function(x).tanh()
        (first,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((logits, first, second))
    assert results[0][2].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_frozen_follows_the_parameters_as_they_are_trained():
    discriminator, inputs = built("rows")
    judge = semshift.frozen(discriminator)
    before = judge(inputs)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(2)
    assert torch.equal(judge(inputs), discriminator(inputs))
    assert not torch.equal(judge(inputs), before)


def test_frozen_passes_arguments_and_keywords_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x, *more, scale=1.0, **rest):
            return self.weight * x * scale, more, rest

    x = torch.ones(2, requires_grad=True)
    result, more, rest = semshift.frozen(Scaled())(x, "more", scale=3.0, other=None)
    assert (result.tolist(), more, rest) == ([6, 6], ("more",), {"other": None})
    result.sum().backward()
    assert x.grad.tolist() == [6, 6]


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_an_optimiser_may_step_before_the_backward(name, spectral_norm):
    """Steps are in place, and so are the buffers of a spectral norm that is trained meanwhile."""
    discriminator, inputs = built(name, spectral_norm=spectral_norm)
    inputs.requires_grad_()
    optimiser = torch.optim.SGD(discriminator.parameters(), lr=1.0, momentum=0.9)
    (expected,) = torch.autograd.grad(semshift.frozen(discriminator)(inputs).square().sum(), inputs)
    loss = semshift.frozen(discriminator)(inputs).square().sum()
    before = state(discriminator)
    discriminator(inputs.detach()).sum().backward()
    optimiser.step()
    assert not torch.equal(before["layers.0.bias"], discriminator.layers[0].bias)
    loss.backward()
    assert torch.equal(inputs.grad, expected)


def test_frozen_second_order_while_training():
    discriminator, inputs = built("maps", spectral_norm=True)
    before = state(discriminator)
    inputs.requires_grad_()
    (first,) = torch.autograd.grad(semshift.frozen(discriminator)(inputs).square().sum(), inputs, create_graph=True)
    first.square().sum().backward()
    assert inputs.grad.isfinite().all()
    assert inputs.grad.abs().sum() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert_unchanged(discriminator, before)


def test_frozen_holds_batch_norm():
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    before = state(module)
    inputs = torch.randn(2, 2, 3, 3)
    result = semshift.frozen(module)(inputs)
    assert_unchanged(module, before)
    assert torch.equal(result, module(inputs))


def test_frozen_beside_training_in_one_backward():
    discriminator, source = built("rows-per-class")
    target = torch.randn_like(source).requires_grad_()

    def own_loss():
        return semshift.discriminator_loss(discriminator(source), discriminator(target.detach()))

    expected = torch.autograd.grad(own_loss(), list(discriminator.parameters()))
    (semshift.confusion_loss(semshift.frozen(discriminator)(target)) + own_loss()).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(discriminator.parameters(), expected))
    (alone,) = torch.autograd.grad(semshift.confusion_loss(semshift.frozen(discriminator)(target)), target)
    assert torch.equal(target.grad, alone)


def test_frozen_under_data_parallel(one_rank):
    discriminator, source = built("rows-per-class")
    wrapped = DistributedDataParallel(discriminator)
    passes = []
    wrapped.register_forward_pre_hook(lambda *_: passes.append("forward"))
    target = torch.randn_like(source).requires_grad_()
    (expected,) = torch.autograd.grad(semshift.confusion_loss(discriminator(target)), target)
    for _ in range(2):
        target.grad = None
        wrapped.zero_grad()
        passes.clear()
        semshift.confusion_loss(semshift.frozen(wrapped)(target)).backward()
        assert torch.equal(target.grad, expected)
        assert all(p.grad is None for p in wrapped.parameters())
        # Of this pass the wrapper, which talks to other ranks, is to see nothing.
        assert not passes
        semshift.discriminator_loss(wrapped(source), wrapped(target.detach())).backward()
        assert all(p.grad.abs().sum() > 0 for p in wrapped.parameters())


class Wrapper(nn.Module):
    """A module under two names and in a plain list, as Fabric's wrapper and others hold it."""

    def __init__(self, module):
        super().__init__()
        self.first = self.second = module
        self.listed = [module]

    def forward(self, *arguments):
        return self.listed[0](*arguments)


class Tied(nn.Module):
    """One weight in two modules, and one module twice in a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.layers[1].weight = self.layers[0].weight
        self.layers.append(self.layers[0])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Patched(nn.Module):
    """Its forward is a method that was put over the class's own, as Accelerate does it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.forward = self.patched

    def patched(self, x):
        return self.layer(x).tanh()


def recurrent():
    return nn.LSTM(5, 4, num_layers=2)


def compiled():
    return torch.compile(mlp(), backend="aot_eager")


def compiled_in_place():
    module = mlp()
    module.compile(backend="aot_eager")
    return module


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def closure():
    module, layer = nn.Module(), nn.Linear(5, 4)
    module.layer, module.forward = layer, lambda x: layer(x).tanh()
    return module


def closure_over_a_tied_weight():
    module = Tied()
    layers = module.layers
    module.forward = lambda x: layers[1](layers[0](x).tanh())
    return module


def old_spectral_norm():
    # In `eval` mode, where a second call is the first one's equal.
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(5, 4)), nn.Tanh()).eval()


class Checkpointed(nn.Module):
    """Part of it is computed again in the backward; `how` says what checkpointing is given."""

    def __init__(self, how, reentrant):
        super().__init__()
        self.body, self.how, self.reentrant = mlp(), how, reentrant
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.stored = {"scaled": [functools.partial(self.scaled)]}

    def scaled(self, x):
        return self.body(x * self.scale)

    def forward(self, x):
        if self.how == "module":
            return checkpoint(self.body, x * self.scale, use_reentrant=self.reentrant)
        if self.how == "stored":
            return checkpoint(self.stored["scaled"][0], x, use_reentrant=self.reentrant)
        given = self.scaled if self.how == "method" else lambda x: self.body(x * self.scale)
        return checkpoint(given, x, use_reentrant=self.reentrant)


def checkpointed_and_patched(reentrant):
    module = Checkpointed("method", reentrant)
    module.forward = module.forward
    return module


def wrapped_in_data_parallel():
    return Wrapper(nn.DataParallel(Wrapper(mlp())))


CHECKPOINTED = ("module", "method", "stored", "function")
FROZEN = [
    lambda: Wrapper(mlp()),
    lambda: Wrapper(Wrapper(Tied())),
    Tied,
    Patched,
    recurrent,
    compiled,
    compiled_in_place,
    closure,
    closure_over_a_tied_weight,
    old_spectral_norm,
    wrapped_in_data_parallel,
    lambda: nn.DataParallel(nn.DataParallel(mlp())),
    lambda: AveragedModel(mlp()),
    lambda: Wrapper(torch.compile(Wrapper(mlp()), backend="aot_eager")),
    *(functools.partial(Checkpointed, how, kind) for how in CHECKPOINTED for kind in (True, False)),
    *(lambda kind=kind: Wrapper(nn.DataParallel(Checkpointed("method", kind))) for kind in (True, False)),
    *(functools.partial(checkpointed_and_patched, kind) for kind in (True, False)),
]


@pytest.mark.parametrize("make", FROZEN)
def test_frozen_leaves_any_module_as_it_was(make):
    """The gradient at the inputs is right, though the optimiser steps before the backward, and the module learns on."""
    torch._dynamo.reset()
    module = make()
    x = torch.randn(3, 5, requires_grad=True)

    def loss(function):
        result = function(x)
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    loss(module).backward()
    expected = x.grad.clone()
    module.zero_grad()
    x.grad = None
    before, names = state(module), dict(module.named_parameters(remove_duplicate=False))
    frozen_loss = loss(semshift.frozen(module))
    after = dict(module.named_parameters(remove_duplicate=False))
    assert list(after) == list(names)
    assert all(after[name] is names[name] and names[name].requires_grad for name in names)
    assert_unchanged(module, before)
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    loss(module).backward()
    optimiser.step()
    optimiser.zero_grad()
    x.grad = None
    frozen_loss.backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-6)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert all(parameter.grad is None for parameter in learning)
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters() if p.requires_grad)


def test_frozen_puts_everything_back_after_an_error():
    module = Wrapper(mlp())
    before, parameters = state(module), list(module.parameters())
    with pytest.raises(RuntimeError):
        semshift.frozen(module)(torch.zeros(3, 4))
    assert all(one is other for one, other in zip(parameters, module.parameters()))
    assert_unchanged(module, before)


def test_frozen_looks_through_wrapped_data_parallel(one_rank):
    module = Wrapper(DistributedDataParallel(mlp()))
    passes = []
    module.first.register_forward_pre_hook(lambda *_: passes.append("forward"))
    x = torch.randn(3, 5, requires_grad=True)
    semshift.frozen(module)(x).sum().backward()
    assert not passes
    assert all(p.grad is None for p in module.parameters())
    module(x.detach()).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="needs torch 2.6")
def test_frozen_refuses_what_is_sharded_by_itself(one_rank):
    module = nn.Sequential(fsdp.fully_shard(mlp()))
    with refuses(ValueError, "module", "fully_shard"):
        semshift.frozen(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*is deprecated")
def test_frozen_refuses_a_scripted_module():
    with refuses(TypeError, "module", "torch.jit.ScriptModule"):
        semshift.frozen(nn.Sequential(torch.jit.trace(nn.Linear(5, 4), torch.zeros(1, 5))))


def test_frozen_passes_nested_results_on():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, *, options):
            return {"logits": [self.layer(x)], "options": options}

    x, options = torch.randn(3, 2, requires_grad=True), object()
    result = semshift.frozen(Nested())(x, options=options)
    assert result["options"] is options
    result["logits"][0].sum().backward()
    assert x.grad.abs().sum() > 0


# Of what torch loads for its forward mode.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_frozen_under_transforms(name):
    """Forward mode and a batch of inputs agree with the discriminator's own; fake tensors pass."""
    discriminator, inputs = built(name, spectral_norm=True)
    discriminator.eval()
    judge = semshift.frozen(discriminator)
    tangent = torch.randn_like(inputs)
    for mine, own in zip(
        torch.func.jvp(judge, (inputs,), (tangent,)), torch.func.jvp(discriminator, (inputs,), (tangent,))
    ):
        assert torch.equal(mine, own)
    batch = torch.stack([inputs, 2 * inputs])
    torch.testing.assert_close(torch.func.vmap(judge)(batch), torch.stack([judge(each) for each in batch]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(inputs)
        assert judge(fake).shape == discriminator(fake).shape

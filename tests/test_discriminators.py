"""Discriminators: shapes, precision, what `frozen` holds still, and that each of them can be trained and confused."""

import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from semshift.discriminators import ClassPixelDiscriminator, FCDiscriminator, PrototypeDiscriminator, frozen
from semshift.health import class_domain_accuracy, domain_accuracy
from semshift.losses import class_confusion_loss, class_discriminator_loss, confusion_loss, discriminator_loss

OBJECTIVES = ("bce", "least-squares", "hinge", "wasserstein")
K, C = 3, 5
# Each with the shape of its inputs.
CRITICS = {
    "maps": (lambda **more: FCDiscriminator(K, base_channels=4, **more), (4, K, 32, 64)),
    "rows": (
        lambda **more: PrototypeDiscriminator(C, K, hidden_channels=(16,), conditioning="none", **more),
        (4, K, C),
    ),
    "rows-per-class": (lambda **more: PrototypeDiscriminator(C, K, hidden_channels=(16,), **more), (4, K, C)),
    "rows-class-and-domain": (
        lambda **more: PrototypeDiscriminator(C, K, hidden_channels=(16,), conditioning="class-and-domain", **more),
        (4, K, C),
    ),
    "pixels": (lambda **more: ClassPixelDiscriminator(C, K, hidden_channels=(8,), **more), (4, C, 3, 5)),
}
GAMES = [(name, objective) for name in ("maps", "rows", "rows-per-class") for objective in OBJECTIVES]
GAMES += [("rows-class-and-domain", "class-and-domain"), ("pixels", "class-and-domain")]


def built(name, **more):
    make, shape = CRITICS[name]
    return make(**more), torch.randn(shape)


def last(logits):
    """2K outputs of a map to the last dimension, where the losses want them."""
    return logits.movedim(1, -1) if logits.dim() == 4 else logits


def classes_of(logits):
    """None for prototypes, whose rows are the classes; for pixels any probabilities."""
    return None if logits.shape[-2] == K else torch.rand(*logits.shape[:-1], K).softmax(-1)


def confuse(logits, objective):
    if objective == "class-and-domain":
        return class_confusion_loss(last(logits), classes=classes_of(last(logits)))
    return confusion_loss(logits, objective=objective)


def learn(source, target, objective):
    if objective == "class-and-domain":
        source, target = last(source), last(target)
        classes = classes_of(source)
        return class_discriminator_loss(source, target, source_classes=classes, target_classes=classes)
    return discriminator_loss(source, target, objective=objective)


def score(logits, objective):
    """How much the discriminator takes all of it for source."""
    if objective != "class-and-domain":
        return logits.mean()
    source, target = last(logits).chunk(2, -1)
    return (source.logsumexp(-1) - target.logsumexp(-1)).mean()


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


# Shapes and structure.


def test_fc_is_the_published_network():
    critic = FCDiscriminator(19)
    assert sum(p.numel() for p in critic.parameters()) == 2_781_121
    convolutions = [layer for layer in critic.layers if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {((4, 4), (2, 2), (1, 1))}
    assert [layer.negative_slope for layer in critic.layers if isinstance(layer, nn.LeakyReLU)] == [0.2] * 4


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (1, 1)), ((63, 64), (1, 2)), ((95, 96), (2, 3))])
def test_fc_shape(size, grid):
    assert FCDiscriminator(2, base_channels=1)(torch.rand(3, 2, *size)).shape == (3, 1, *grid)


@pytest.mark.parametrize("lead", [(), (2,), (2, 0), (2, 4)])
@pytest.mark.parametrize("hidden", [(), (7, 6)])
@pytest.mark.parametrize("num_classes", [1, K])
def test_prototype_rows_take_their_own_output(num_classes, hidden, lead):
    rows = torch.randn(*lead, num_classes, C)
    critics = {
        conditioning: PrototypeDiscriminator(C, num_classes, hidden_channels=hidden, conditioning=conditioning)
        for conditioning in ("none", "per-class", "class-and-domain")
    }
    outputs = {conditioning: critic.layers(rows) for conditioning, critic in critics.items()}
    own = torch.stack([outputs["per-class"][..., k, k] for k in range(num_classes)], -1)
    assert torch.equal(critics["per-class"](rows), own)
    assert torch.equal(critics["none"](rows), outputs["none"][..., 0])
    assert torch.equal(critics["class-and-domain"](rows), outputs["class-and-domain"])
    assert outputs["class-and-domain"].shape == (*lead, num_classes, 2 * num_classes)


def test_pixel_shape():
    assert ClassPixelDiscriminator(C, K, hidden_channels=(4, 4))(torch.rand(2, C, 3, 7)).shape == (2, 2 * K, 3, 7)


@pytest.mark.parametrize("name", CRITICS)
def test_no_batch_statistics(name):
    critic, inputs = built(name)
    assert not list(critic.buffers())
    changed = torch.cat([inputs[:1], 100 * torch.randn_like(inputs[1:])])
    assert torch.equal(critic(inputs)[0], critic(changed)[0])


@pytest.mark.parametrize("name", CRITICS)
def test_spectral_norm_divides_every_kernel(name):
    critic, inputs = built(name, spectral_norm=True)
    kernels = [layer for layer in critic.layers if not isinstance(layer, nn.LeakyReLU)]
    assert all(parametrize.is_parametrized(layer, "weight") for layer in kernels)
    before = critic.eval()(inputs)
    with torch.no_grad():
        for layer in kernels:
            # A power of two, so that the division is exact.
            layer.parametrizations.weight.original.mul_(8)
    assert torch.equal(critic(inputs), before)


def test_repr():
    assert "FCDiscriminator(\n  3, base_channels=4, spectral_norm=False\n" in repr(FCDiscriminator(3, base_channels=4))
    shown = "  5, 3, hidden_channels=(2,), conditioning='none', spectral_norm=False\n"
    assert shown in repr(PrototypeDiscriminator(5, 3, hidden_channels=[2], conditioning="none"))
    assert "  5, 3, hidden_channels=(2,), spectral_norm=True\n" in repr(
        ClassPixelDiscriminator(5, 3, hidden_channels=[2], spectral_norm=True)
    )


# Precision.


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("name", CRITICS)
def test_float32_under_autocast(name, spectral_norm):
    critic, inputs = built(name, spectral_norm=spectral_norm)
    critic.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == torch.bfloat16
        logits = critic(inputs)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, critic(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CRITICS)
def test_float32_of_other_inputs(name, dtype):
    critic, inputs = built(name)
    narrow = inputs.to(dtype).requires_grad_()
    logits = critic(narrow)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, critic(narrow.detach().float()))
    logits.sum().backward()
    assert narrow.grad.dtype == dtype


@pytest.mark.parametrize("name", CRITICS)
def test_a_double_discriminator_stays_double(name):
    critic, inputs = built(name)
    logits, exact = critic(inputs), critic.double()(inputs)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(logits, exact.float())


@pytest.mark.parametrize("name", CRITICS)
def test_shapes_are_found_without_data(name):
    """There is no autocast on `meta`, and naming it there is an error."""
    critic, inputs = built(name)
    assert critic.to("meta")(inputs.to("meta")).shape == CRITICS[name][0]()(inputs).shape


def test_full_graph():
    critic, inputs = built("rows")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(critic, fullgraph=True, backend="aot_eager")(inputs), critic(inputs))


# Errors.

MAKERS = {
    FCDiscriminator: {"in_channels": 2, "base_channels": 2},
    PrototypeDiscriminator: {"in_channels": 2, "num_classes": 2, "hidden_channels": 2},
    ClassPixelDiscriminator: {"in_channels": 2, "num_classes": 2, "hidden_channels": 2},
}


@pytest.mark.parametrize(
    ("bad", "error", "rule"),
    [
        (0, ValueError, "to be at least 1, got 0"),
        (-3, ValueError, "to be at least 1, got -3"),
        (2.0, TypeError, "to be an int, got 2.0"),
        (True, TypeError, "to be an int, got True"),
    ],
)
@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in MAKERS.items() for name in names])
def test_bad_counts(make, name, bad, error, rule):
    arguments = {**MAKERS[make], name: bad}
    if "hidden_channels" in arguments:
        arguments["hidden_channels"] = (2, arguments["hidden_channels"])
    with pytest.raises(error, match="^" + re.escape(f"expected {name} {rule}") + "$"):
        make(**arguments)


@pytest.mark.parametrize("conditioning", ["class", ["none"]])
def test_bad_conditioning(conditioning):
    message = f"expected conditioning to be one of none, per-class, class-and-domain, got {conditioning!r}"
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        PrototypeDiscriminator(2, 2, conditioning=conditioning)


# The last is like a generator, which a check would use up: no hidden layer would be left.
@pytest.mark.parametrize("hidden", [8, "88", {8: 8}.keys()])
@pytest.mark.parametrize("make", [PrototypeDiscriminator, ClassPixelDiscriminator])
def test_bad_widths(make, hidden):
    message = f"expected hidden_channels to be a sequence of ints, got {hidden!r}"
    with pytest.raises(TypeError, match="^" + re.escape(message) + "$"):
        make(4, 2, hidden_channels=hidden)


@pytest.mark.parametrize("name", CRITICS)
def test_bad_spectral_norm(name):
    with pytest.raises(TypeError, match=r"^expected spectral_norm to be a bool, got 'no'$"):
        built(name, spectral_norm="no")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("maps", (1, 4, 32, 32), "expected maps [B, 3, H, W], got [1, 4, 32, 32]"),
        ("maps", (3, 32, 32), "expected maps [B, 3, H, W], got [3, 32, 32]"),
        ("maps", (1, 3, 31, 64), "expected maps of at least 32 x 32, got 31 x 64"),
        ("maps", (1, 3, 64, 31), "expected maps of at least 32 x 32, got 64 x 31"),
        ("rows", (5,), "expected prototypes [..., 3, 5], got [5]"),
        ("rows-per-class", (4, 5), "expected prototypes [..., 3, 5], got [4, 5]"),
        ("rows-per-class", (2, 3, 4), "expected prototypes [..., 3, 5], got [2, 3, 4]"),
        ("pixels", (1, 4, 2, 2), "expected features [B, 5, H, W], got [1, 4, 2, 2]"),
        ("pixels", (5, 2, 2), "expected features [B, 5, H, W], got [5, 2, 2]"),
    ],
)
def test_bad_inputs(name, shape, message):
    critic, _ = built(name)
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        critic(torch.rand(shape))


@pytest.mark.parametrize(("name", "what"), [("maps", "maps"), ("rows", "prototypes"), ("pixels", "features")])
def test_inputs_of_another_kind(name, what):
    critic, inputs = built(name)
    for wrong, error, rule in (
        (inputs.tolist(), TypeError, f"{what} to be a tensor, got list"),
        (inputs.long(), TypeError, f"{what} to be floating point, got torch.int64"),
        (inputs.to("meta"), ValueError, f"{what} and the discriminator on one device, got meta and cpu"),
    ):
        with pytest.raises(error, match="^" + re.escape(f"expected {rule}") + "$"):
            critic(wrong)
    message = "expected a discriminator in float32, which it is to stay in, got torch.bfloat16; call its .float()"
    with pytest.raises(TypeError, match="^" + re.escape(message) + "$"):
        critic.bfloat16()(inputs)


# frozen.


def test_frozen_wants_a_module():
    with pytest.raises(TypeError, match=r"^expected module to be a torch\.nn\.Module, got function$"):
        frozen(lambda x: x)


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("name", CRITICS)
def test_frozen_reaches_inputs_and_changes_nothing(name, spectral_norm):
    critic, inputs = built(name, spectral_norm=spectral_norm)
    before, held = state(critic), dict(critic.named_parameters())
    inputs.requires_grad_()
    frozen(critic)(inputs).square().sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert_unchanged(critic, before)
    after = dict(critic.named_parameters())
    assert all(after[name] is held[name] and held[name].requires_grad and held[name].grad is None for name in held)
    # The buffers would have changed, had they not been held.
    critic(inputs)
    assert any(not torch.equal(b, before[name]) for name, b in critic.named_buffers()) == spectral_norm


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_frozen_equals_the_module(spectral_norm):
    """Value and gradient, first and second order, in `eval` mode, where the module is a function."""
    critic, inputs = built("rows-per-class", spectral_norm=spectral_norm)
    critic.eval()
    results = []
    for function in (critic, frozen(critic)):
        x = inputs.clone().requires_grad_()
        logits = function(x).tanh()
        (first,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((logits, first, second))
    assert results[0][2].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_frozen_follows_the_parameters_as_they_are_trained():
    critic, inputs = built("rows")
    judge = frozen(critic)
    before = judge(inputs)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(2)
    assert torch.equal(judge(inputs), critic(inputs))
    assert not torch.equal(judge(inputs), before)


def test_frozen_second_order_while_training():
    critic, inputs = built("maps", spectral_norm=True)
    before = state(critic)
    inputs.requires_grad_()
    (first,) = torch.autograd.grad(frozen(critic)(inputs).square().sum(), inputs, create_graph=True)
    first.square().sum().backward()
    assert inputs.grad.isfinite().all()
    assert inputs.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    assert_unchanged(critic, before)


def test_frozen_holds_batch_norm():
    module = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    before = state(module)
    inputs = torch.randn(2, 2, 3, 3)
    result = frozen(module)(inputs)
    assert_unchanged(module, before)
    assert torch.equal(result, module(inputs))


def test_frozen_beside_training_in_one_backward():
    critic, source = built("rows-per-class")
    target = torch.randn_like(source).requires_grad_()

    def critic_loss():
        return discriminator_loss(critic(source), critic(target.detach()))

    expected = torch.autograd.grad(critic_loss(), list(critic.parameters()))
    (confusion_loss(frozen(critic)(target)) + critic_loss()).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(critic.parameters(), expected))
    (alone,) = torch.autograd.grad(confusion_loss(frozen(critic)(target)), target)
    assert torch.equal(target.grad, alone)


def test_frozen_under_data_parallel(one_rank):
    critic, source = built("rows-per-class")
    wrapped = DistributedDataParallel(critic)
    passes = []
    wrapped.register_forward_pre_hook(lambda *_: passes.append("forward"))
    target = torch.randn_like(source).requires_grad_()
    (expected,) = torch.autograd.grad(confusion_loss(critic(target)), target)
    for _ in range(2):
        target.grad = None
        wrapped.zero_grad()
        passes.clear()
        confusion_loss(frozen(wrapped)(target)).backward()
        assert torch.equal(target.grad, expected)
        assert all(p.grad is None for p in wrapped.parameters())
        # Of this pass the wrapper, which talks to other ranks, is to see nothing.
        assert not passes
        discriminator_loss(wrapped(source), wrapped(target.detach())).backward()
        assert all(p.grad.abs().sum() > 0 for p in wrapped.parameters())


# The game.


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize(("name", "objective"), GAMES)
def test_confusion_moves_towards_source(name, objective, spectral_norm):
    critic, inputs = built(name, spectral_norm=spectral_norm)
    judge = frozen(critic)
    inputs.requires_grad_()
    logits = judge(inputs)
    confuse(logits, objective).backward()
    assert inputs.grad.norm() > 0
    # A hundredth of the inputs' length: short enough for the gradient to tell the way, long against float32's rounding.
    step = 0.01 * inputs.detach().norm() / inputs.grad.norm() * inputs.grad
    assert score(judge(inputs.detach() - step), objective) > score(logits, objective)


@pytest.mark.parametrize(("name", "objective"), GAMES)
def test_training_tells_two_blobs_apart(name, objective):
    critic, inputs = built(name)
    blobs = [lambda: 1 + 0.1 * torch.randn_like(inputs), lambda: -1 + 0.1 * torch.randn_like(inputs)]
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    first = None
    for _ in range(60):
        loss = learn(critic(blobs[0]()), critic(blobs[1]()), objective)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    unseen = [critic(blob()) for blob in blobs]
    if objective == "class-and-domain":
        accuracy = class_domain_accuracy(*map(last, unseen))
    else:
        accuracy = domain_accuracy(*unseen)
    assert (accuracy.source.item(), accuracy.target.item()) == (1.0, 1.0)

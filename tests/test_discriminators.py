"""Discriminators: shapes, precision, and that each of them can be trained and confused."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import semshift
from tests.errors import refuses

OBJECTIVES = ("bce", "least-squares", "hinge", "wasserstein")
K, C = 3, 5
# Each with the shape of its inputs.
DISCRIMINATORS = {
    "maps": (lambda **more: semshift.FCDiscriminator(K, base_channels=4, **more), (4, K, 32, 64)),
    "rows": (
        lambda **more: semshift.PrototypeDiscriminator(C, K, hidden_channels=(16,), conditioning="none", **more),
        (4, K, C),
    ),
    "rows-per-class": (lambda **more: semshift.PrototypeDiscriminator(C, K, hidden_channels=(16,), **more), (4, K, C)),
    "rows-class-and-domain": (
        lambda **more: semshift.PrototypeDiscriminator(
            C, K, hidden_channels=(16,), conditioning="class-and-domain", **more
        ),
        (4, K, C),
    ),
    "pixels": (lambda **more: semshift.ClassPixelDiscriminator(C, K, hidden_channels=(8,), **more), (4, C, 3, 5)),
}
TRAINED = [(name, objective) for name in ("maps", "rows", "rows-per-class") for objective in OBJECTIVES]
TRAINED += [("rows-class-and-domain", "class-and-domain"), ("pixels", "class-and-domain")]


def built(name, **more):
    make, shape = DISCRIMINATORS[name]
    return make(**more), torch.randn(shape)


def last(logits):
    """2K outputs of a map to the last dimension, where the losses want them."""
    return logits.movedim(1, -1) if logits.dim() == 4 else logits


def classes_of(logits):
    """None for prototypes, whose rows are the classes; for pixels any probabilities."""
    return None if logits.shape[-2] == K else torch.rand(*logits.shape[:-1], K).softmax(-1)


def confuse(logits, objective):
    if objective == "class-and-domain":
        return semshift.class_confusion_loss(last(logits), classes=classes_of(last(logits)))
    return semshift.confusion_loss(logits, objective=objective)


def learn(source, target, objective):
    if objective == "class-and-domain":
        source, target = last(source), last(target)
        classes = classes_of(source)
        return semshift.class_discriminator_loss(source, target, source_classes=classes, target_classes=classes)
    return semshift.discriminator_loss(source, target, objective=objective)


def score(logits, objective):
    """Mean log-odds of the source: high where the discriminator classifies the inputs as source."""
    if objective != "class-and-domain":
        return logits.mean()
    source, target = last(logits).chunk(2, -1)
    return (source.logsumexp(-1) - target.logsumexp(-1)).mean()


# Shapes and structure.


def test_fc_is_the_published_network():
    discriminator = semshift.FCDiscriminator(19)
    assert sum(p.numel() for p in discriminator.parameters()) == 2_781_121
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert {(c.kernel_size, c.stride, c.padding) for c in convolutions} == {((4, 4), (2, 2), (1, 1))}
    assert [layer.negative_slope for layer in discriminator.layers if isinstance(layer, nn.LeakyReLU)] == [0.2] * 4


@pytest.mark.parametrize(("size", "grid"), [((32, 32), (1, 1)), ((63, 64), (1, 2)), ((95, 96), (2, 3))])
def test_fc_shape(size, grid):
    assert semshift.FCDiscriminator(2, base_channels=1)(torch.rand(3, 2, *size)).shape == (3, 1, *grid)


@pytest.mark.parametrize("lead", [(), (2,), (2, 0), (2, 4)])
@pytest.mark.parametrize("hidden", [(), (7, 6)])
@pytest.mark.parametrize("num_classes", [1, K])
def test_prototype_rows_take_their_own_output(num_classes, hidden, lead):
    rows = torch.randn(*lead, num_classes, C)
    discriminators = {
        conditioning: semshift.PrototypeDiscriminator(C, num_classes, hidden_channels=hidden, conditioning=conditioning)
        for conditioning in ("none", "per-class", "class-and-domain")
    }
    outputs = {conditioning: discriminator.layers(rows) for conditioning, discriminator in discriminators.items()}
    own = torch.stack([outputs["per-class"][..., k, k] for k in range(num_classes)], -1)
    assert torch.equal(discriminators["per-class"](rows), own)
    assert torch.equal(discriminators["none"](rows), outputs["none"][..., 0])
    assert torch.equal(discriminators["class-and-domain"](rows), outputs["class-and-domain"])
    assert outputs["class-and-domain"].shape == (*lead, num_classes, 2 * num_classes)


def test_pixel_shape():
    discriminator = semshift.ClassPixelDiscriminator(C, K, hidden_channels=(4, 4))
    assert discriminator(torch.rand(2, C, 3, 7)).shape == (2, 2 * K, 3, 7)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_no_batch_statistics(name):
    discriminator, inputs = built(name)
    assert not list(discriminator.buffers())
    changed = torch.cat([inputs[:1], 100 * torch.randn_like(inputs[1:])])
    assert torch.equal(discriminator(inputs)[0], discriminator(changed)[0])


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_spectral_norm_divides_every_kernel(name):
    discriminator, inputs = built(name, spectral_norm=True)
    kernels = [layer for layer in discriminator.layers if not isinstance(layer, nn.LeakyReLU)]
    assert all(parametrize.is_parametrized(layer, "weight") for layer in kernels)
    before = discriminator.eval()(inputs)
    with torch.no_grad():
        for layer in kernels:
            # A power of two, so that the division is exact.
            layer.parametrizations.weight.original.mul_(8)
    assert torch.equal(discriminator(inputs), before)


def test_repr():
    discriminator = semshift.FCDiscriminator(3, base_channels=4)
    assert "FCDiscriminator(\n  3, base_channels=4, spectral_norm=False\n" in repr(discriminator)
    shown = "  5, 3, hidden_channels=(2,), conditioning='none', spectral_norm=False\n"
    assert shown in repr(semshift.PrototypeDiscriminator(5, 3, hidden_channels=[2], conditioning="none"))
    assert "  5, 3, hidden_channels=(2,), spectral_norm=True\n" in repr(
        semshift.ClassPixelDiscriminator(5, 3, hidden_channels=[2], spectral_norm=True)
    )


# Precision.


@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_float32_under_autocast(name, spectral_norm):
    discriminator, inputs = built(name, spectral_norm=spectral_norm)
    discriminator.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Linear(2, 2)(torch.rand(1, 2)).dtype == torch.bfloat16
        logits = discriminator(inputs)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, discriminator(inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_float32_of_other_inputs(name, dtype):
    discriminator, inputs = built(name)
    narrow = inputs.to(dtype).requires_grad_()
    logits = discriminator(narrow)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, discriminator(narrow.detach().float()))
    logits.sum().backward()
    assert narrow.grad.dtype == dtype


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_double_discriminator_stays_double(name):
    discriminator, inputs = built(name)
    logits, exact = discriminator(inputs), discriminator.double()(inputs)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(logits, exact.float())


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_shapes_are_found_without_data(name):
    """There is no autocast on `meta`, and naming it there is an error."""
    discriminator, inputs = built(name)
    assert discriminator.to("meta")(inputs.to("meta")).shape == DISCRIMINATORS[name][0]()(inputs).shape


def test_full_graph():
    discriminator, inputs = built("rows")
    torch._dynamo.reset()
    assert torch.equal(torch.compile(discriminator, fullgraph=True, backend="aot_eager")(inputs), discriminator(inputs))


# Errors.

MAKERS = {
    semshift.FCDiscriminator: {"in_channels": 2, "base_channels": 2},
    semshift.PrototypeDiscriminator: {"in_channels": 2, "num_classes": 2, "hidden_channels": 2},
    semshift.ClassPixelDiscriminator: {"in_channels": 2, "num_classes": 2, "hidden_channels": 2},
}


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in MAKERS.items() for name in names])
def test_bad_counts(make, name, bad, error):
    arguments = {**MAKERS[make], name: bad}
    if "hidden_channels" in arguments:
        arguments["hidden_channels"] = (2, arguments["hidden_channels"])
    with refuses(error, name, bad):
        make(**arguments)


@pytest.mark.parametrize("conditioning", ["class", ["none"], None])
def test_bad_conditioning(conditioning):
    with refuses(ValueError, "conditioning", "'none'", "'per-class'", "'class-and-domain'", repr(conditioning)):
        semshift.PrototypeDiscriminator(2, 2, conditioning=conditioning)


# The last is like a generator, which a check would use up: no hidden layer would be left.
@pytest.mark.parametrize("hidden", [8, "88", {8: 8}.keys()])
@pytest.mark.parametrize("make", [semshift.PrototypeDiscriminator, semshift.ClassPixelDiscriminator])
def test_bad_widths(make, hidden):
    with refuses(TypeError, "hidden_channels", repr(hidden)):
        make(4, 2, hidden_channels=hidden)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_bad_spectral_norm(name):
    with refuses(TypeError, "spectral_norm", "'no'"):
        built(name, spectral_norm="no")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("maps", (1, 4, 32, 32), ("maps", "[B, 3, H, W]", [1, 4, 32, 32])),
        ("maps", (3, 32, 32), ("maps", "[B, 3, H, W]", [3, 32, 32])),
        ("maps", (1, 3, 31, 64), ("maps", 32, 31, 64)),
        ("maps", (1, 3, 64, 31), ("maps", 32, 64, 31)),
        ("rows", (5,), ("prototypes", "[..., 3, 5]", [5])),
        ("rows-per-class", (4, 5), ("prototypes", "[..., 3, 5]", [4, 5])),
        ("rows-per-class", (2, 3, 4), ("prototypes", "[..., 3, 5]", [2, 3, 4])),
        ("pixels", (1, 4, 2, 2), ("features", "[B, 5, H, W]", [1, 4, 2, 2])),
        ("pixels", (5, 2, 2), ("features", "[B, 5, H, W]", [5, 2, 2])),
    ],
)
def test_bad_inputs(name, shape, says):
    discriminator, _ = built(name)
    with refuses(ValueError, *says):
        discriminator(torch.rand(shape))


@pytest.mark.parametrize(("name", "what"), [("maps", "maps"), ("rows", "prototypes"), ("pixels", "features")])
def test_inputs_of_another_kind(name, what):
    discriminator, inputs = built(name)
    with refuses(TypeError, what, "list"):
        discriminator(inputs.tolist())
    with refuses(TypeError, what, torch.int64):
        discriminator(inputs.long())
    with refuses(ValueError, what, "discriminator", "meta", "cpu"):
        discriminator(inputs.to("meta"))
    with refuses(TypeError, "discriminator", "float32", torch.bfloat16, ".float()"):
        discriminator.bfloat16()(inputs)


# Training.
@pytest.mark.parametrize("spectral_norm", [False, True])
@pytest.mark.parametrize(("name", "objective"), TRAINED)
def test_confusion_moves_towards_source(name, objective, spectral_norm):
    discriminator, inputs = built(name, spectral_norm=spectral_norm)
    judge = semshift.frozen(discriminator)
    inputs.requires_grad_()
    logits = judge(inputs)
    confuse(logits, objective).backward()
    assert inputs.grad.norm() > 0
    # A hundredth of the inputs' length: short enough for the gradient to tell the way, long against float32's rounding.
    step = 0.01 * inputs.detach().norm() / inputs.grad.norm() * inputs.grad
    assert score(judge(inputs.detach() - step), objective) > score(logits, objective)


@pytest.mark.parametrize(("name", "objective"), TRAINED)
def test_training_tells_two_blobs_apart(name, objective):
    discriminator, inputs = built(name)
    blobs = [lambda: 1 + 0.1 * torch.randn_like(inputs), lambda: -1 + 0.1 * torch.randn_like(inputs)]
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.01)
    first = None
    for _ in range(60):
        loss = learn(discriminator(blobs[0]()), discriminator(blobs[1]()), objective)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    unseen = [discriminator(blob()) for blob in blobs]
    if objective == "class-and-domain":
        accuracy = semshift.class_domain_accuracy(*map(last, unseen))
    else:
        accuracy = semshift.domain_accuracy(*unseen)
    assert (accuracy.source.item(), accuracy.target.item()) == (1.0, 1.0)

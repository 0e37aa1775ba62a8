"""docs/troubleshooting.md: each row's message is the code's, and each row without one is what happens."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from semshift.discriminators import FCDiscriminator, PrototypeDiscriminator, frozen
from semshift.health import domain_accuracy, gradient_norm, prototype_distance
from semshift.labels import check_labels, remap_labels
from semshift.losses import confusion_loss, discriminator_loss, entropy_map
from semshift.pooling import class_sums

PAGE = (Path(__file__).parent.parent.parent / "docs" / "troubleshooting.md").read_text()
RAISES, SILENT = (
    {cells[0]: cells[1] for cells in re.findall(r"^\| (?!what you did)(.+?) \| (.+?) \| .+ \|$", part, flags=re.M)}
    for part in PAGE.split("## It does not raise")
)
F, Y = torch.randn(2, 256, 8, 16), torch.randint(0, 19, (2, 64, 128))


def masked(*ids):
    return torch.tensor([ids])


def twice():
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    critic = PrototypeDiscriminator(4, 2)
    means = class_sums(features * 2, torch.zeros(2, 3, 3, dtype=torch.int64), 2).means
    confusion_loss(frozen(critic)(means)).backward()
    discriminator_loss(critic(means), critic(means)).backward()


def without_graph():
    with torch.no_grad():
        features = nn.Conv2d(3, 256, 1)(torch.randn(2, 3, 8, 16))
    means = class_sums(features, Y, 19, resample="bilinear").means
    gradient_norm(confusion_loss(PrototypeDiscriminator(256, 19)(means)), features)


def pooled_apart():
    images = class_sums(F, Y, 19, resample="nearest", per_image=True)
    batch = class_sums(F, Y, 19, resample="nearest")
    confusion_loss(PrototypeDiscriminator(256, 19)(images.means), weight=batch.present)


MEANS = torch.zeros(19, 256)
CALLS = {
    "pooled features with labels of another size": lambda: class_sums(F, Y, 19),
    "kept a channel axis": lambda: class_sums(F, Y[:, None], 19, resample="bilinear"),
    "let the labels become floats": lambda: class_sums(F, Y.float(), 19, resample="bilinear"),
    "passed all stages": lambda: class_sums((F,), Y, 19, resample="bilinear"),
    "passed a transformer's tokens": lambda: class_sums(F.flatten(2).mT, Y, 19, resample="bilinear"),
    "left labels in the data set's own ids": lambda: check_labels(masked(7, 26, 33), 19),
    "wrote a table that lacks an id": lambda: remap_labels(masked(7, 34), {7: 0}),
    "marked ignored pixels by -100": lambda: check_labels(masked(7, -100), 19),
    "have more than 255 classes": lambda: class_sums(F, Y, 300, resample="bilinear"),
    "built the critic for another width": lambda: PrototypeDiscriminator(512, 19)(MEANS),
    "built the critic for other classes": lambda: PrototypeDiscriminator(256, 16)(MEANS),
    "cast everything to bfloat16": lambda: PrototypeDiscriminator(256, 19).bfloat16()(MEANS),
    "pooled `per_image=True`": pooled_apart,
    "gave logits to `entropy_map`": lambda: entropy_map(torch.tensor([[[3.0], [-1.5]]])),
    "gave a small map": lambda: FCDiscriminator(19)(torch.zeros(1, 19, 8, 16)),
    "computed target features without a graph": without_graph,
    "forgot `.detach()`": twice,
}


def losses(features, labels, critic, weight=1.0):
    """Both players' losses of features [2, C, h, w] of source and target, with what health says of them."""
    source, target = (class_sums(f[None], y[None], 4, resample="bilinear") for f, y in zip(features, labels))
    both = source.present & target.present
    confusion = weight * confusion_loss(frozen(critic)(target.means), weight=both)
    logits = [critic(pooled.means.detach()) for pooled in (source, target)]
    loss = discriminator_loss(*logits, source_weight=both, target_weight=both)
    accuracy = domain_accuracy(*logits, source_weight=both, target_weight=both)
    return confusion, loss, accuracy, prototype_distance(source.means, target.means, weight=both)


def batch():
    return torch.randn(2, 3, 16, 24), torch.randint(0, 4, (2, 16, 24))


def model(*more):
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), *more, nn.ReLU())


def probabilities():
    critic = nn.Sequential(PrototypeDiscriminator(16, 4), nn.Sigmoid())
    optimiser = torch.optim.Adam(critic.parameters(), 0.01)
    images, labels = batch()
    for _ in range(100):
        _, loss, accuracy, _ = losses(model()(images).detach(), labels, critic)
        assert accuracy == (1.0, 0.0)
        # Half of softplus(-1) + softplus(0): a probability of 1 for source and 0 for target.
        assert loss.item() > 0.5
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def nothing_labelled():
    images, labels = batch()
    labels[1] = 255
    network, critic = model(), PrototypeDiscriminator(16, 4)
    confusion, loss, accuracy, distance = losses(network(images), labels, critic)
    (confusion + loss).backward()
    assert confusion.item() == loss.item() == 0
    assert all(not p.grad.any() for p in (*network.parameters(), *critic.parameters()))
    assert accuracy.source.isnan()
    assert accuracy.target.isnan()
    assert distance.isnan().all()


def narrow(dtype, *, autocast):
    """Equal to float32 to the rounding of the features: 1 / 2 ** 8 or 2 ** 11 relative, through a few layers."""
    images, labels = batch()
    network, critic = model(), PrototypeDiscriminator(16, 4)
    expected = losses(network(images), labels, critic)[:2]
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            features = network(images)
            found = losses(features, labels, critic)[:2]
    else:
        network, images = network.to(dtype), images.to(dtype)
        features = network(images)
        found = losses(features, labels, critic)[:2]
    assert features.dtype == dtype
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=16 * torch.finfo(dtype).eps)
    found[0].backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def in_eval():
    images, labels = batch()
    network = model(nn.BatchNorm2d(16)).eval()
    before = network[1].running_mean.clone()
    losses(network(images), labels, PrototypeDiscriminator(16, 4))[0].backward()
    assert network[0].weight.grad.any()
    assert torch.equal(network[1].running_mean, before)


def one_player(*, critic_learns):
    """A hundred steps of the critic alone, or of the network alone; the critic's mean accuracy at the end."""
    images, labels = batch()
    images[1] += 1
    network, critic = model(), PrototypeDiscriminator(16, 4)
    player = critic if critic_learns else network
    optimiser = torch.optim.Adam(player.parameters(), 0.003)
    rights = []
    for _ in range(100):
        confusion, loss, accuracy, _ = losses(network(images), labels, critic)
        optimiser.zero_grad()
        (loss if critic_learns else confusion).backward()
        optimiser.step()
        rights.append((accuracy.source.item() + accuracy.target.item()) / 2)
    return sum(rights[-20:]) / 20


def critic_left_out():
    assert one_player(critic_learns=False) <= 0.75


def confusion_left_out():
    assert one_player(critic_learns=True) >= 0.95


def bad_ids_on_cuda():
    features, labels = torch.randn(2, 16, 4, 6, device="cuda"), torch.randint(0, 4, (2, 16, 24), device="cuda")
    wrong = labels.clone()
    wrong[0, 0, 0] = 99
    ignored = torch.where(wrong == 99, 255, wrong)
    found, expected = (class_sums(features, y, 4, resample="bilinear") for y in (wrong, ignored))
    assert torch.equal(found.mass, expected.mass)
    assert torch.equal(found.sums, expected.sums)
    with pytest.raises(ValueError, match=re.escape("expected labels in [0, 4) or ignore_index 255, got 99 (1 pixel)")):
        check_labels(wrong, 4)


def under_autocast():
    narrow(torch.bfloat16, autocast=True)
    narrow(torch.float16, autocast=True)


BEHAVIOUR = {
    "gave the losses probabilities": probabilities,
    "trained a batch in which one domain": nothing_labelled,
    "trained in half precision under autocast": under_autocast,
    "trained a model that is bfloat16 throughout": lambda: narrow(torch.bfloat16, autocast=False),
    "left the model in `eval`": in_eval,
    "left the critic out": critic_left_out,
    "left the confusion out": confusion_left_out,
    "left bad label ids": bad_ids_on_cuda,
}


@pytest.mark.parametrize(("rows", "tests"), [(RAISES, CALLS), (SILENT, BEHAVIOUR)], ids=["raises", "silent"])
def test_every_row_has_a_test(rows, tests):
    assert len(rows) == len(tests)
    assert all(row.startswith(start) for row, start in zip(rows, tests))


@pytest.mark.parametrize("start", CALLS)
def test_message(start):
    (cell,) = (cell for row, cell in RAISES.items() if row.startswith(start))
    promised = re.fullmatch(r"`(.+?)`( \(and more, from PyTorch\))?", cell)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        CALLS[start]()
    message = str(caught.value)
    assert message.startswith(promised[1]) if promised[2] else message == promised[1]


@pytest.mark.parametrize(
    "start",
    [pytest.param(start, marks=pytest.mark.gpu if start == "left bad label ids" else ()) for start in BEHAVIOUR],
)
def test_behaviour(start):
    if start == "left bad label ids" and not torch.cuda.is_available():
        pytest.skip("because there is no CUDA device")
    BEHAVIOUR[start]()

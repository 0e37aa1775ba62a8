"""docs/troubleshooting.md: each row's message is the code's, and each row without one is what happens."""

import collections
import copy
import re
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import semshift
from tests.errors import refuses

PAGE = (Path(__file__).parent.parent.parent / "docs" / "troubleshooting.md").read_text()
RAISES, SILENT = (
    {cells[0]: cells[1] for cells in re.findall(r"^\| (?!what you did)(.+?) \| (.+?) \| .+ \|$", part, flags=re.M)}
    for part in PAGE.split("## It does not raise")
)
F, Y = torch.randn(2, 256, 8, 16), torch.randint(0, 19, (2, 64, 128))
MEANS = torch.zeros(19, 256)


def now_and_then():
    """A figure behind a compiled head, after a step without one."""
    head = torch.compile(nn.Sequential(nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 19, 1)), backend="aot_eager")
    for asked in (False, True):
        features = F.clone().requires_grad_()
        loss = head(features).square().mean()
        if asked:
            semshift.gradient_norm(loss, features)
        loss.backward()


def masked(*ids):
    return torch.tensor([ids])


def align(channels=256):
    return semshift.SemanticAlignment(channels, 19)


def undetached():
    discriminator = semshift.PrototypeDiscriminator(256, 19)
    means = semshift.class_sums(F.clone().requires_grad_() * 2, Y, 19).means
    semshift.confusion_loss(semshift.frozen(discriminator)(means)).backward()
    semshift.discriminator_loss(discriminator(means), discriminator(means)).backward()


def pooled_apart():
    images = semshift.class_sums(F, Y, 19, per_image=True)
    batch = semshift.class_sums(F, Y, 19)
    semshift.confusion_loss(semshift.PrototypeDiscriminator(256, 19)(images.means), weight=batch.present)


class Network(nn.Module):
    """A backbone and a head, which return features and logits."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 19, 1)

    def forward(self, images):
        features = self.backbone(images)
        return features, self.head(features)


class Checkpointed(Network):
    def forward(self, images):
        features = self.backbone(images)
        return features, checkpoint(self.head, features, use_reentrant=True)


def balance(network, at=lambda features: features):
    features, logits = network(torch.randn(2, 3, 8, 16))
    losses = align()(features[:1], Y[:1], features[1:], Y[1:])
    semshift.balanced_weight(logits.square().mean(), losses.confusion, at(features), 0.1)


def hooked(network, name):
    """What a hook keeps of a network of which only the backbone runs."""
    kept = collections.deque(maxlen=2)
    network.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out))
    network.backbone(torch.randn(1, 3, 8, 16))
    return kept


def stored():
    network = Network()
    network.features = network(torch.randn(1, 3, 8, 16))[0]
    copy.deepcopy(network)


CALLS = {
    "transposed the labels": lambda: semshift.class_sums(F, Y.mT, 19),
    "kept a channel axis": lambda: semshift.class_sums(F, Y[:, None], 19),
    "let the labels become floats": lambda: semshift.class_sums(F, Y.float(), 19),
    "passed all stages": lambda: align()((F,), Y, F, Y),
    "passed a transformer's tokens": lambda: semshift.class_sums(F.flatten(2).mT, Y, 19),
    "left labels in the data set's own ids": lambda: semshift.check_labels(masked(7, 26, 33), 19),
    "wrote a table that lacks an id": lambda: semshift.remap_labels(masked(7, 34), {7: 0}),
    "marked ignored pixels by -100": lambda: semshift.check_labels(masked(7, -100), 19),
    "have more than 255 classes": lambda: semshift.class_sums(F, Y, 300),
    "built the alignment module for another width": lambda: align(512)(F, Y, F.clone().requires_grad_(), Y),
    "built the discriminator for another width": lambda: semshift.PrototypeDiscriminator(512, 19)(MEANS),
    "built the discriminator for other classes": lambda: semshift.PrototypeDiscriminator(256, 16)(MEANS),
    "cast everything to bfloat16": lambda: align().bfloat16()(F, Y, F.clone().requires_grad_(), Y),
    "computed target features without a graph": lambda: align()(F, Y, F, Y),
    "gave small maps to `GlobalAlignment`": lambda: semshift.GlobalAlignment(256)(F, F.clone().requires_grad_()),
    "gave a small map to `FCDiscriminator`": lambda: semshift.FCDiscriminator(19)(torch.zeros(1, 19, 8, 16)),
    "gave logits to `entropy_map`": lambda: semshift.entropy_map(torch.tensor([[[3.0], [-1.5]]])),
    "pooled `per_image=True`": pooled_apart,
    "asked `balanced_weight` or `gradient_norm`": lambda: balance(Network(), lambda features: features[:1]),
    "asked `balanced_weight` for the gradient in a network that is compiled": lambda: balance(
        torch.compile(Network(), backend="aot_eager")
    ),
    "asked `gradient_norm` now and then": now_and_then,
    "asked `balanced_weight` for the gradient in a network with activation": lambda: balance(Checkpointed()),
    "shared the batches of `MixedBatchSampler` out twice": lambda: prepare_data_loader(
        DataLoader(range(9), batch_sampler=semshift.MixedBatchSampler({"a": 9}, {"a": 1}, seed=0, world_size=2)),
        num_processes=2,
        process_index=0,
        put_on_device=False,
    ),
    "wrote the losses by hand and forgot": undetached,
    "hooked a layer that did not run": lambda: hooked(Network(), "head")[0],
    "stored features on the network": stored,
    "trained batch norm on one image": lambda: nn.BatchNorm2d(256)(F[:1].mean((2, 3), keepdim=True)),
}


def losses(align, features, labels):
    """An alignment module's losses of features [2, C, h, w] of source and target, and what its figures say."""
    confusion, discriminator, figures = align(features[:1], labels[:1], features[1:], labels[1:])
    return confusion, discriminator, {name: value.item() for name, value in figures.items()}


def batch():
    return torch.randn(2, 3, 16, 24), torch.randint(0, 4, (2, 16, 24))


def model(*more):
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), *more, nn.ReLU())


def small():
    return semshift.SemanticAlignment(16, 4)


def nothing_in_common():
    images, labels = batch()
    labels[1] = 255
    network, align = model(), small()
    confusion, loss, figures = losses(align, network(images), labels)
    (confusion + loss).backward()
    assert confusion.item() == loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in (*network.parameters(), *align.parameters()))
    assert all(value != value for value in figures.values())


def narrow(dtype, *, autocast):
    """Equal to float32 to the rounding of the features: 1 / 2 ** 8 or 2 ** 11 relative, through a few layers."""
    images, labels = batch()
    network, align = model(), small()
    expected = losses(align, network(images), labels)[:2]
    if autocast:
        with torch.autocast("cpu", dtype=dtype):
            features = network(images)
            found = losses(align, features, labels)[:2]
    else:
        features = network.to(dtype)(images.to(dtype))
        found = losses(align, features, labels)[:2]
    assert features.dtype == dtype
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=16 * torch.finfo(dtype).eps)
    found[0].backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def under_autocast():
    narrow(torch.bfloat16, autocast=True)
    narrow(torch.float16, autocast=True)


def model_in_eval():
    images, labels = batch()
    network = model(nn.BatchNorm2d(16)).eval()
    before = network[1].running_mean.clone()
    losses(small(), network(images), labels)[0].backward()
    assert network[0].weight.grad.any()
    assert torch.equal(network[1].running_mean, before)


def module_in_eval():
    """Whether the target's loss has a class that the source has shown in an earlier batch only."""
    images, labels = batch()
    labels[0], labels[1] = 0, 1
    before = labels.flip(0)
    for training, takes_part in ((True, True), (False, False)):
        align, network = small().train(training), model()
        losses(align, network(images), before)
        assert (losses(align, network(images), labels)[0].item() > 0) == takes_part
        assert bool(align.seen.any()) == training


def one_player(*, discriminator_learns):
    """A hundred steps of the discriminator alone, or of the network alone; the discriminator's accuracy at the end."""
    images, labels = batch()
    images[1] += 1
    network, align = model(), small()
    player = align if discriminator_learns else network
    optimiser = torch.optim.Adam(player.parameters(), 0.003)
    rights = []
    for _ in range(100):
        confusion, loss, figures = losses(align, network(images), labels)
        optimiser.zero_grad()
        (loss if discriminator_learns else confusion).backward()
        optimiser.step()
        rights.append((figures["source_accuracy"] + figures["target_accuracy"]) / 2)
    return sum(rights[-20:]) / 20


def discriminator_left_out():
    assert one_player(discriminator_learns=False) <= 0.75


def gradients_cleared():
    images, labels = batch()
    network, align = model(), small()
    optimiser = torch.optim.Adam(align.parameters(), 0.003)
    before = [parameter.detach().clone() for parameter in align.parameters()]
    for cleared in (True, False):
        losses(align, network(images), labels)[1].backward()
        if cleared:
            optimiser.zero_grad()
        optimiser.step()
        assert all(map(torch.equal, before, align.parameters())) == cleared


def confusion_left_out():
    assert one_player(discriminator_learns=True) >= 0.95


def probabilities():
    discriminator = nn.Sequential(semshift.PrototypeDiscriminator(16, 4), nn.Sigmoid())
    optimiser = torch.optim.Adam(discriminator.parameters(), 0.01)
    images, labels = batch()
    for _ in range(100):
        source, target = semshift.class_sums(model()(images).detach(), labels, 4, per_image=True).means
        outputs = discriminator(source), discriminator(target)
        assert semshift.domain_accuracy(*outputs) == (1.0, 0.0)
        loss = semshift.discriminator_loss(*outputs)
        # Half of softplus(-1) + softplus(0): a probability of 1 for source and 0 for target.
        assert loss.item() > 0.5
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def other_corners():
    images, labels = batch()
    features = model()(images).detach()
    up = nn.functional.interpolate(features, labels.shape[1:], mode="bilinear", align_corners=True)
    expected = semshift.class_sums(up, labels, 4).means
    told, untold = (semshift.class_sums(features, labels, 4, align_corners=aligned).means for aligned in (True, False))
    torch.testing.assert_close(told, expected)
    assert (untold - expected).norm() > 0.01 * expected.norm()


def features_of_a_teacher():
    images, labels = batch()
    network = model()
    teacher, align = copy.deepcopy(network), small()
    losses(align, teacher(images), labels)[0].backward()
    assert teacher[0].weight.grad.any()
    assert network[0].weight.grad is None
    with torch.no_grad():
        features = teacher(images)
    with refuses(ValueError, "target_features", "torch.no_grad"):
        losses(align, features, labels)


def bad_ids_on_cuda():
    features, labels = torch.randn(2, 16, 4, 6, device="cuda"), torch.randint(0, 4, (2, 16, 24), device="cuda")
    wrong = labels.clone()
    wrong[0, 0, 0] = 99
    ignored = torch.where(wrong == 99, 255, wrong)
    found, expected = (semshift.class_sums(features, y, 4) for y in (wrong, ignored))
    assert torch.equal(found.mass, expected.mass)
    assert torch.equal(found.sums, expected.sums)
    with pytest.raises(ValueError, match=r"labels .* 255, got 99 \(1 pixel\)"):
        semshift.check_labels(wrong, 4)


BEHAVIOUR = {
    "trained a batch in which no class takes part": nothing_in_common,
    "trained in half precision under autocast": under_autocast,
    "trained a model that is bfloat16 throughout": lambda: narrow(torch.bfloat16, autocast=False),
    "left the model in `eval`": model_in_eval,
    "left the alignment module in `eval`": module_in_eval,
    "left the discriminator out": discriminator_left_out,
    "cleared the discriminator's gradients": gradients_cleared,
    "left the confusion out": confusion_left_out,
    "gave the losses probabilities": probabilities,
    "up-sampled the logits with": other_corners,
    "gave the alignment the features of a teacher": features_of_a_teacher,
    "left bad label ids": bad_ids_on_cuda,
}


@pytest.mark.parametrize(("rows", "tests"), [(RAISES, CALLS), (SILENT, BEHAVIOUR)], ids=["raises", "silent"])
def test_every_row_has_a_test(rows, tests):
    assert len(rows) == len(tests)
    assert all(row.startswith(start) for row, start in zip(rows, tests))


@pytest.mark.parametrize("start", CALLS)
def test_message(start):
    (cell,) = (cell for row, cell in RAISES.items() if row.startswith(start))
    promised = re.fullmatch(r"`(.+?)`( \(and more\))?", cell)
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as caught:
        CALLS[start]()
    message = str(caught.value)
    assert message.startswith(promised[1]) if promised[2] else message == promised[1]


ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="because it needs a CUDA device"),
]


@pytest.mark.parametrize(
    "start",
    [pytest.param(start, marks=ON_CUDA if start == "left bad label ids" else ()) for start in BEHAVIOUR],
)
def test_behaviour(start):
    BEHAVIOUR[start]()

"""docs/troubleshooting.md: each entry's message is the code's, and each entry without a message is what happens."""

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
# An entry is a heading of the third level and the text below it, up to the next heading.
RAISES, SILENT = (
    dict(re.findall(r"^### (.+)\n((?:(?!##).*\n?)*)", part, flags=re.M)) for part in PAGE.split("## It does not raise")
)
F, Y = torch.randn(2, 256, 8, 16), torch.randint(0, 19, (2, 64, 128))
MEANS = torch.zeros(19, 256)


def now_and_then():
    """A gradient norm behind a compiled head, after a step without it."""
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
    """The outputs that a hook records in a network of which only the backbone runs."""
    kept = collections.deque(maxlen=2)
    network.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out))
    network.backbone(torch.randn(1, 3, 8, 16))
    return kept


def stored():
    network = Network()
    network.features = network(torch.randn(1, 3, 8, 16))[0]
    copy.deepcopy(network)


CALLS = {
    "The labels are transposed": lambda: semshift.class_sums(F, Y.mT, 19),
    "The labels have a channel axis": lambda: semshift.class_sums(F, Y[:, None], 19),
    "The labels are floats": lambda: semshift.class_sums(F, Y.float(), 19),
    "The labels have the data set's own ids": lambda: semshift.check_labels(masked(7, 26, 33), 19),
    "The table of `remap_labels` lacks an id": lambda: semshift.remap_labels(masked(7, 34), {7: 0}),
    "Ignored pixels are -100": lambda: semshift.check_labels(masked(7, -100), 19),
    "There are more than 255 classes": lambda: semshift.class_sums(F, Y, 300),
    "The features are all stages of a backbone": lambda: align()((F,), Y, F, Y),
    "The features are a transformer's tokens": lambda: semshift.class_sums(F.flatten(2).mT, Y, 19),
    "The alignment module has a different number of channels": lambda: align(512)(F, Y, F.clone().requires_grad_(), Y),
    "The discriminator has a different number of channels": lambda: semshift.PrototypeDiscriminator(512, 19)(MEANS),
    "The discriminator has a different number of classes": lambda: semshift.PrototypeDiscriminator(256, 16)(MEANS),
    "The alignment module was cast to bfloat16": lambda: align().bfloat16()(F, Y, F.clone().requires_grad_(), Y),
    "The target features have no graph": lambda: align()(F, Y, F, Y),
    "The maps for `GlobalAlignment` are too small": lambda: semshift.GlobalAlignment(256)(
        F, F.clone().requires_grad_()
    ),
    "The map for `FCDiscriminator` is too small": lambda: semshift.FCDiscriminator(19)(torch.zeros(1, 19, 8, 16)),
    "`entropy_map` got logits": lambda: semshift.entropy_map(torch.tensor([[[3.0], [-1.5]]])),
    "The weight is pooled over the batch, the prototypes per image": pooled_apart,
    "The discriminator's loss is not detached": undetached,
    "The features are a slice of the tensor": lambda: balance(Network(), lambda features: features[:1]),
    "The whole network is compiled": lambda: balance(torch.compile(Network(), backend="aot_eager")),
    "The head is compiled, and `gradient_norm` is called at some steps only": now_and_then,
    "The network uses activation checkpointing": lambda: balance(Checkpointed()),
    "The batches are distributed over processes twice": lambda: prepare_data_loader(
        DataLoader(range(9), batch_sampler=semshift.MixedBatchSampler({"a": 9}, {"a": 1}, seed=0, world_size=2)),
        num_processes=2,
        process_index=0,
        put_on_device=False,
    ),
    "The hook has recorded nothing": lambda: hooked(Network(), "head")[0],
    "The network cannot be copied": stored,
    "Batch norm gets one value per channel": lambda: nn.BatchNorm2d(256)(F[:1].mean((2, 3), keepdim=True)),
}


def losses(align, features, labels):
    """An alignment module's losses of features [2, C, h, w] of source and target, and its figures."""
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
    for training, counts in ((True, True), (False, False)):
        align, network = small().train(training), model()
        losses(align, network(images), before)
        assert (losses(align, network(images), labels)[0].item() > 0) == counts
        assert bool(align.seen.any()) == training


def train_one(*, discriminator_learns):
    """A hundred steps of the discriminator alone, or of the network alone; the discriminator's accuracy at the end."""
    images, labels = batch()
    images[1] += 1
    network, align = model(), small()
    trained = align if discriminator_learns else network
    optimiser = torch.optim.Adam(trained.parameters(), 0.003)
    rights = []
    for _ in range(100):
        confusion, loss, figures = losses(align, network(images), labels)
        optimiser.zero_grad()
        (loss if discriminator_learns else confusion).backward()
        optimiser.step()
        rights.append((figures["source_accuracy"] + figures["target_accuracy"]) / 2)
    return sum(rights[-20:]) / 20


def discriminator_left_out():
    assert train_one(discriminator_learns=False) <= 0.75


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
    assert train_one(discriminator_learns=True) >= 0.95


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
    right, wrong = (semshift.class_sums(features, labels, 4, align_corners=aligned).means for aligned in (True, False))
    torch.testing.assert_close(right, expected)
    assert (wrong - expected).norm() > 0.01 * expected.norm()


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
    "A batch has no class to compare": nothing_in_common,
    "Training uses half precision under autocast": under_autocast,
    "The model is in bfloat16, except for the alignment module": lambda: narrow(torch.bfloat16, autocast=False),
    "The model is in `eval` mode": model_in_eval,
    "The alignment module is in `eval` mode": module_in_eval,
    "The optimiser does not have the discriminator's parameters": discriminator_left_out,
    "The discriminator's gradients are cleared before its step": gradients_cleared,
    "The confusion loss is left out, or its weight is 0": confusion_left_out,
    "The losses get probabilities instead of logits": probabilities,
    "The network up-samples its logits with `align_corners=True`": other_corners,
    "The alignment module gets the features of a teacher": features_of_a_teacher,
    "Labels on CUDA have ids out of range": bad_ids_on_cuda,
}


@pytest.mark.parametrize(("entries", "tests"), [(RAISES, CALLS), (SILENT, BEHAVIOUR)], ids=["raises", "silent"])
def test_every_entry_has_a_test_and_a_fix(entries, tests):
    assert list(entries) == list(tests)
    assert all(re.search(r"^\*\*Fix:\*\* \S", text, flags=re.M) for text in entries.values())


def test_every_heading_and_every_message_belong_to_an_entry():
    assert len(re.findall(r"^###", PAGE, flags=re.M)) == len(CALLS) + len(BEHAVIOUR)
    # A block has two fences.
    assert PAGE.count("```") == 2 * len(CALLS)


@pytest.mark.parametrize("title", CALLS)
def test_message(title):
    """The page may break a message's lines anywhere; three dots stand for the rest of a message."""
    (block,) = re.findall(r"^```text\n(.+?)^```$", RAISES[title], flags=re.M | re.DOTALL)
    words = block.split()
    promised, cut = " ".join(words).removesuffix(" ..."), words[-1] == "..."
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)) as caught:
        CALLS[title]()
    message = str(caught.value)
    assert cut or "\n" not in message
    message = " ".join(message.split())
    assert message.startswith(promised) if cut else message == promised


ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="because it needs a CUDA device"),
]


@pytest.mark.parametrize(
    "title",
    [pytest.param(title, marks=ON_CUDA if "CUDA" in title else ()) for title in BEHAVIOUR],
)
def test_behaviour(title):
    BEHAVIOUR[title]()

"""Loops of one's own, as docs/scaling.md writes them: DDP, fully_shard and accumulation equal one plain process."""

import re
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import semshift

# What torch says of its own process groups is not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

DOCS = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
NAMES: dict = {}
for block in BLOCKS:
    exec(block, NAMES)

WORLD, STEPS, WEIGHT = 2, 50, 0.3
IMAGES, CLASSES, CHANNELS, SIZE = 4, 4, 8, (16, 24)
EPS = torch.finfo(torch.float64).eps


class Segmenter(nn.Module):
    """Features at stride 4, of a patch each, and logits at the labels' size."""

    def __init__(self, dropout):
        super().__init__()
        self.backbone = nn.Conv2d(3, CHANNELS, 4, stride=4)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(CHANNELS, CLASSES, 1)

    def forward(self, images):
        features = F.relu(self.backbone(images))
        logits = self.classifier(self.dropout(features))
        return features, F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def networks(dropout=0.0):
    torch.manual_seed(1)
    discriminator = semshift.PrototypeDiscriminator(CHANNELS, CLASSES, hidden_channels=(16,))
    return Segmenter(dropout).double(), discriminator.double()


def batch(step):
    """Images and labels of both domains; the second half, which is the second rank's, lacks much."""
    generator = torch.Generator().manual_seed(step)
    parts = []
    for shift in (0.0, 0.5):
        images = torch.randn(IMAGES, 3, *SIZE, generator=generator, dtype=torch.float64) + shift
        # To be told from the image: by the mean of a patch, three classes.
        means = F.avg_pool2d(images[:, 0], 4) - shift
        labels = torch.bucketize(means, torch.tensor([-0.1, 0.1], dtype=torch.float64))
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
        # The last class is on the first rank alone, and on none at every third step.
        labels[0, :3] = CLASSES - 1 if step % 3 else 255
        parts.append((images, labels))
    if step % 4 == 1:
        parts[1][1][IMAGES // 2 :] = 255  # no labelled target image on the second rank
    if step % 8 == 5:
        parts[0][1][:] = 255  # no labelled source image on any
    return parts


def plain_cross_entropy(logits, labels):
    total = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    return total / (labels != 255).sum().clamp(min=1)


def plain_prototypes(features, labels, num_classes):
    return semshift.class_sums(features, labels, num_classes)


def gradients(module):
    return {
        # A wrapper puts its name before.
        name.removeprefix("module."): (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in module.named_parameters()
    }


def train(how, rank=0, dropout=0.0, steps=STEPS):
    """A loop: losses of every step, and of the first what prototypes and gradients were."""
    network, discriminator = networks(dropout)
    mine = slice(None)
    cross_entropy, prototypes = plain_cross_entropy, plain_prototypes
    if how in ("ddp", "fsdp"):
        cross_entropy, prototypes = NAMES["whole_batch_cross_entropy"], NAMES["whole_batch_prototypes"]
        mine = slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
        network = DistributedDataParallel(network) if how == "ddp" else NAMES["sharded"](network)
        discriminator = DistributedDataParallel(discriminator)
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    discriminator_optimiser = torch.optim.Adam(discriminator.parameters(), 1e-3)
    found = {"losses": []}
    for step in range(steps):
        source, target = ((images[mine], labels[mine]) for images, labels in batch(step))
        optimiser.zero_grad()
        if how == "accumulation":
            parts = [[(x[i : i + 1], y[i : i + 1]) for i in range(IMAGES)] for x, y in (source, target)]
            of_source, of_target = NAMES["accumulate"](
                network, discriminator, *parts, num_classes=CLASSES, weight=WEIGHT, seed=step
            )
            losses = []
        else:
            torch.manual_seed(step)
            outputs = [network(images) for images, _ in (source, target)]
            of_source, of_target = (
                prototypes(features, labels, CLASSES) for (features, _), (_, labels) in zip(outputs, (source, target))
            )
            both = of_source.present & of_target.present
            segmentation = sum(cross_entropy(o[1], part[1]) for o, part in zip(outputs, (source, target)))
            confusion = semshift.confusion_loss(semshift.frozen(discriminator)(of_target.means), weight=both)
            (segmentation + WEIGHT * confusion).backward()
            losses = [segmentation.detach(), confusion.detach()]
        both = of_source.present & of_target.present
        judged = [discriminator(sums.means.detach()) for sums in (of_source, of_target)]
        discriminator_loss = semshift.discriminator_loss(*judged, source_weight=both, target_weight=both)
        discriminator_optimiser.zero_grad()
        discriminator_loss.backward()
        found["losses"].append(torch.stack([*losses, discriminator_loss.detach()]))
        if step == 0:
            found |= {"prototypes": of_target.means.detach(), "mass": of_target.mass}
            found |= {"gradients": gradients(network), "discriminator_gradients": gradients(discriminator)}
        optimiser.step()
        discriminator_optimiser.step()
    found["losses"] = torch.stack(found["losses"])
    found["weights"] = {
        name.removeprefix("module."): tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in network.state_dict().items()
    }
    return found


def work(rank, how, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(train(how, rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_process():
    return train("one process")


def bounds():
    """The bound on rounding in the gradients of step 0: n eps times the sum of magnitudes, for every layer passed.

    A gradient by a weight is a sum over n cells of products. Both factors have passed the layers between them and the
    loss, five at most, each a sum over no more than the label pixels of the batch.
    """
    network, _ = networks()
    n = IMAGES * SIZE[0] * SIZE[1]
    magnitudes = {}

    def keep(name):
        def hook(module, arguments, output):
            inputs = arguments[0].detach()
            inputs = F.unfold(inputs, module.kernel_size, stride=module.stride)

            def backward(gradient):
                by = torch.einsum("bol,bil->oi", gradient.flatten(2).abs(), inputs.abs()).reshape(module.weight.shape)
                magnitudes[f"{name}.weight"] = magnitudes.get(f"{name}.weight", 0) + by
                magnitudes[f"{name}.bias"] = magnitudes.get(f"{name}.bias", 0) + gradient.abs().sum((0, 2, 3))

            output.register_hook(backward)

        return hook

    for name in ("backbone", "classifier"):
        getattr(network, name).register_forward_hook(keep(name))
    _, discriminator = networks()
    (source, target) = batch(0)
    outputs = [network(images) for images, _ in (source, target)]
    sums = [plain_prototypes(o[0], part[1], CLASSES) for o, part in zip(outputs, (source, target))]
    loss = sum(plain_cross_entropy(o[1], part[1]) for o, part in zip(outputs, (source, target)))
    confusion = semshift.confusion_loss(
        semshift.frozen(discriminator)(sums[1].means), weight=sums[0].present & sums[1].present
    )
    (loss + WEIGHT * confusion).backward()
    largest = outputs[1][0].detach().abs().max().item()
    return {name: 5 * n * EPS * value for name, value in magnitudes.items()}, (n + 4) * EPS * largest


@pytest.mark.parametrize("how", ["ddp", "fsdp", "accumulation"])
def test_it_equals_one_process(how, one_process, tmp_path):
    if how == "accumulation":
        results = [train(how)]
    else:
        torch.multiprocessing.spawn(work, (how, str(tmp_path)), nprocs=WORLD)
        results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    of_gradients, of_prototypes = bounds()
    for found in results:
        expected = one_process["losses"][:, -found["losses"].shape[1] :]
        torch.testing.assert_close(found["losses"], expected, rtol=1e-5, atol=0)
        assert torch.equal(found["mass"], one_process["mass"])
        torch.testing.assert_close(found["prototypes"], one_process["prototypes"], rtol=0, atol=of_prototypes)
        assert found["gradients"].keys() == one_process["gradients"].keys() == of_gradients.keys()
        for name, gradient in one_process["gradients"].items():
            off = (found["gradients"][name] - gradient).abs()
            assert (off <= of_gradients[name]).all(), (name, off.max(), of_gradients[name].min())
        for name, weight in one_process["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-5, atol=1e-8)


def test_the_steps_hold_what_is_hard(one_process):
    """The oracle itself sees a batch without source labels, classes that are absent, and a loss that changes."""
    assert one_process["losses"].isfinite().all()
    assert (one_process["losses"][5::8, 1:] == 0).all()  # nothing to confuse without a source class
    assert (one_process["losses"][6::8, 1] > 0).all()
    assert one_process["losses"][-10:, 0].mean() < 0.9 * one_process["losses"][:10, 0].mean()


def test_accumulation_with_dropout_equals_one_graph():
    """Every micro-batch goes through once, in the same order and from the same seed, and all of them at once back."""
    seed, (source, target) = 7, batch(0)
    parts = [[(x[i : i + 1], y[i : i + 1]) for i in range(IMAGES)] for x, y in (source, target)]
    network, discriminator = networks(dropout=0.5)
    NAMES["accumulate"](network, discriminator, *parts, num_classes=CLASSES, weight=WEIGHT, seed=seed)
    accumulated = gradients(network)

    network.zero_grad()
    torch.manual_seed(seed)
    outputs = [[network(x) for x, _ in part] for part in parts]
    whole = [
        sum(plain_prototypes(features, y, CLASSES) for (features, _), (_, y) in zip(outs, part))
        for outs, part in zip(outputs, parts)
    ]
    both = whole[0].present & whole[1].present
    loss = WEIGHT * semshift.confusion_loss(semshift.frozen(discriminator)(whole[1].means), weight=both)
    for outs, (_, labels) in zip(outputs, (source, target)):
        loss = loss + plain_cross_entropy(torch.cat([logits for _, logits in outs]), labels)
    loss.backward()
    of_gradients, _ = bounds()
    for name, gradient in gradients(network).items():
        # Dropout by a half doubles what it leaves, on either way.
        assert ((accumulated[name] - gradient).abs() <= 4 * of_gradients[name].max()).all()


def test_plain_accumulation_is_another_estimator():
    """The claim of the docs: averaged micro-batch losses are not the loss of the whole batch, whose mean is pooled."""
    (sx, sy), (tx, ty) = batch(0)
    network, discriminator = networks()
    source = plain_prototypes(network(sx)[0], sy, CLASSES)

    def confusion(x, y):
        target = plain_prototypes(network(x)[0], y, CLASSES)
        return semshift.confusion_loss(
            semshift.frozen(discriminator)(target.means), weight=source.present & target.present
        )

    whole = confusion(tx, ty)
    plain = sum(confusion(tx[i : i + 1], ty[i : i + 1]) for i in range(IMAGES)) / IMAGES
    assert abs(whole - plain) > 1e-6


def aligned(rank=None):
    """The loop of docs/scaling.md with an alignment module, from images that are all labelled: weights after it."""
    network, _ = networks()
    torch.manual_seed(2)
    align = semshift.SemanticAlignment(CHANNELS, CLASSES, hidden_channels=(16,)).double()
    mine = slice(None) if rank is None else slice(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
    batches = [
        [part[mine] for images, labels in batch(step) for part in (images, labels.where(labels != 255, 0))]
        for step in range(STEPS)
    ]
    NAMES["train"](network, align, batches, semshift.Constant(WEIGHT))
    return {"network": dict(network.state_dict()), "align": dict(align.state_dict())}


def work_aligned(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(aligned(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_an_alignment_module_over_ranks_equals_one_process(tmp_path):
    one = aligned()
    torch.multiprocessing.spawn(work_aligned, (str(tmp_path),), nprocs=WORLD)
    start = networks()[0].state_dict()
    assert not any(torch.equal(start[name], weight) for name, weight in one["network"].items())
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for part, weights in one.items():
            torch.testing.assert_close(found[part], weights, rtol=1e-5, atol=1e-8)

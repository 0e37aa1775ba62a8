"""docs/your-loop.md: every section keeps its promises, and the code that it names equals semshift's part."""

import copy
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import semshift
from docs.pages import read_blocks
from examples.workbench.data.layouts import LAYOUTS
from tests.errors import refuses

PATH = Path(__file__).parent.parent.parent / "docs" / "your-loop.md"
PAGE = PATH.read_text()


def names(heading):
    """The variables that the code blocks have defined up to the end of a section."""
    begin = PAGE.index(f"\n## {heading}\n")
    end = PAGE.find("\n## ", begin + 1)
    last = (PAGE if end < 0 else PAGE[:end]).count("\n") + 1
    result = {}
    for block in read_blocks(PATH):
        if block.language == "python" and block.line <= last:
            exec(compile(block.code, f"{PATH.name}:{block.line}", "exec"), result)
    return result


def reached(loss, network):
    """Whether a loss has a gradient at a network's features."""
    return all(g.any() for g in torch.autograd.grad(loss, network.backbone.parameters(), retain_graph=True))


def test_pseudo_labels_are_ignored_where_unsure():
    n = names("You have no target labels")
    sure = n["logits_t"].softmax(1).amax(1) > 0.5
    assert sure.any()
    assert not sure.all()
    assert torch.equal(n["labels_t"] != 255, sure)
    assert reached(n["losses"].confusion, n["network"])


def test_mixed_images_take_no_source_part():
    n = names("You mix images, as DACS does")
    mask = n["mask"]
    assert mask.any()
    assert not mask.all()
    assert torch.equal(n["labels_m"][mask], n["labels_s"][mask])
    (gradient,) = torch.autograd.grad(n["losses"].confusion, n["features_m"])
    assert gradient.any()
    # A cell counts for the pixels of its neighbours too, by the interpolation.
    far = F.max_pool2d((~mask).float()[:, None], 8).squeeze(1)
    far = F.max_pool2d(far[:, None], 3, 1, 1).squeeze(1) == 0
    assert far.any()
    assert not gradient.movedim(1, -1)[far].any()


def test_the_labelled_loader_draws_evenly():
    n = names("A labelled target loader")
    drawn = torch.bincount(torch.tensor(list(n["sampler"])), minlength=3)
    assert drawn.sum() == 20
    assert drawn.max() - drawn.min() <= 1


def test_batches_of_one():
    n = names("Batches of one")
    align, losses = semshift.SemanticAlignment(32, 4), []
    for source, target in ((0, 1), (1, 0)):
        features = torch.randn(1, 32, 4, 6, requires_grad=True)
        labels = torch.full((2, 1, 32, 48), source)
        labels[1] = target
        losses.append(align(features, labels[0], features, labels[1]))
    # No class is in both images; in the second step each was seen before.
    assert [found.confusion.item() > 0 for found in losses] == [False, True]
    assert all(found.figures["prototype_distance"].isnan() for found in losses)
    message = "Expected more than 1 value per channel when training"
    assert f"`{message}`" in " ".join(PAGE.split())
    with refuses(ValueError, message):
        n["pooled"].train()(n["features_s"][:1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_two_ignore_ids(dtype):
    labels = torch.tensor([[0, 3, 250, 255]], dtype=dtype)
    expected = torch.tensor([[0, 3, 255, 255]], dtype=dtype)
    torch.testing.assert_close(torch.where(labels == 250, 255, labels), expected)
    torch.testing.assert_close(semshift.remap_labels(labels, {k: k for k in range(4)}, default=255), expected)


def test_a_mean_teacher():
    n = names("A mean teacher")
    network, teacher = n["network"], n["teacher"]
    features = network(n["images_t"])[0]
    losses = n["align"](n["features_s"], n["labels_s"], features, n["labels_s"])
    assert reached(losses.confusion, network)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert int(teacher.n_averaged) == 3
    copy.deepcopy(network)
    with torch.no_grad():
        features = teacher(n["images_t"])[0]
    with refuses(ValueError, "target_features", "torch.no_grad"):
        n["align"](n["features_s"], n["labels_s"], features, n["labels_s"])


def test_contrast_with_prototypes():
    n = names("Contrast with prototypes")
    assert n["bank_s"].present.any()
    assert n["bank_t"].present.any()
    features, labels = n["network"](n["images_t"])[0], n["pseudo"].labels.where(n["pseudo"].sure, 255)
    assert reached(semshift.prototype_contrast_loss(features, labels, n["prototypes"]), n["network"])


def replica(module):
    """A copy as nn.DataParallel makes it, with the parameters themselves."""
    result = module._replicate_for_data_parallel()
    result._parameters = dict(module._parameters)
    result._modules = {name: replica(child) for name, child in module._modules.items()}
    return result


def test_features_of_replicas():
    n = names("DataParallel")
    network, images = n["network"], torch.randn(4, 3, 32, 48)
    wrapper = n["parallel"].module
    assert isinstance(wrapper, n["WithFeatures"])
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda part: replica(wrapper)(part), images.chunk(2)))
    gathered = torch.cat([features for _, features in parts])
    torch.testing.assert_close(gathered, network.backbone(images))
    losses = semshift.SemanticAlignment(32, 4)(gathered[:2], n["labels_s"], gathered[2:], n["labels_s"])
    assert reached(losses.confusion, network)
    # Neither the wrapper nor the network itself leaves a tensor behind, which could not be copied.
    network(images)
    copy.deepcopy(wrapper)


def hot(labels, num_classes):
    return F.one_hot(torch.where(labels == 255, num_classes, labels), num_classes + 1).movedim(-1, 1)


def entropy():
    """Vu et al. 2019: the weighted self-information, over log K."""
    p = (4 * torch.randn(2, 19, 8, 8)).softmax(1)
    p[0, 0, 0] = 0
    bits = -p * torch.log2(p + 1e-30) / math.log2(19)
    torch.testing.assert_close(semshift.entropy_map(p), bits)


def convolutions(module):
    return [
        (m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in module.modules() if isinstance(m, nn.Conv2d)
    ]


def output_discriminator():
    """Tsai et al. 2018, section 4: five layers of 4 x 4, stride 2, channels 64, 128, 256, 512, 1; slope 0.2."""
    widths = [19, 64, 128, 256, 512, 1]
    discriminator = semshift.FCDiscriminator(19)
    assert convolutions(discriminator) == [(a, b, (4, 4), (2, 2)) for a, b in zip(widths, widths[1:])]
    slopes = [m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * 4
    assert convolutions(semshift.GlobalAlignment(19).discriminator) == convolutions(discriminator)


def downscaled():
    """Hoyer et al. 2022, appendix: the share of each class in a cell, ignored below 0.75."""
    labels = torch.randint(0, 3, (4, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[torch.rand(labels.shape) < 0.1] = 255
    # Exactly three quarters, and exactly one pixel less.
    labels[0, :4, :4], labels[0, 0, :4], labels[0, 4:8, :4], labels[0, 4, :4] = 1, 2, 1, 2
    labels[0, 5, 0] = 255
    shares, expected = F.avg_pool2d(hot(labels, 3).float(), 4).max(1)
    expected[(expected == 3) | (shares < 0.75)] = 255
    assert 0 < (expected == 255).float().mean() < 1
    found = semshift.resize_labels(labels, (8, 8), 3, resample="majority", min_share=0.75)
    assert torch.equal(found, expected)
    assert (found[0, 0, 0], found[0, 1, 0]) == (1, 255)


def pixel_discriminator():
    """Wang et al. 2020: 3 x 3 with 256 and 128 channels, and K outputs for each domain."""
    discriminator = semshift.ClassPixelDiscriminator(2048, 19)
    widths = [2048, 256, 128, 38]
    assert convolutions(discriminator) == [(a, b, (3, 3), (1, 1)) for a, b in zip(widths, widths[1:])]
    features = torch.randn(1, 2048, 3, 3)
    assert discriminator(features).shape == (1, 38, 3, 3)


def soft_losses():
    n = names("You have, use")

    def soft_cross_entropy(outputs, probabilities):
        return -(probabilities * outputs.log_softmax(-1)).sum(-1).mean()

    none = torch.zeros_like(n["p_s"])
    source = soft_cross_entropy(n["d_s"], torch.cat([n["p_s"], none], -1))
    target = soft_cross_entropy(n["d_t"], torch.cat([none, n["p_t"]], -1))
    torch.testing.assert_close(n["for_discriminator"], source / 2 + target / 2)
    towards = soft_cross_entropy(n["d_t"], torch.cat([n["p_t"], none], -1))
    torch.testing.assert_close(n["confusion"], towards)


def class_mixing():
    """Tranheden et al. 2021: half of the classes of an image; the share of pixels above 0.968."""
    labels, logits = torch.arange(4).repeat(2, 8, 2), 6 * torch.randn(2, 4, 16, 16)
    mask = semshift.class_mix(labels, 4)
    for one, of_image in zip(labels, mask):
        assert one[of_image].unique().numel() == 2
        assert torch.equal(of_image, torch.isin(one, one[of_image].unique()))
    share = (logits.softmax(1).amax(1) > 0.968).flatten(1).float().mean(1)
    torch.testing.assert_close(semshift.pseudo_labels(logits).weight, share)


def polynomial():
    schedule = semshift.Polynomial(2.5e-4, 0.0, 100, 0.9)
    for step in (0, 1, 50, 99):
        assert schedule(step) == pytest.approx(2.5e-4 * (1 - step / 100) ** 0.9, rel=1e-12)


def confusion_matrix():
    """Over two images, with ignored pixels, a class that occurs in one of them only and one that never occurs."""
    n = names("You have, use")
    matrix, iou = n["matrix"], n["iou"]
    for metric in (matrix, iou):
        metric.reset()
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for classes in (2, 3):
        predicted, labels = torch.randint(0, classes, (2, 1, 16, 16))
        labels[0, 0] = 255
        for one, other in zip(labels.flatten().tolist(), predicted.flatten().tolist()):
            if one != 255:
                expected[one, other] += 1
        for metric in (matrix, iou):
            metric.update(predicted, labels)
    assert torch.equal(matrix.compute(), expected)
    union = expected.sum(0) + expected.sum(1) - expected.diagonal()
    torch.testing.assert_close(iou.compute(), expected.diagonal() / union, equal_nan=True)
    assert iou.compute().isnan().tolist() == [False, False, False, True]


def moving_average():
    n = names("A mean teacher")
    network, teacher = n["network"], n["teacher"]
    expected = [average.detach().clone() for average in teacher.module.parameters()]
    with torch.no_grad():
        for average, parameter in zip(expected, network.parameters()):
            parameter.add_(torch.randn_like(parameter))
            average.mul_(0.999).add_(parameter, alpha=0.001)
    teacher.update_parameters(network)
    for average, parameter in zip(expected, teacher.module.parameters()):
        torch.testing.assert_close(parameter.detach(), average)


def train_ids():
    ids = list(LAYOUTS["cityscapes"].ids.values())
    assert names("You have, use")["TRAIN_IDS"] == {old: new for new, old in enumerate(ids)}


SAME = {
    "`prob_2_entropy` (ADVENT)": entropy,
    "`get_fc_discriminator`, `FCDiscriminator` (ADVENT, AdaptSegNet)": output_discriminator,
    "`downscale_label_ratio` (DAFormer)": downscaled,
    "`PixelDiscriminator` (FADA)": pixel_discriminator,
    "FADA's losses of soft labels": soft_losses,
    "ClassMix and the weight of pseudo-labels (DACS, DAFormer)": class_mixing,
    "`lr_poly`": polynomial,
    "`fast_hist`, `per_class_iu`": confusion_matrix,
    "an EMA teacher with a loop over parameters": moving_average,
    "Cityscapes' `label2train`": train_ids,
}


@pytest.mark.parametrize("row", SAME)
def test_you_have_use(row):
    SAME[row]()


def test_every_row_is_compared():
    table = PAGE[PAGE.index("| you have | use | mind |") :].split("\n\n")[0]
    assert re.findall(r"^\| (.+?) \|", table, flags=re.M)[1:] == list(SAME)

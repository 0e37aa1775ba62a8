"""Nothing depends on the default dtype or device: explicit tensors give bit-identical results under all of them."""

import contextlib

import pytest
import torch
from torch.utils import _pytree as pytree

import semshift


@contextlib.contextmanager
def dtype(kind):
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "float16": lambda: dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}
torch.manual_seed(0)
FEATURES, LABELS = torch.randn(2, 3, 8, 10), torch.tensor([0, 1, 3, 255])[torch.randint(0, 4, (2, 16, 21))]
IDS = LABELS.where(LABELS != 255, 0)
LOGITS, OTHER, WEIGHT = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4)
MAPS, KEYS, PROTOTYPES = torch.randn(2, 4, 32, 33), torch.rand(2, 4), torch.randn(2, 4, 3)
MASKS = {"source_weight": WEIGHT, "target_weight": WEIGHT > 0.5}
CLASSES = {"source_classes": WEIGHT[:, :2], "target_classes": WEIGHT[:, 2:]}
BANK, ALIGN, GLOBAL = semshift.PrototypeBank(3, 4), semshift.SemanticAlignment(3, 4), semshift.GlobalAlignment(4)
DISCRIMINATORS = [
    semshift.FCDiscriminator(4, base_channels=2, spectral_norm=True).eval(),
    semshift.PrototypeDiscriminator(3, 4).eval(),
    semshift.ClassPixelDiscriminator(3, 4, hidden_channels=(2,)).eval(),
]


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def derived(function, *tensors):
    """A scalar and its gradients."""
    leaves = [leaf(tensor) for tensor in tensors]
    loss = function(*leaves)
    return loss, torch.autograd.grad(loss, leaves)


def bank():
    BANK.load_state_dict({"sums": torch.full((4, 3), 2.0, device="cpu", dtype=torch.float32), "mass": KEYS[0]})
    pooled = semshift.class_sums(FEATURES, LABELS, 4)
    BANK.update(pooled)
    return BANK(pooled), BANK.means, BANK.sums.clone(), BANK.mass.clone()


def by_modes(resample):
    return lambda: derived(
        lambda f: semshift.class_sums(f, LABELS, 4, resample=resample).means.square().sum(), FEATURES
    )


CALLS = {
    **{f"class_sums {resample}": by_modes(resample) for resample in ("nearest", "majority", "area", "bilinear")},
    "class_sums per image": lambda: semshift.class_sums(FEATURES, LABELS[:, :8, :10], 4, per_image=True),
    "class_sums of half": lambda: semshift.class_sums(FEATURES.half(), LABELS, 4, align_corners=True),
    "weighted_class_sums": lambda: semshift.weighted_class_sums(FEATURES, FEATURES.square()),
    "resize_labels": lambda: semshift.resize_labels(LABELS, (5, 6), 4, resample="majority", min_share=0.4),
    "class_shares": lambda: semshift.class_shares(LABELS, (5, 6), 4, resample="area"),
    "check_labels": lambda: semshift.check_labels(LABELS, 4),
    "remap_labels": lambda: semshift.remap_labels(LABELS, {0: 7, 1: 3, 3: 2}, default=255),
    "class_mix": lambda: semshift.class_mix(LABELS, 4, keys=KEYS),
    "class_mix drawn": lambda: semshift.class_mix(LABELS, 4, generator=torch.Generator("cpu").manual_seed(3)),
    "pseudo_labels": lambda: semshift.pseudo_labels(LOGITS, threshold=0.4),
    "discriminator_loss": lambda: derived(lambda a, b: semshift.discriminator_loss(a, b, **MASKS), LOGITS, OTHER),
    "confusion_loss": lambda: derived(lambda a: semshift.confusion_loss(a, weight=WEIGHT), LOGITS),
    "confusion_loss of half": lambda: semshift.confusion_loss(LOGITS.bfloat16(), weight=WEIGHT > 0.3),
    "class_discriminator_loss": lambda: semshift.class_discriminator_loss(LOGITS, OTHER, **CLASSES),
    "class_confusion_loss": lambda: semshift.class_confusion_loss(LOGITS, classes=WEIGHT[:, :2], weight=WEIGHT[:, 0]),
    "entropy_map": lambda: derived(lambda a: semshift.entropy_map(a.softmax(1)).square().sum(), MAPS),
    "r1_penalty": lambda: derived(lambda a: semshift.r1_penalty(a.pow(3).sum(1), a, weight=WEIGHT[:, 0]), LOGITS),
    "reverse_gradient": lambda: derived(lambda a: semshift.reverse_gradient(a, scale=0.3).pow(2).sum(), LOGITS),
    "domain_accuracy": lambda: semshift.domain_accuracy(LOGITS, OTHER, **MASKS),
    "class_domain_accuracy": lambda: semshift.class_domain_accuracy(LOGITS, OTHER),
    "gradient_norm": lambda: semshift.gradient_norm((a := leaf(LOGITS)).square().sum(), a),
    "balanced_weight": lambda: semshift.balanced_weight((a := leaf(LOGITS)).square().sum(), a.exp().sum(), a, 0.1),
    "prototype_distance": lambda: semshift.prototype_distance(LOGITS, OTHER, weight=WEIGHT[:, 0] > 0.1),
    "prototype_contrast_loss": lambda: derived(
        lambda f, p: semshift.prototype_contrast_loss(f, LABELS, p, resample="area"), FEATURES, PROTOTYPES
    ),
    "prototype_contrast_loss of half": lambda: semshift.prototype_contrast_loss(FEATURES.half(), LABELS, PROTOTYPES),
    "bank": bank,
    "discriminators": lambda: [net(x) for net, x in zip(DISCRIMINATORS, (MAPS, LOGITS.mT, FEATURES))],
    "frozen": lambda: derived(lambda a: semshift.frozen(DISCRIMINATORS[2])(a).square().sum(), FEATURES),
    "SemanticAlignment": lambda: ALIGN(leaf(FEATURES), LABELS, leaf(FEATURES.flip(0)), LABELS.flip(0)),
    "GlobalAlignment": lambda: GLOBAL(MAPS, leaf(MAPS.flip(0)), size=(40, 41)),
    "all_gather": lambda: (semshift.all_gather(LOGITS), semshift.all_reduce_sum(LOGITS)),
    "schedules": lambda: [kind(0, 1, 20)(7) for kind in (semshift.Linear, semshift.Sigmoid, semshift.Cosine)],
    "rare_class_weights": lambda: semshift.rare_class_weights(torch.tensor([[3, 0, 5], [0, 2, 9]], device="cpu")),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits(call, default):
    torch.manual_seed(0)
    want = CALLS[call]()
    torch.manual_seed(0)
    with DEFAULTS[default]():
        found = CALLS[call]()
    for one, other in zip(*(pytree.tree_leaves(side) for side in (found, want)), strict=True):
        # Dtypes and devices are compared too.
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_bank_is_made_in_float32(kind):
    with dtype(kind):
        made = semshift.PrototypeBank(3, 4)
    assert made.sums.dtype == made.mass.dtype == torch.float32

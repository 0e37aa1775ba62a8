"""The alignment modules refuse bad input, with one line that names the argument, the rule and the value."""

import re

import pytest
import torch

import semshift

C, K = 4, 3
MAPS, META = torch.zeros(2, C, 8, 12), torch.zeros(2, C, 8, 12, device="meta", requires_grad=True)
GRAD = MAPS.clone().requires_grad_()
LABELS, WIDE = torch.zeros(2, 16, 24, dtype=torch.int64), torch.zeros(2, K, 32, 40, requires_grad=True)
SUMS = semshift.class_sums(MAPS, LABELS, K)
GOOD = {"source_features": MAPS, "source_labels": LABELS, "target_features": GRAD, "target_labels": LABELS}


def semantic(**options):
    return semshift.SemanticAlignment(C, K, **options)


def spatial(**options):
    return semshift.GlobalAlignment(K, base_channels=2, **options)


def sums(rows=K, width=C, mass=K, device="cpu"):
    return semshift.ClassSums(
        torch.zeros(rows, width, device=device), torch.ones(mass, dtype=torch.int64, device=device)
    )


def called(**changes):
    """Call `forward` with some of its arguments replaced."""
    return semantic()(**{**GOOD, **changes})


def weighed(loss=None, confusion=None, ratio=0.1):
    return semshift.balanced_weight(*(GRAD.sum() if x is None else x for x in (loss, confusion)), GRAD, ratio)


BAD = {
    # Arguments of the modules.
    "in_channels": (lambda: semshift.SemanticAlignment(True, K), TypeError, "in_channels .*True"),
    "num_classes": (lambda: semshift.SemanticAlignment(C, torch.tensor(3)), TypeError, r"num_classes .*tensor\(3\)"),
    "no class": (lambda: semshift.SemanticAlignment(C, 0), ValueError, "num_classes .*1.* 0"),
    "256 classes": (lambda: semshift.SemanticAlignment(C, 256), ValueError, "ignore_index .*255.*256"),
    "hidden_channels": (lambda: semshift.SemanticAlignment(C, K, hidden_channels=8), TypeError, "hidden_channels .*8"),
    "conditioning": (lambda: semantic(conditioning="x"), ValueError, "conditioning .*per-class.*'x'"),
    "objective": (lambda: semantic(objective="x"), ValueError, "objective .*hinge.*'x'"),
    "resample": (lambda: semantic(resample=None), ValueError, "resample .*nearest.*None"),
    "ignore_index": (lambda: semantic(ignore_index=1.5), TypeError, "ignore_index .*1.5"),
    **{
        flag: (lambda flag=flag: semantic(**{flag: 1}), TypeError, f"{flag} .*bool.* 1")
        for flag in ("align_corners", "per_image", "spectral_norm")
    },
    "corners": (lambda: semantic(align_corners=True, resample="area"), ValueError, "align_corners .*bilinear.*'area'"),
    "class-and-domain": (
        lambda: semantic(conditioning="class-and-domain", objective="hinge"),
        ValueError,
        "objective 'bce' .*class-and-domain.*'hinge'",
    ),
    "global one class": (lambda: semshift.GlobalAlignment(1), ValueError, "num_classes .*2.* 1"),
    "global bool": (lambda: semshift.GlobalAlignment(True), TypeError, "num_classes .*True"),
    "base_channels": (lambda: semshift.GlobalAlignment(K, base_channels=2.0), TypeError, "base_channels .*2.0"),
    "inputs": (lambda: spatial(inputs="logits"), ValueError, "inputs .*entropy.*'logits'"),
    "global objective": (lambda: spatial(objective="x"), ValueError, "objective .*hinge.*'x'"),
    "global norm": (lambda: spatial(spectral_norm=1), TypeError, "spectral_norm .*bool.* 1"),
    # Features and labels.
    "width": (lambda: called(source_features=WIDE), ValueError, r"source_features .*4.*\[2, 3, 32, 40\]"),
    "integers": (lambda: called(target_features=LABELS), TypeError, "target_features .*int64"),
    "list": (lambda: called(source_features=[1]), TypeError, "source_features .*list"),
    "float labels": (lambda: called(source_labels=MAPS[:, 0]), TypeError, "source_labels: .*labels .*float32"),
    "shapes": (lambda: called(target_labels=LABELS[:1]), ValueError, r"target_labels: .*labels .*\[1, 16, 24\]"),
    "range": (lambda: called(target_labels=LABELS + 3), ValueError, "target_labels: .*labels .*255.* 3 .*768"),
    "transposed": (
        lambda: called(source_labels=LABELS.mT),
        ValueError,
        r"source_labels: .*labels .*\[2, 24, 16\].*transposed",
    ),
    "no graph": (lambda: called(target_features=MAPS), ValueError, r"target_features .*compare\(\)"),
    "half": (lambda: semantic().half()(**GOOD), TypeError, r"discriminator .*float16.*\.float\(\)"),
    "meta labels": (lambda: called(source_labels=LABELS.to("meta")), ValueError, "source_labels: .*labels .*meta"),
    "meta source": (
        lambda: called(source_features=META.detach(), source_labels=LABELS.to("meta")),
        ValueError,
        "source .*module .*meta and cpu",
    ),
    "meta target": (
        lambda: called(target_features=META, target_labels=LABELS.to("meta")),
        ValueError,
        "target .*meta and cpu",
    ),
    "meta module": (lambda: semantic().to("meta")(**GOOD), ValueError, "source .*cpu and meta"),
    # Sums.
    "tensors": (lambda: semantic().compare(SUMS, MAPS), TypeError, "target .*ClassSums.*Tensor"),
    "confusion": (lambda: semantic().compare(SUMS, SUMS, target_confusion=3), TypeError, "target_confusion .*int"),
    "sums width": (lambda: semantic().compare(SUMS, sums(width=5)), ValueError, r"target .*\[3, 4\].*\[3, 5\]"),
    "sums classes": (lambda: semantic().compare(sums(2, mass=2), SUMS), ValueError, r"source .*\[3, 4\].*\[2, 4\]"),
    "sums mass": (lambda: semantic().compare(sums(mass=2), SUMS), ValueError, r"source .*mass \[3\].*\[2\]"),
    "sums device": (
        lambda: semantic().compare(SUMS, SUMS, target_confusion=sums(device="meta")),
        ValueError,
        "target_confusion .*meta and cpu",
    ),
    # Output maps.
    "maps": (lambda: spatial()(WIDE, WIDE[:, :2]), ValueError, r"target_logits .*3.*\[2, 2, 32, 40\]"),
    "maps 3d": (lambda: spatial()(WIDE[0], WIDE), ValueError, r"source_logits .*\[3, 32, 40\]"),
    "maps integers": (lambda: spatial()(LABELS, WIDE), TypeError, "source_logits .*int64"),
    "small": (lambda: spatial()(WIDE, WIDE[..., :31]), ValueError, "32.*32 x 31 for target_logits: .*size="),
    "small size": (lambda: spatial()(WIDE, WIDE, (16, 40)), ValueError, "32.*16 x 40"),
    "size": (lambda: spatial()(WIDE, WIDE, 64), ValueError, "size .*64"),
    "size bool": (lambda: spatial()(WIDE, WIDE, (True, 64)), TypeError, "size .*True"),
    "global corners": (lambda: spatial()(WIDE, WIDE, align_corners=1), TypeError, "align_corners .*bool.* 1"),
    "global no graph": (lambda: spatial()(WIDE, WIDE.detach()), ValueError, "target_logits .*graph"),
    "global half": (lambda: spatial().bfloat16()(WIDE, WIDE), TypeError, r"discriminator .*bfloat16.*\.float\(\)"),
    "global meta": (lambda: spatial()(WIDE, META[:, :K]), ValueError, "target_logits .*meta and cpu"),
    # The balanced weight.
    "ratio": (lambda: weighed(ratio=-1), ValueError, "ratio .*-1"),
    "ratio nan": (lambda: weighed(ratio=float("nan")), ValueError, "ratio .*nan"),
    "ratio bool": (lambda: weighed(ratio=True), TypeError, "ratio .*True"),
    "loss": (lambda: weighed(loss=GRAD), ValueError, r"loss .*scalar.*\[2, 4, 8, 12\]"),
    "confusion loss": (lambda: weighed(confusion=1.0), TypeError, "confusion .*float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as raised:
        call()
    assert re.search(words, str(raised.value))
    assert "\n" not in str(raised.value)

"""The learners of a run: the segmenter, its teacher, the alignments, and their optimisers and schedules."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import semshift
from examples.workbench.networks.segmentation import Segmenter
from examples.workbench.settings import AlignmentSettings, OptimiserSettings, SelfTraining, Settings

__all__ = ["ClassCounts", "Learners", "build_alignment", "build_learners", "source_schedule", "weight_schedule"]

Alignment = semshift.GlobalAlignment | semshift.SemanticAlignment


class ClassCounts(nn.Module):
    """Number of pixels of each class in the labels seen so far, for source and for labelled images, over all ranks."""

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, num_classes, dtype=torch.int64))

    def add(self, domain: str, labels: Tensor) -> None:
        """Count labels `[B, H, W]` in `[0, K)`; larger values mark pixels without a class."""
        k = self.counts.shape[1]
        pixels = torch.bincount(labels.flatten().clamp(max=k), minlength=k + 1)[:k]
        self.counts[0 if domain == "source" else 1] += semshift.all_reduce_sum(pixels)

    def log_shares(self, domain: str) -> Tensor:
        """Logarithm of the class frequencies `[K]` of source images, or of target images, labelled or not."""
        # One pixel is added, so that a class that has not been seen yet has a frequency above 0.
        counts = self.counts[0 if domain == "source" else 1] + 1
        return (counts / counts.sum()).log()


@dataclass(frozen=True, eq=False)
class Learners:
    """The state of a run, except for its step. The dicts are keyed by `segmenter` and the names of the alignments.

    `weights` has the loss weights: of the alignments' confusion losses, of `self-training`, of `contrast`, and of the
    `source` cross-entropy. `prototypes` has a bank for each labelled domain if there is a contrast loss.
    """

    segmenter: Segmenter
    teacher: AveragedModel | None
    alignments: dict[str, Alignment]
    class_counts: ClassCounts
    prototypes: dict[str, semshift.PrototypeBank]
    optimisers: dict[str, torch.optim.Optimizer]
    learning_rates: dict[str, semshift.Schedule]
    weights: dict[str, semshift.Schedule]

    def networks(self) -> dict[str, nn.Module]:
        """The networks that an evaluation needs."""
        return {"segmenter": self.segmenter} | ({} if self.teacher is None else {"teacher": self.teacher})

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """All parts with a state that a checkpoint saves."""
        parts: dict[str, nn.Module | torch.optim.Optimizer] = {**self.networks(), "class counts": self.class_counts}
        parts |= {f"{name} alignment": alignment for name, alignment in self.alignments.items()}
        parts |= {f"{name} prototypes": bank for name, bank in self.prototypes.items()}
        return parts | {f"{name} optimiser": optimiser for name, optimiser in self.optimisers.items()}

    def set_learning_rates(self, step: int) -> None:
        """Set the learning rate of every optimiser for this step."""
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = group.get("factor", 1.0) * self.learning_rates[name](step)


def build_learners(settings: Settings, segmenter: Segmenter) -> Learners:
    """The learners of a run, on the segmenter's device and in its dtype."""
    like, how, plus = next(segmenter.parameters()), settings.alignments, settings.self_training
    alignments = {name: build_alignment(name, settings, segmenter.feature_channels).to(like) for name in how}
    optimisers: dict[str, torch.optim.Optimizer] = {"segmenter": _build_optimiser(settings, segmenter)}
    for name, alignment in alignments.items():
        optimisers[name] = torch.optim.Adam(alignment.parameters(), how[name].learning_rate, betas=(0.9, 0.99))
    rates: dict[str, semshift.Schedule] = {}
    learning: dict[str, OptimiserSettings | AlignmentSettings] = {"segmenter": settings.optimiser, **how}
    for name, each in learning.items():
        decay_steps = settings.optimiser.decay_steps or settings.steps
        rates[name] = semshift.Polynomial(each.learning_rate, 0.0, decay_steps, power=each.power)
    weights = {name: weight_schedule(each, settings.steps) for name, each in how.items()}
    weights["source"] = source_schedule(settings)
    teacher: AveragedModel | None = None
    prototypes: dict[str, semshift.PrototypeBank] = {}
    k = len(settings.data.classes)
    if "self-training" in settings.parts:
        weights["self-training"] = weight_schedule(plus, settings.steps)
        weights["contrast"] = weight_schedule(dataclasses.replace(plus, weight=plus.contrast_weight), settings.steps)
        if plus.contrast_weight > 0:
            for domain in ("source", "labelled"):
                bank = semshift.PrototypeBank(segmenter.feature_channels, k, momentum=plus.contrast_momentum)
                prototypes[domain] = bank.to(like)
        teacher = AveragedModel(segmenter, multi_avg_fn=get_ema_multi_avg_fn(plus.momentum))  # type: ignore[no-untyped-call]
        teacher.eval()
    counts = ClassCounts(k).to(like.device)
    return Learners(segmenter, teacher, alignments, counts, prototypes, optimisers, rates, weights)


def build_alignment(name: str, settings: Settings, feature_channels: int) -> Alignment:
    """The alignment called `global`, `auxiliary` or `semantic`. Each has its own seed for its initial weights."""
    torch.manual_seed(settings.seed + {"global": 1, "semantic": 2, "auxiliary": 3}[name])
    classes, g, s = len(settings.data.classes), settings.global_alignment, settings.semantic_alignment
    if name != "semantic":
        return semshift.GlobalAlignment(
            classes,
            inputs="entropy" if g.inputs == "entropy" else "probabilities",
            base_channels=g.base_channels,
            objective=g.objective,
            spectral_norm=g.spectral_norm,
        )
    return semshift.SemanticAlignment(
        feature_channels,
        classes,
        hidden_channels=s.hidden_channels,
        conditioning=s.conditioning,
        objective=s.objective,
        spectral_norm=s.spectral_norm,
        resample=s.resample,
        per_image=s.per_image,
        ignore_index=settings.data.ignore_index,
    )


def _build_optimiser(settings: Settings, segmenter: Segmenter) -> torch.optim.Optimizer:
    how, classifier = settings.optimiser, segmenter.classifier_parameters()
    groups: list[dict[str, Any]] = [{"params": list(segmenter.parameters())}]
    if how.classifier_factor != 1:
        chosen = set(classifier)
        groups = [{"params": [parameter for parameter in segmenter.parameters() if parameter not in chosen]}]
        groups.append({"params": classifier, "factor": how.classifier_factor})
    if how.name == "adamw":
        return torch.optim.AdamW(groups, how.learning_rate, weight_decay=how.weight_decay)
    return torch.optim.SGD(groups, how.learning_rate, momentum=0.9, weight_decay=how.weight_decay)


def source_schedule(settings: Settings) -> semshift.Schedule:
    """Weight of the source's cross-entropy: 1; with `source_fade` it falls linearly to 0 at the end of the run."""
    fade = settings.self_training.source_fade if "self-training" in settings.parts else 0.0
    steps = round(fade * settings.steps)
    if not steps:
        return semshift.Constant(1.0)
    fall = semshift.Polynomial(1.0, 0.0, steps, power=1.0)
    return semshift.Then(semshift.Constant(1.0), settings.steps - steps, fall) if steps < settings.steps else fall


def weight_schedule(how: AlignmentSettings | SelfTraining, steps: int) -> semshift.Schedule:
    """Weight of a confusion loss or of self-training: 0 until `start`, then a sigmoid ramp to `weight`."""
    start, ramp = round(how.start * steps), round(how.ramp * steps)
    risen = semshift.Sigmoid(0.0, how.weight, ramp) if ramp else semshift.Constant(how.weight)
    return semshift.Then(semshift.Constant(0.0), start, risen) if start else risen

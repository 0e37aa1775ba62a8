"""The networks of a run, their optimisers and the weights of its losses, from its settings."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import semshift
from examples.workbench.settings import METHODS, GlobalSettings, SelfTraining, SemanticSettings, Settings
from examples.workbench.training.checkpoints import Stateful

__all__ = [
    "Learners",
    "Schedules",
    "Segmenter",
    "discriminator_settings",
    "build_discriminator",
    "build_learners",
    "build_optimiser",
    "build_schedules",
    "build_segmenter",
    "dtype_of",
    "load_init",
    "source_schedule",
    "weight_schedule",
]


@dataclass(frozen=True, eq=False)
class Learners:
    """What learns in a run; which of them exist is all that tells the methods apart."""

    discriminator_settings: dict[str, GlobalSettings | SemanticSettings]
    """Settings of the discriminators, by their names."""
    segmenter: Segmenter
    optimiser: torch.optim.Optimizer
    discriminators: dict[str, nn.Module]
    discriminator_optimisers: dict[str, torch.optim.Optimizer]
    teacher: AveragedModel | None
    """The running mean of the segmenter's weights."""
    banks: dict[str, semshift.PrototypeBank]
    """Running prototypes by domain."""
    pixels: dict[str, Tensor]
    """By domain, number of pixels int64 `[K]` of each class that its labels have shown so far."""

    def networks(self) -> dict[str, Stateful]:
        """What an evaluation needs."""
        return {"segmenter": self.segmenter} | ({} if self.teacher is None else {"teacher": self.teacher})

    def stateful(self) -> dict[str, Stateful]:
        """What a checkpoint saves beside `pixels` and how far the run is; the settings and the step give the rest."""
        stateful: dict[str, Stateful] = {**self.networks(), "optimiser": self.optimiser}
        for name, discriminator in self.discriminators.items():
            stateful[f"{name} alignment"] = discriminator
            stateful[f"{name} alignment optimiser"] = self.discriminator_optimisers[name]
        return stateful | {f"{domain} bank": bank for domain, bank in self.banks.items()}


@dataclass(frozen=True)
class Schedules:
    """What changes from step to step, each a function of the step."""

    learning_rate: semshift.Schedule
    discriminator_rates: dict[str, semshift.Schedule]
    source_weight: semshift.Schedule
    """Of the source's cross-entropy."""
    weights: dict[str, semshift.Schedule]
    """Of each confusion loss, and of self-training."""


def build_optimiser(settings: Settings, segmenter: Segmenter) -> torch.optim.Optimizer:
    """The segmenter's optimiser; its second group, where there is one, is the classifier."""
    how = settings.optimiser
    groups = [{"params": list(segmenter.parameters())}]
    if how.classifier_factor != 1:
        classifier = segmenter.classifier_parameters()
        chosen = set(map(id, classifier))
        groups = [{"params": [p for p in segmenter.parameters() if id(p) not in chosen]}, {"params": classifier}]
    if how.name == "adamw":
        return torch.optim.AdamW(groups, how.learning_rate, weight_decay=how.weight_decay)
    return torch.optim.SGD(groups, how.learning_rate, momentum=0.9, weight_decay=how.weight_decay)


def discriminator_settings(settings: Settings) -> dict[str, GlobalSettings | SemanticSettings]:
    """Settings of the method's discriminators that have a weight, by name; `auxiliary` is the second level's."""
    uses, g = METHODS[settings.method], settings.global_alignment
    auxiliary = dataclasses.replace(g, weight=g.auxiliary_weight if settings.network.auxiliary else 0.0)
    candidates: list[tuple[str, str, GlobalSettings | SemanticSettings]] = [
        ("global", "global", g),
        ("auxiliary", "global", auxiliary),
        ("semantic", "semantic", settings.semantic_alignment),
    ]
    return {name: how for name, use, how in candidates if use in uses and how.weight > 0}


def build_discriminator(name: str, settings: Settings, segmenter: Segmenter) -> nn.Module:
    """The discriminator called `global`, `auxiliary` or `semantic`, from a seed of its own."""
    classes = len(settings.data.classes)
    if name != "semantic":
        torch.manual_seed(settings.seed + (1 if name == "global" else 3))
        g = settings.global_alignment
        return semshift.FCDiscriminator(classes, base_channels=g.base_channels, spectral_norm=g.spectral_norm)
    torch.manual_seed(settings.seed + 2)
    s = settings.semantic_alignment
    return semshift.PrototypeDiscriminator(
        segmenter.feature_channels,
        classes,
        hidden_channels=s.hidden_channels,
        conditioning=s.conditioning,
        spectral_norm=s.spectral_norm,
    )


def build_learners(settings: Settings, segmenter: Segmenter) -> Learners:
    """The segmenter and what learns beside it, on its device."""
    device, dtype = next(segmenter.parameters()).device, dtype_of(settings)
    how, plus, classes = discriminator_settings(settings), settings.self_training, len(settings.data.classes)
    discriminators = {name: build_discriminator(name, settings, segmenter).to(device, dtype) for name in how}
    teacher: AveragedModel | None = None
    if "self-training" in METHODS[settings.method]:
        teacher = AveragedModel(segmenter, multi_avg_fn=get_ema_multi_avg_fn(plus.momentum))  # type: ignore[no-untyped-call]
        teacher.eval()
    both = ("source", "labelled")
    banked = both if teacher is not None and plus.bank and "semantic" in discriminators else ()
    return Learners(
        discriminator_settings=how,
        segmenter=segmenter,
        optimiser=build_optimiser(settings, segmenter),
        discriminators=discriminators,
        discriminator_optimisers={
            name: torch.optim.Adam(discriminator.parameters(), how[name].learning_rate, betas=(0.9, 0.99))
            for name, discriminator in discriminators.items()
        },
        teacher=teacher,
        banks={
            domain: semshift.PrototypeBank(segmenter.feature_channels, classes).to(device, dtype) for domain in banked
        },
        pixels={domain: torch.zeros(classes, dtype=torch.int64, device=device) for domain in both},
    )


def build_schedules(settings: Settings) -> Schedules:
    """The learning rates, and the weights of the losses."""
    how, discriminators = settings.optimiser, discriminator_settings(settings)
    decay_steps = how.decay_steps or settings.steps
    weights = {name: weight_schedule(each, settings.steps) for name, each in discriminators.items()}
    if "self-training" in METHODS[settings.method]:
        weights["self-training"] = weight_schedule(settings.self_training, settings.steps)
    return Schedules(
        learning_rate=semshift.Polynomial(how.learning_rate, 0.0, decay_steps, power=how.power),
        discriminator_rates={
            name: semshift.Polynomial(each.learning_rate, 0.0, decay_steps, power=each.power)
            for name, each in discriminators.items()
        },
        source_weight=source_schedule(settings),
        weights=weights,
    )


def source_schedule(settings: Settings) -> semshift.Schedule:
    """The weight of the source's cross-entropy: 1, and for `ass-plus` a straight fall at the end where it says so."""
    fade = settings.self_training.source_fade if "self-training" in METHODS[settings.method] else 0.0
    steps = round(fade * settings.steps)
    if not steps:
        return semshift.Constant(1.0)
    fall = semshift.Polynomial(1.0, 0.0, steps, power=1.0)
    return semshift.Then(semshift.Constant(1.0), settings.steps - steps, fall) if steps < settings.steps else fall


def weight_schedule(how: GlobalSettings | SemanticSettings | SelfTraining, steps: int) -> semshift.Schedule:
    """The weight of a confusion loss or of self-training: zero at first, then a rise to its plateau."""
    start, ramp = round(how.start * steps), round(how.ramp * steps)
    risen = semshift.Sigmoid(0.0, how.weight, ramp) if ramp else semshift.Constant(how.weight)
    return semshift.Then(semshift.Constant(0.0), start, risen) if start else risen

"""The trainer's settings, and the images that they name."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from examples.ass.data import Augmentation, Folder, FolderPair, InputError, Samples
from examples.ass.scenes import CLASSES, Scenes, Severity

__all__ = [
    "METHODS",
    "Data",
    "GlobalAdversary",
    "Images",
    "Network",
    "Optimiser",
    "SceneSettings",
    "SemanticAdversary",
    "Settings",
    "as_plain",
    "check",
    "open_images",
]

Method = Literal["source-only", "labelled-only", "joint", "global", "semantic", "ass"]
Objective = Literal["bce", "least-squares", "hinge", "wasserstein"]

METHODS: dict[str, frozenset[str]] = {
    "source-only": frozenset({"source"}),
    "labelled-only": frozenset({"labelled"}),
    "joint": frozenset({"source", "labelled"}),
    "global": frozenset({"source", "labelled", "global"}),
    "semantic": frozenset({"source", "labelled", "semantic"}),
    "ass": frozenset({"source", "labelled", "global", "semantic"}),
}
"""What each method trains with: cross-entropy on a domain, and adversaries."""


@dataclass(frozen=True)
class SceneSettings:
    """The built-in scenes, drawn from the run's seed.

    Args:
        source: number of source training images.
        target: number of target training images, of which `labelled` keep their masks.
        validation: number of target images to choose settings on.
        test: number of target images to report on.
        severity: how far the target's look lies from the source's.
    """

    source: int = 200
    target: int = 200
    validation: int = 60
    test: int = 100
    severity: Severity = field(default_factory=Severity)


@dataclass(frozen=True)
class Data:
    """The domains: folders below the data root, or the built-in scenes where `source` is null.

    Args:
        classes: names in the order of their ids.
        size: height and width of the images that the network sees, each at least 32.
        source: labelled source images.
        target: target training images; the labelled ones are drawn from them.
        validation: labelled target images to choose settings on.
        test: labelled target images to report on.
        ignore_index: id of pixels that have no class.
        subsets: named lists of classes over which `evaluate` can average.
        scenes: the built-in scenes.
        augmentation: what is done to training images, the same for every domain and method.
        workers: processes that load images; the images do not depend on it.
    """

    classes: list[str] = field(default_factory=lambda: list(CLASSES))
    size: tuple[int, int] = (64, 96)
    source: Folder | None = None
    target: Folder | None = None
    validation: Folder | None = None
    test: Folder | None = None
    ignore_index: int = 255
    subsets: dict[str, list[str]] = field(default_factory=dict)
    scenes: SceneSettings = field(default_factory=SceneSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: int = 0


@dataclass(frozen=True)
class Network:
    """The segmenter: a small one to be trained from nothing, or the paper's, which wants trained weights.

    Args:
        name: `small` or `deeplab-v2`.
        width: of small: channels of the first stage, a multiple of 8.
        feature_layer: the layer whose prototypes are aligned; deeplab-v2 has its `encoder` only.
        depth: of deeplab-v2: layers of its ResNet.
        aspp_dilations: of deeplab-v2: dilations of the convolutions that its classifier sums.
        origin: of deeplab-v2: where its weights come from, which decides stride placement and preprocessing.
        init: of deeplab-v2: a file of weights to start from, a state dict with torchvision's names.
        init_classifier: take the classifier from `init` too, where it has one.
        frozen_batch_norm: of deeplab-v2: keep the statistics, weights and biases of `init`.
    """

    name: Literal["small", "deeplab-v2"] = "small"
    width: int = 16
    feature_layer: Literal["encoder", "decoder"] = "encoder"
    depth: Literal[101, 50] = 101
    aspp_dilations: tuple[int, ...] = (6, 12, 18, 24)
    origin: Literal["torchvision", "caffe"] = "torchvision"
    init: str | None = None
    init_classifier: bool = True
    frozen_batch_norm: bool = False


@dataclass(frozen=True)
class Optimiser:
    """How the segmenter learns.

    Args:
        name: `sgd` has momentum 0.9.
        learning_rate: at step 0, decaying as (1 - step / steps) ** power.
        classifier_factor: by which the learning rate of the last layer is multiplied.
        weight_decay: as the optimiser defines it.
        power: of the decay; 0 keeps the rate.
        images: labelled images of a domain in a step.
        unlabelled: unlabelled target images in a step.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 3e-3
    classifier_factor: float = 1.0
    weight_decay: float = 1e-4
    power: float = 0.9
    images: int = 4
    unlabelled: int = 4


@dataclass(frozen=True)
class GlobalAdversary:
    """The discriminator D_g over the segmenter's output, and its weight in the segmenter's loss.

    Args:
        weight: lambda_g once the ramp is over.
        start: share of the steps before the weight leaves zero; the discriminator learns meanwhile.
        ramp: share of the steps over which the weight rises.
        objective: of both sides.
        learning_rate: of Adam with betas (0.9, 0.99).
        every: the discriminator learns at each step divisible by this.
        r1: weight of the gradient penalty on source inputs.
        spectral_norm: on every convolution.
        base_channels: of the first layer.
        inputs: class probabilities (AdaptSegNet) or their entropy map (ADVENT).
    """

    weight: float = 0.03
    start: float = 0.2
    ramp: float = 0.2
    objective: Objective = "bce"
    learning_rate: float = 5e-4
    every: int = 1
    r1: float = 0.0
    spectral_norm: bool = False
    base_channels: int = 16
    inputs: Literal["probabilities", "entropy"] = "probabilities"


@dataclass(frozen=True)
class SemanticAdversary:
    """The discriminator D_s over class prototypes, and its weight in the segmenter's loss.

    Args:
        weight: lambda_s once the ramp is over.
        start: share of the steps before the weight leaves zero; the discriminator learns meanwhile.
        ramp: share of the steps over which the weight rises.
        objective: of both sides; class-and-domain has a cross-entropy of its own and knows `bce` only.
        learning_rate: of Adam with betas (0.9, 0.99).
        every: the discriminator learns at each step divisible by this.
        r1: weight of the gradient penalty on source prototypes.
        spectral_norm: on every layer.
        conditioning: how the discriminator knows the class.
        per_image: one prototype per image and class, as in the paper; else per batch and class.
        resample: how labels meet the feature grid.
    """

    weight: float = 0.01
    start: float = 0.2
    ramp: float = 0.2
    objective: Objective = "bce"
    learning_rate: float = 5e-4
    every: int = 1
    r1: float = 0.0
    spectral_norm: bool = False
    conditioning: Literal["none", "per-class", "class-and-domain"] = "per-class"
    per_image: bool = True
    resample: Literal["nearest", "majority", "area", "bilinear"] = "bilinear"


@dataclass(frozen=True)
class Settings:
    """A run.

    Args:
        method: what is trained; `ass` is the paper's.
        labelled: number of target training images that keep their labels.
        steps: of the optimiser.
        seed: of the network, the draws, the augmentation and the built-in scenes.
        log_every: steps between two rows of the log.
        save_every: steps between two checkpoints.
        precision: as Lightning Fabric names it; the discriminators stay in float32.
        accelerator: as Lightning Fabric names it.
        data: the domains.
        network: the segmenter.
        optimiser: how it learns.
        global_adversary: the global adversary.
        semantic_adversary: the semantic adversary.
    """

    method: Method = "ass"
    labelled: int = 4
    steps: int = 800
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: str = "cpu"
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    optimiser: Optimiser = field(default_factory=Optimiser)
    global_adversary: GlobalAdversary = field(default_factory=GlobalAdversary)
    semantic_adversary: SemanticAdversary = field(default_factory=SemanticAdversary)


class Images(NamedTuple):
    """Every image of a run, by what it is for."""

    source: Samples
    target: Samples
    validation: Samples
    test: Samples


def check(settings: Settings) -> None:
    """Refuse settings that no run could honour.

    Raises:
        InputError: naming the setting, the rule and the value.
    """
    data, scenes = settings.data, settings.data.scenes
    counts = {
        "labelled": settings.labelled,
        "steps": settings.steps,
        "log_every": settings.log_every,
        "save_every": settings.save_every,
        "data.scenes.source": scenes.source,
        "data.scenes.target": scenes.target,
        "data.scenes.validation": scenes.validation,
        "data.scenes.test": scenes.test,
        "optimiser.images": settings.optimiser.images,
        "optimiser.unlabelled": settings.optimiser.unlabelled,
        "global_adversary.every": settings.global_adversary.every,
        "global_adversary.base_channels": settings.global_adversary.base_channels,
        "semantic_adversary.every": settings.semantic_adversary.every,
    }
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"expected {name} of at least 1, got {value}")
    amounts = {
        "seed": settings.seed,
        "data.workers": data.workers,
        "optimiser.weight_decay": settings.optimiser.weight_decay,
        "optimiser.power": settings.optimiser.power,
        "global_adversary.weight": settings.global_adversary.weight,
        "global_adversary.r1": settings.global_adversary.r1,
        "semantic_adversary.weight": settings.semantic_adversary.weight,
        "semantic_adversary.r1": settings.semantic_adversary.r1,
    }
    for name, amount in amounts.items():
        if not (math.isfinite(amount) and amount >= 0):
            raise InputError(f"expected {name} to be finite and not negative, got {amount}")
    rates = {
        "optimiser.learning_rate": settings.optimiser.learning_rate,
        "optimiser.classifier_factor": settings.optimiser.classifier_factor,
        "global_adversary.learning_rate": settings.global_adversary.learning_rate,
        "semantic_adversary.learning_rate": settings.semantic_adversary.learning_rate,
    }
    for name, rate in rates.items():
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(f"expected {name} to be finite and positive, got {rate}")
    shares = {
        "global_adversary.start": settings.global_adversary.start,
        "global_adversary.ramp": settings.global_adversary.ramp,
        "semantic_adversary.start": settings.semantic_adversary.start,
        "semantic_adversary.ramp": settings.semantic_adversary.ramp,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"expected {name} to be a share of the steps in [0, 1], got {share}")
    _check_network(settings.network)
    if settings.accelerator not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"expected accelerator to be one of auto, cpu, cuda, mps, got {settings.accelerator}")
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("expected an accelerator that this machine has, got cuda")
    if settings.accelerator == "mps" and not torch.backends.mps.is_available():
        raise InputError("expected an accelerator that this machine has, got mps")
    if min(data.size) < 32:
        raise InputError(f"expected data.size of at least 32 each way, got {list(data.size)}")
    if not 2 <= len(data.classes) <= 255 or len(set(data.classes)) < len(data.classes):
        raise InputError(f"expected data.classes to be 2 to 255 different names, got {data.classes}")
    if not len(data.classes) <= data.ignore_index <= 255:
        raise InputError(
            f"expected data.ignore_index between the number of classes, {len(data.classes)}, and 255, "
            f"got {data.ignore_index}"
        )
    for name, members in data.subsets.items():
        unknown = [member for member in members if member not in data.classes]
        if unknown or not members:
            raise InputError(f"expected data.subsets.{name} to list names of data.classes, got {members}")
    semantic = settings.semantic_adversary
    if semantic.conditioning == "class-and-domain" and (semantic.objective != "bce" or semantic.r1 > 0):
        raise InputError(
            "expected semantic_adversary.objective bce and r1 0 with semantic_adversary.conditioning class-and-domain, "
            f"got {semantic.objective} and {semantic.r1}"
        )


def _check_network(network: Network) -> None:
    if network.width < 8 or network.width % 8:
        raise InputError(f"expected network.width to be a positive multiple of 8, got {network.width}")
    if not network.aspp_dilations or min(network.aspp_dilations) < 1:
        raise InputError(
            f"expected network.aspp_dilations to be one or more of at least 1, got {list(network.aspp_dilations)}"
        )
    if network.name == "small" and (network.init is not None or network.frozen_batch_norm):
        setting = "frozen_batch_norm true" if network.init is None else f"init {network.init}"
        raise InputError(f"expected network.init and network.frozen_batch_norm with deeplab-v2 only, got {setting}")
    if network.name == "deeplab-v2" and network.feature_layer != "encoder":
        raise InputError(f"expected network.feature_layer encoder of deeplab-v2, got {network.feature_layer}")
    if network.frozen_batch_norm and network.init is None:
        raise InputError("expected network.init, whose statistics network.frozen_batch_norm would keep, got none")


def open_images(settings: Settings, data_root: Path | None) -> Images:
    """List the images of a run; pixels are read when they are asked for.

    Raises:
        InputError: a folder is not as described, or the settings describe neither folders nor scenes.
    """
    data = settings.data
    folders = {name: getattr(data, name) for name in Images._fields}
    given = [name for name, folder in folders.items() if folder is not None]
    if not given:
        if data.classes != list(CLASSES):
            raise InputError(f"expected data.classes {list(CLASSES)} for the built-in scenes, got {data.classes}")
        scenes = data.scenes

        def draw(domain: Literal["source", "target"], split: Literal["train", "val", "test"], count: int) -> Scenes:
            return Scenes(domain, split, count, seed=settings.seed, size=data.size, severity=scenes.severity)

        images = Images(
            draw("source", "train", scenes.source),
            draw("target", "train", scenes.target),
            draw("target", "val", scenes.validation),
            draw("target", "test", scenes.test),
        )
    else:
        missing = [name for name in Images._fields if name not in given]
        if missing:
            raise InputError(
                f"expected a folder for each of data.{', data.'.join(Images._fields)}, got none for {missing[0]}"
            )
        if data_root is None:
            raise InputError("expected --data-root, below which the settings' folders lie, got none")
        k, ignore = len(data.classes), data.ignore_index
        images = Images(
            *(FolderPair(data_root, folder, num_classes=k, ignore_index=ignore) for folder in folders.values())
        )
    if settings.labelled > len(images.target):
        raise InputError(
            f"expected labelled to be at most the {len(images.target)} target training images, got {settings.labelled}"
        )
    return images


def as_plain(settings: Settings) -> dict[str, Any]:
    """The settings as dicts, lists and scalars, fit for YAML and for a checkpoint that holds no code."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    result: dict[str, Any] = plain(dataclasses.asdict(settings))
    return result

"""The trainer's settings."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from examples.scenes import CLASSES, Severity
from examples.workbench.data import Augmentation
from examples.workbench.folders import Folder

__all__ = [
    "MAY_CHANGE",
    "METHODS",
    "Data",
    "GlobalAdversary",
    "Network",
    "Optimiser",
    "SceneSettings",
    "SelfTraining",
    "SemanticAdversary",
    "Settings",
    "as_plain",
]

Method = Literal["source-only", "labelled-only", "joint", "global", "semantic", "ass", "ass-plus", "oracle"]
Objective = Literal["bce", "least-squares", "hinge", "wasserstein"]

METHODS: dict[str, frozenset[str]] = {
    "source-only": frozenset({"source"}),
    "labelled-only": frozenset({"labelled"}),
    "joint": frozenset({"source", "labelled"}),
    "global": frozenset({"source", "labelled", "global"}),
    "semantic": frozenset({"source", "labelled", "semantic"}),
    "ass": frozenset({"source", "labelled", "global", "semantic"}),
    "ass-plus": frozenset({"source", "labelled", "global", "semantic", "self-training"}),
    "oracle": frozenset({"labelled"}),
}
"""What each method trains with: cross-entropy on a domain, discriminators, self-training. The oracle has all labels."""


MAY_CHANGE = frozenset({"log_every", "save_every", "validate_every", "data.workers", "data.timeout"})
"""Settings that a run may go on with others of: its weights do not depend on them."""


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
        source_size: those of the source images, where they are others; not for the built-in scenes.
        source: labelled source images.
        target: target training images; the labelled ones are drawn from them.
        validation: labelled target images to choose settings on.
        test: labelled target images to report on.
        ignore_index: id of pixels that have no class.
        subsets: named lists of classes over which `evaluate` can average.
        scenes: the built-in scenes.
        augmentation: what is done to training images, the same for every domain and method.
        workers: processes that load images; the images do not depend on it.
        timeout: seconds to wait for a batch of the workers before the run ends as one that hangs; 0 waits for ever.
    """

    classes: list[str] = field(default_factory=lambda: list(CLASSES))
    size: tuple[int, int] = (64, 96)
    source_size: tuple[int, int] | None = None
    source: Folder | None = None
    target: Folder | None = None
    validation: Folder | None = None
    test: Folder | None = None
    ignore_index: int = 255
    subsets: dict[str, list[str]] = field(default_factory=dict)
    scenes: SceneSettings = field(default_factory=SceneSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: int = 0
    timeout: int = 600


@dataclass(frozen=True)
class Network:
    """The segmenter: a small one to be trained from nothing, the paper's, or a transformer; these want trained weights.

    Args:
        name: `small`, `deeplab-v2` or `segformer`.
        width: of small: channels of the first stage, a multiple of 8.
        feature_layer: the layer whose prototypes are aligned; deeplab-v2 has its `encoder` only.
        config: of segformer: a `config.json` of Transformers; by default B0's, or the one in `init`.
        depth: of deeplab-v2: layers of its ResNet.
        aspp_dilations: of deeplab-v2: dilations of the convolutions that its classifier sums.
        origin: of deeplab-v2: where its weights come from, which decides stride placement and preprocessing.
        auxiliary: of deeplab-v2: a second classifier, on the stage before the last, for the loss on two levels.
        init: weights to start from; of deeplab-v2: a file with a state dict with torchvision's names; of segformer: a
            folder that `save_pretrained` wrote, whose `config.json` is read whenever the network is built.
        init_classifier: take the classifier from `init` too, where it has one.
        frozen_batch_norm: of deeplab-v2: keep the statistics, weights and biases of `init`.
    """

    name: Literal["small", "deeplab-v2", "segformer"] = "small"
    width: int = 16
    feature_layer: Literal["encoder", "decoder"] = "encoder"
    config: str | None = None
    depth: Literal[101, 50] = 101
    aspp_dilations: tuple[int, ...] = (6, 12, 18, 24)
    origin: Literal["torchvision", "caffe"] = "torchvision"
    auxiliary: bool = False
    init: str | None = None
    init_classifier: bool = True
    frozen_batch_norm: bool = False


@dataclass(frozen=True)
class Optimiser:
    """How the segmenter learns.

    Args:
        name: `sgd` has momentum 0.9.
        learning_rate: at step 0, decaying as (1 - step / decay_steps) ** power.
        decay_steps: at which it would be 0, not before the run's last; by default the run's.
        classifier_factor: by which the learning rate of the last layer is multiplied.
        weight_decay: as the optimiser defines it.
        power: of the decay; 0 keeps the rate.
        auxiliary_weight: of the auxiliary classifier's cross-entropy.
        images: labelled images of a domain in a step, over all ranks.
        unlabelled: unlabelled target images in a step, over all ranks.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 3e-3
    decay_steps: int | None = None
    classifier_factor: float = 1.0
    weight_decay: float = 1e-4
    power: float = 0.9
    auxiliary_weight: float = 0.1
    images: int = 4
    unlabelled: int = 4


@dataclass(frozen=True)
class GlobalAdversary:
    """The discriminator D_g over the segmenter's output, and its weight in the segmenter's loss.

    Args:
        weight: lambda_g once the ramp is over; 0 does without this discriminator.
        auxiliary_weight: that of a discriminator of its own over the auxiliary classifier's output, where there is one.
        start: share of the steps before the weight leaves zero; the discriminator learns meanwhile.
        ramp: share of the steps over which the weight rises.
        objective: of both sides.
        learning_rate: of Adam with betas (0.9, 0.99).
        power: of its decay, which is over the segmenter's steps; 0 keeps the rate.
        every: the discriminator learns at each step divisible by this.
        r1: weight of the gradient penalty on source inputs.
        spectral_norm: on every convolution.
        base_channels: of the first layer.
        inputs: class probabilities (AdaptSegNet), their entropy map (ADVENT), or `balanced`: probabilities over the
            shares that the domain's labels give the classes.
        against: whose outputs the unlabelled target's are to be taken for: those on `source` images (the paper), on
            `labelled` target images, or on `both`.
    """

    weight: float = 0.03
    auxiliary_weight: float = 0.006
    start: float = 0.2
    ramp: float = 0.2
    objective: Objective = "bce"
    learning_rate: float = 5e-4
    power: float = 0.0
    every: int = 1
    r1: float = 0.0
    spectral_norm: bool = False
    base_channels: int = 16
    inputs: Literal["probabilities", "entropy", "balanced"] = "probabilities"
    against: Literal["source", "labelled", "both"] = "source"


@dataclass(frozen=True)
class SemanticAdversary:
    """The discriminator D_s over class prototypes, and its weight in the segmenter's loss.

    Args:
        weight: lambda_s once the ramp is over; 0 does without this discriminator.
        start: share of the steps before the weight leaves zero; the discriminator learns meanwhile.
        ramp: share of the steps over which the weight rises.
        objective: of both sides; class-and-domain has a cross-entropy of its own and knows `bce` only.
        learning_rate: of Adam with betas (0.9, 0.99).
        power: of its decay, which is over the segmenter's steps; 0 keeps the rate.
        every: the discriminator learns at each step divisible by this.
        r1: weight of the gradient penalty on source prototypes.
        spectral_norm: on every layer.
        hidden_channels: widths of the discriminator's hidden layers.
        conditioning: how the discriminator knows the class.
        per_image: one prototype per image and class, as in the paper; else per batch and class.
        resample: how labels meet the feature grid.
    """

    weight: float = 0.01
    start: float = 0.2
    ramp: float = 0.2
    objective: Objective = "bce"
    learning_rate: float = 5e-4
    power: float = 0.0
    every: int = 1
    r1: float = 0.0
    spectral_norm: bool = False
    hidden_channels: tuple[int, ...] = (256, 256)
    conditioning: Literal["none", "per-class", "class-and-domain"] = "per-class"
    per_image: bool = True
    resample: Literal["nearest", "majority", "area", "bilinear"] = "bilinear"


@dataclass(frozen=True)
class SelfTraining:
    """What `ass-plus` adds: a teacher, the running mean of the segmenter's weights, and what it is good for.

    Args:
        weight: of the cross-entropy on unlabelled target images, whose labels are the teacher's.
        start: share of the steps before the weight leaves zero; nothing of the teacher is used before.
        ramp: share of the steps over which the weight rises.
        momentum: by how much a step's weights move the teacher: (1 - momentum).
        threshold: probability above which the teacher is sure of a pixel.
        weighted_by: `image`: a teacher's labels count by the share of the image's pixels that it is sure of (DACS);
            `pixel`: those of which it is sure count, the others do not (FixMatch).
        mixed_from: whose classes, with their labels, are pasted onto the unlabelled images; `nothing` pastes none.
        rare_classes: draw labelled images, of both domains, by the rare classes that they hold.
        rare_class_temperature: the smaller, the rarer the classes that are drawn for.
        source_fade: share of the steps, the last ones, over which the source's cross-entropy falls to nothing: where
            its labels mean something else than the target's, the target's have the last word.
        bank: show the semantic discriminator running prototypes of the classes that an image lacks.
        soft_pooling: align prototypes of the unlabelled images too, pooled by the teacher's probabilities.
        final: whose weights are evaluated.
    """

    weight: float = 1.0
    start: float = 0.2
    ramp: float = 0.2
    momentum: float = 0.99
    threshold: float = 0.9
    weighted_by: Literal["image", "pixel"] = "image"
    mixed_from: Literal["source", "labelled", "both", "nothing"] = "both"
    rare_classes: bool = True
    rare_class_temperature: float = 0.1
    source_fade: float = 0.0
    bank: bool = True
    soft_pooling: bool = True
    final: Literal["teacher", "segmenter"] = "teacher"


@dataclass(frozen=True)
class Settings:
    """A run.

    Args:
        method: what is trained; `ass` is the paper's.
        labelled: number of target training images that keep their labels; `oracle` keeps all of them.
        steps: of the optimiser.
        seed: of the network, the draws, the augmentation and the built-in scenes.
        log_every: steps between two rows of the log.
        save_every: steps between two checkpoints.
        validate_every: steps between two looks at the validation images, of which the best network is kept; 0 looks
            at the end of the run only.
        precision: as Lightning Fabric names it; with bf16-mixed the discriminators stay in float32.
        accelerator: as Lightning Fabric names it.
        data: the domains.
        network: the segmenter.
        optimiser: how it learns.
        global_adversary: the global discriminator and its weight.
        semantic_adversary: the semantic discriminator and its weight.
        self_training: what `ass-plus` adds.
    """

    method: Method = "ass"
    labelled: int = 4
    steps: int = 800
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    validate_every: int = 0
    precision: Literal["64-true", "32-true", "bf16-mixed"] = "32-true"
    accelerator: str = "cpu"
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    optimiser: Optimiser = field(default_factory=Optimiser)
    global_adversary: GlobalAdversary = field(default_factory=GlobalAdversary)
    semantic_adversary: SemanticAdversary = field(default_factory=SemanticAdversary)
    self_training: SelfTraining = field(default_factory=SelfTraining)


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

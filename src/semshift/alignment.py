"""Alignment modules: semantic-level and global alignment, each with its own discriminator.

Together they are the alignment of the method ASS (Wang et al. 2020, arXiv 2004.00794). Each module returns two losses,
one for the segmenter and one for its discriminator. No parameter gets a gradient from both, so one backward serves both
losses.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Optional, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semshift._adversarial import adversarial_losses, sums_over_ranks
from semshift._checks import (
    FLOATS,
    INTEGERS,
    check_bool,
    check_device,
    check_floating,
    check_ignore_index,
    check_int,
    check_option,
)
from semshift.discriminators import FCDiscriminator, PrototypeDiscriminator
from semshift.health import prototype_distance
from semshift.losses import Objective, entropy_map
from semshift.pooling import ClassSums, class_sums

__all__ = ["AlignmentLosses", "GlobalAlignment", "SemanticAlignment"]


class AlignmentLosses(NamedTuple):
    """Result of an alignment module: a loss for the segmenter, a loss for the discriminator, and figures to log.

    Example:
        >>> align = semshift.SemanticAlignment(4, 2)
        >>> features, labels = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randint(0, 2, (1, 8, 8))
        >>> losses = align(features, labels, features, labels)
        >>> (0.01 * losses.confusion + losses.discriminator).backward()
    """

    confusion: Tensor
    """Adversarial loss for the segmenter: a scalar whose gradient reaches only the target features.

    Multiply it by a weight and add it to the segmentation loss.
    """
    discriminator: Tensor
    """Adversarial loss for the discriminator: a scalar whose gradient reaches only the discriminator's parameters.

    Both losses are float32, or float64 if the module was cast to float64.
    """
    figures: dict[str, Tensor]
    """Detached float32 scalars to log, with the same keys at every step; nan where nothing can be compared."""


class SemanticAlignment(nn.Module):
    """Semantic-level alignment: adversarial losses of a discriminator over class prototypes.

    This is section 3 of Wang et al. 2020 (arXiv 2004.00794). The module pools source features and labelled target
    features to class prototypes: the mean feature of each class. The discriminator learns to tell the domains'
    prototypes apart, class by class. The segmenter learns to fool it, so that target prototypes are classified as
    source. A class of one domain counts if it is present in this batch. The other domain must also have shown it, in
    this batch or an earlier one. The buffer `seen` `[2, K]` (source, target) records which classes each domain has
    shown.

    Train the module's parameters with a separate optimiser or parameter group. Keep the module in float32
    or float64, whatever the network's precision: in half precision it raises an error. Save the module's `state_dict`
    in your checkpoint.

    With `torch.distributed` initialised, every rank must call the module and run the backward. The losses are then
    computed over the batch of all ranks. After the backward, every rank holds the whole gradient of the discriminator,
    whether or not the module is wrapped in `DistributedDataParallel`. Average the segmenter's own gradients over ranks,
    as `DistributedDataParallel` does. Do the same with the gradients of a penalty that you compute on `.discriminator`.

    Args:
        in_channels: C, channels of the features; at least 1.
        num_classes: K, at least 1.
        hidden_channels: widths of the discriminator's hidden layers.
        conditioning: how the discriminator knows the class of a prototype, see `PrototypeDiscriminator`.
        objective: the form of the adversarial loss, see `Objective`; class-and-domain supports `"bce"` only.
        spectral_norm: divide each of the discriminator's matrices by its largest singular value.
        resample: how labels are resampled to the feature grid, see `class_sums`.
        align_corners: for `"bilinear"` only; use the value with which your network up-samples its logits.
        per_image: True gives one prototype for each image and class, as in the paper; False gives one for each class of
            the batch.
        ignore_index: id of pixels to ignore. None: every label must be a class; any other label raises an error on the
            CPU and is ignored on CUDA. With more than 255 classes the default raises an error: pass None or another id.

    Raises:
        TypeError: a count that is not an int, widths that are not a sequence, or a flag that is not a bool.
        ValueError: a count out of range, an unknown option, `align_corners` without `"bilinear"`, class-and-domain with
            an objective other than bce, or more than 255 classes with the default `ignore_index`.

    Example:
        >>> align = semshift.SemanticAlignment(4, 2)
        >>> features, labels = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randint(0, 2, (1, 64, 64))
        >>> sorted(align(features, labels, features, labels).figures)
        ['prototype_distance', 'source_accuracy', 'target_accuracy']
    """

    seen: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: Sequence[int] = (256, 256),
        conditioning: Literal["none", "per-class", "class-and-domain"] = "per-class",
        objective: Objective = "bce",
        spectral_norm: bool = False,
        resample: Literal["bilinear", "nearest", "majority", "area"] = "bilinear",
        align_corners: bool = False,
        per_image: bool = True,
        ignore_index: Optional[int] = 255,
    ) -> None:
        super().__init__()
        check_option("objective", objective, get_args(Objective))
        check_option("resample", resample, ("bilinear", "nearest", "majority", "area"))
        check_bool("align_corners", align_corners)
        check_bool("per_image", per_image)
        if align_corners and resample != "bilinear":
            raise ValueError(f"expected align_corners only with resample 'bilinear', got {resample!r}")
        self.discriminator = PrototypeDiscriminator(
            in_channels,
            num_classes,
            hidden_channels=hidden_channels,
            conditioning=conditioning,
            spectral_norm=spectral_norm,
        )
        if conditioning == "class-and-domain" and objective != "bce":
            raise ValueError(f"expected objective 'bce' with conditioning 'class-and-domain', got {objective!r}")
        self.in_channels = self.discriminator.in_channels
        self.num_classes = self.discriminator.num_classes
        self.conditioning = conditioning
        self.objective = objective
        self.resample = resample
        self.align_corners = align_corners
        self.per_image = per_image
        self.ignore_index = check_ignore_index(ignore_index, self.num_classes)
        self.register_buffer("seen", torch.zeros(2, self.num_classes, dtype=torch.bool))

    def forward(
        self, source_features: Tensor, source_labels: Tensor, target_features: Tensor, target_labels: Tensor
    ) -> AlignmentLosses:
        """Pool both domains by their labels and compare the prototypes.

        Args:
            source_features: `[B, C, h, w]`, floating point; detached inside.
            source_labels: `[B, H, W]` of any integer dtype, in `[0, K)` or `ignore_index`.
            target_features: `[B', C, h', w']` of labelled target images; in training they must require grad.
            target_labels: `[B', H', W']`.

        Returns:
            `AlignmentLosses`: two scalars and the figures `source_accuracy`, `target_accuracy` and
            `prototype_distance`. Both losses are 0, with gradients of 0, if the domains have no class in common.

        Raises:
            TypeError: a wrong dtype, or a module in half precision.
            ValueError: wrong channels, shapes or devices; labels that look transposed; on the CPU, a label out of
                range; target features that do not require grad in training mode.
        """
        check_floating("source_features", source_features)
        check_floating("target_features", target_features)
        _check_graph(
            self,
            "target_features",
            target_features,
            "to train the discriminator alone, call compare() on class_sums of detached features",
        )
        source = self._pool("source", source_features.detach(), source_labels)
        return self.compare(source, self._pool("target", target_features, target_labels))

    def compare(
        self, source: ClassSums, target: ClassSums, *, target_confusion: Optional[ClassSums] = None
    ) -> AlignmentLosses:
        """Compare prototypes that you pooled yourself: from banks, with soft weights, over several batches.

        The sums may be detached. The confusion loss then has no gradient, and the discriminator still learns.

        Args:
            source: source sums `[K, C]`, or `[B, K, C]` for one set of prototypes per image.
            target: target sums `[K, C]` or `[B', K, C]`.
            target_confusion: target sums for the confusion loss alone, such as the batch's own sums without the rows
                from a `PrototypeBank`; None uses `target`.

        Returns:
            `AlignmentLosses` with the same losses and figures as from `forward`.

        Raises:
            TypeError: not a `ClassSums`, sums or mass of a wrong dtype, or a module in half precision.
            ValueError: a wrong shape or device.
        """
        confused = target if target_confusion is None else target_confusion
        for name, pooled in (("source", source), ("target", target), ("target_confusion", confused)):
            self._check_sums(name, pooled)
        source, whole_source = sums_over_ranks(source)
        target, whole_target = sums_over_ranks(target)
        confused = target if target_confusion is None else sums_over_ranks(confused)[0]
        seen = self.seen | torch.stack([whole_source.present, whole_target.present])
        if self.training and torch.is_grad_enabled():
            self.seen.copy_(seen)
        confusion, discriminator, figures = adversarial_losses(
            self.discriminator,
            source.means,
            target.means,
            confused.means,
            objective=self.objective,
            class_and_domain=self.conditioning == "class-and-domain",
            masks=(source.present & seen[1], target.present & seen[0], confused.present & seen[0]),
        )
        both = whole_source.present & whole_target.present
        distance = prototype_distance(whole_source.means, whole_target.means, weight=both).nanmean()
        return AlignmentLosses(confusion, discriminator, {**figures, "prototype_distance": distance.float()})

    def extra_repr(self) -> str:
        """The arguments that the discriminator does not show."""
        return (
            f"objective={self.objective!r}, resample={self.resample!r}, align_corners={self.align_corners}, "
            f"per_image={self.per_image}, ignore_index={self.ignore_index}"
        )

    def _pool(self, domain: str, features: Tensor, labels: Tensor) -> ClassSums:
        if features.dim() < 2 or features.shape[1] != self.in_channels:
            raise ValueError(f"expected {domain}_features [B, {self.in_channels}, h, w], got {list(features.shape)}")
        try:
            return class_sums(
                features,
                labels,
                self.num_classes,
                ignore_index=self.ignore_index,
                resample=self.resample,
                align_corners=self.align_corners,
                per_image=self.per_image,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{domain}_features, {domain}_labels: {error}") from error

    def _check_sums(self, name: str, pooled: ClassSums) -> None:
        if not isinstance(pooled, ClassSums):
            raise TypeError(f"expected {name} to be a ClassSums, got {type(pooled).__name__}")
        rows = (self.num_classes, self.in_channels)
        if pooled.sums.dim() not in (2, 3) or pooled.sums.shape[-2:] != rows:
            raise ValueError(
                f"expected {name} with sums {list(rows)} or [B, {rows[0]}, {rows[1]}], got {list(pooled.sums.shape)}"
            )
        if pooled.mass.shape != pooled.sums.shape[:-1]:
            raise ValueError(f"expected {name} with mass {list(pooled.sums.shape[:-1])}, got {list(pooled.mass.shape)}")
        if pooled.sums.dtype not in FLOATS or pooled.mass.dtype not in (*INTEGERS, *FLOATS):
            raise TypeError(
                f"expected {name} with floating-point sums and a numeric mass, got {pooled.sums.dtype} and "
                f"{pooled.mass.dtype}"
            )
        for tensor in (pooled.sums, pooled.mass):
            check_device(name, tensor, "the module", self.seen)


class GlobalAlignment(nn.Module):
    """Global alignment: adversarial losses of a discriminator over the segmenter's output maps.

    An output map holds the class probabilities, or their entropies, at each pixel. This is the output-level alignment
    of AdaptSegNet (Tsai et al. 2018, arXiv 1802.10349), section 4. With `inputs="entropy"` it is the alignment of
    ADVENT (Vu et al. 2019, arXiv 1811.12833), section 3.2. The module needs no labels. The notes on optimisers,
    precision and ranks at `SemanticAlignment` hold for this module too.

    Output maps also show the class frequencies of a domain. Where these differ between the domains, the segmenter can
    fool the discriminator by predicting the source's class frequencies on the target. On the three real pairs in
    `docs/results.md`, global alignment alone lost 1, 4 and 14 points of mIoU. Compare with a run without global
    alignment, on labelled target images.

    Args:
        num_classes: K, channels of the logits; at least 2.
        inputs: the discriminator's input: class `"probabilities"` or their `"entropy"` map.
        base_channels: channels of the discriminator's first layer.
        objective: the form of the adversarial loss, see `Objective`.
        spectral_norm: divide each of the discriminator's kernels by its largest singular value.

    Raises:
        TypeError: a count that is not an int, or a spectral_norm that is not a bool.
        ValueError: a count out of range or an unknown option.

    Example:
        >>> align = semshift.GlobalAlignment(2, base_channels=4)
        >>> logits = torch.randn(1, 2, 8, 12, requires_grad=True)
        >>> sorted(align(logits, logits, size=(64, 96)).figures)
        ['source_accuracy', 'target_accuracy']
    """

    def __init__(
        self,
        num_classes: int,
        *,
        inputs: Literal["probabilities", "entropy"] = "probabilities",
        base_channels: int = 64,
        objective: Objective = "bce",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = check_int("num_classes", num_classes, 2)
        check_option("inputs", inputs, ("probabilities", "entropy"))
        check_option("objective", objective, get_args(Objective))
        self.inputs = inputs
        self.objective = objective
        self.discriminator = FCDiscriminator(self.num_classes, base_channels=base_channels, spectral_norm=spectral_norm)

    def forward(
        self,
        source_logits: Tensor,
        target_logits: Tensor,
        size: Optional[tuple[int, int]] = None,
        *,
        align_corners: bool = False,
    ) -> AlignmentLosses:
        """Compare the output maps of both domains.

        Args:
            source_logits: `[B, K, h, w]`, floating point; detached inside.
            target_logits: `[B', K, h', w']` of labelled or unlabelled images, of any size; in training they must
                require grad.
            size: `(H, W)` to which both maps are up-sampled before the softmax, usually the images' size. None keeps
                each domain's own size, and the two may differ. The discriminator needs at least 32 x 32.
            align_corners: for the up-sampling to `size`; use the value with which your network up-samples its logits.

        Returns:
            `AlignmentLosses`: two scalars and the figures `source_accuracy` and `target_accuracy`.

        Raises:
            TypeError: logits that are not floating-point tensors, a size that does not hold ints, an align_corners that
                is not a bool, or a module in half precision.
            ValueError: wrong channels, shapes or devices; a size that is not (H, W); maps below 32 x 32; align_corners
                without a size; target logits that do not require grad in training mode.
        """
        check_floating("source_logits", source_logits)
        check_floating("target_logits", target_logits)
        check_bool("align_corners", align_corners)
        if align_corners and size is None:
            raise ValueError("expected align_corners only with a size to up-sample to, got size None")
        _check_graph(
            self,
            "target_logits",
            target_logits,
            "to train the discriminator alone, use losses.discriminator of the segmenter's step",
        )
        source = self._map("source_logits", source_logits.detach(), size, align_corners)
        target = self._map("target_logits", target_logits, size, align_corners)
        losses = adversarial_losses(self.discriminator, source, target, target, objective=self.objective)
        return AlignmentLosses(*losses)

    def extra_repr(self) -> str:
        """The arguments that the discriminator does not show."""
        return f"inputs={self.inputs!r}, objective={self.objective!r}"

    def _map(self, name: str, logits: Tensor, size: Optional[tuple[int, int]], align_corners: bool) -> Tensor:
        if logits.dim() != 4 or logits.shape[1] != self.num_classes:
            raise ValueError(f"expected {name} [B, {self.num_classes}, h, w], got {list(logits.shape)}")
        check_device(name, logits, "the module", next(self.discriminator.parameters()))
        if size is not None:
            if not isinstance(size, (tuple, list)) or len(size) != 2:
                raise ValueError(f"expected size (H, W) or None, got {size!r}")
            size = (check_int("size", size[0], 1), check_int("size", size[1], 1))
        height, width = size or logits.shape[2:]
        if min(height, width) < 32:
            raise ValueError(
                f"expected output maps of at least 32 x 32, got {height} x {width} for {name}: pass size=(H, W), "
                f"the images' size, to up-sample them"
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if size is not None and wide.shape[2:] != size:
            wide = F.interpolate(wide, size=size, mode="bilinear", align_corners=align_corners)
        probabilities = wide.softmax(1)
        return entropy_map(probabilities) if self.inputs == "entropy" else probabilities


def _check_graph(module: nn.Module, name: str, tensor: Tensor, fix: str) -> None:
    if module.training and torch.is_grad_enabled() and not tensor.requires_grad:
        raise ValueError(
            f"expected {name} that require grad in training mode, got a tensor without a graph: it was detached, or "
            f"computed under torch.no_grad or by a frozen network; {fix}; for figures alone, call eval() first"
        )

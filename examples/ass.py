"""ASS in one file: "Alleviating Semantic-level Shift" (Wang et al. 2020, arXiv 2004.00794) on two built-in domains.

    python -m examples.ass

trains three segmentation networks that differ only in their training data and losses, and draws their predictions:

- source-only: cross-entropy on labelled source images.
- joint: cross-entropy on source images and on a few labelled target images.
- ass: the losses of joint, global alignment on unlabelled target images, and semantic alignment on the labelled ones.

Read this file from top to bottom: settings, data, network, training (section 3 of the paper), evaluation, picture. We
chose the weights, learning rates and widths below, because we could not find the paper's. Use `examples/workbench` for
real images, to resume, and for several GPUs.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchmetrics.classification import MulticlassJaccardIndex
from tqdm import tqdm

import semshift
from examples.scenes import CLASS_COLOURS, CLASSES, Scenes

METHODS = ("source-only", "joint", "ass")
DOMAINS = ("source", "labelled", "unlabelled")


@dataclass(frozen=True)
class Settings:
    """All settings; each one is an option of the command line."""

    methods: tuple[str, ...] = METHODS
    seed: int = 0
    steps: int = 800
    labelled: int = 4
    """Number of labelled images among the 200 target training images."""
    batch_size: int = 4
    """Number of images of each domain in a batch."""
    learning_rate: float = 3e-3
    discriminator_learning_rate: float = 5e-4
    lambda_global: float = 0.03
    lambda_semantic: float = 0.01
    out: Path = Path("runs/ass")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def __post_init__(self) -> None:
        for name, most in (("steps", 10**9), ("labelled", 200), ("batch_size", 10**4)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"expected {name} in 1 to {most}, got {getattr(self, name)}")


# Data: street scenes of two domains that look different. All source images and a few target images are labelled.


class Domain(Dataset[tuple[Tensor, Tensor]]):
    """Augmented training images of one domain with their labels."""

    def __init__(self, scenes: Scenes, indices: Sequence[int], seed: int) -> None:
        self.scenes, self.indices = scenes, indices
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image `[3, H, W]` and its labels `[H, W]`; labels are 255 where the crop extends beyond the image."""
        scene = self.scenes[self.indices[index]]
        return augment(to_tensor(scene.image), torch.from_numpy(scene.label).long(), self.generator)


def to_tensor(image: np.ndarray) -> Tensor:
    """An image `uint8 [H, W, 3]` as a tensor `float32 [3, H, W]` in [0, 1]."""
    return torch.from_numpy(image).movedim(-1, 0).float() / 255


def augment(image: Tensor, label: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random augmentation: scale by 0.75 to 1.5, crop or pad to the old size, mirror or not, and vary the colours."""
    height, width = label.shape
    scale = generator.uniform(0.75, 1.5)
    size = [round(height * scale), round(width * scale)]
    image = F.interpolate(image[None], size=size, mode="bilinear", antialias=scale < 1)[0]
    label = F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
    top, left = (
        int(generator.integers(min(0, old - new), max(0, old - new) + 1)) for old, new in zip((height, width), size)
    )
    # Negative padding crops.
    padding = (left, width - size[1] - left, top, height - size[0] - top)
    brightness, contrast, saturation = generator.uniform(0.8, 1.2, 3)
    image = (image * brightness).clamp(0, 1)
    image = (image * contrast + image.mean() * (1 - contrast)).clamp(0, 1)
    image = (image * saturation + image.mean(0) * (1 - saturation)).clamp(0, 1)
    image, label = F.pad(image, padding), F.pad(label, padding, value=255)
    return (image.flip(-1), label.flip(-1)) if generator.random() < 0.5 else (image, label)


def batches(settings: Settings) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Mixed batches `{domain: (images, labels)}`. They depend on the settings only: all methods see the same ones."""
    source, target = (Scenes(domain, "train", 200, seed=settings.seed) for domain in ("source", "target"))
    # Every seed labels the images of the same numbers, and a smaller labelled set is part of a larger one.
    labelled = np.random.RandomState(0).permutation(len(target))[: settings.labelled]
    domains = {
        "source": Domain(source, range(len(source)), settings.seed),
        "labelled": Domain(target, labelled.tolist(), settings.seed + 1),
        # All target images, including the labelled ones. Their labels are never used.
        "unlabelled": Domain(target, range(len(target)), settings.seed + 2),
    }
    per_batch = dict.fromkeys(domains, settings.batch_size)
    sizes = {name: len(domain) for name, domain in domains.items()}
    sampler = semshift.MixedBatchSampler(sizes, per_batch, seed=settings.seed, steps=settings.steps)
    collate = functools.partial(semshift.collate_by_domain, per_batch=per_batch)
    return iter(DataLoader(ConcatDataset(domains.values()), batch_sampler=sampler, collate_fn=collate))


# Network: a small encoder and decoder instead of the paper's DeepLab-v2. Semantic alignment pools the features of the
# last encoder stage.


def convolution(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """3 x 3 convolution, group norm, ReLU. Batch norm would hide the shift: it normalises each domain separately."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(8, outputs), nn.ReLU())


class Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = convolution(channels, channels, dilation=dilation)
        self.second = convolution(channels, channels)[:2]

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to the same shape."""
        return F.relu(x + self.second(self.first(x)))


class Segmenter(nn.Module):
    """Segmentation network: images `[B, 3, H, W]` to features `[B, 4 * width, H / 8, W / 8]`, logits `[B, K, H, W]`."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.channels = 4 * width
        self.stage2 = convolution(3, width, stride=2)
        self.stage4 = nn.Sequential(convolution(width, 2 * width, stride=2), Residual(2 * width))
        self.stage8 = nn.Sequential(
            convolution(2 * width, 4 * width, stride=2),
            *(Residual(4 * width, dilation) for dilation in (1, 2, 4)),
        )
        self.decode4 = convolution(6 * width, 2 * width)
        self.decode2 = convolution(3 * width, width)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        at2 = self.stage2((images - 0.5) / 0.25)
        at4 = self.stage4(at2)
        features = self.stage8(at4)
        decoded = self.decode4(torch.cat([resize(features, at4), at4], 1))
        decoded = self.decode2(torch.cat([resize(decoded, at2), at2], 1))
        return features, resize(self.classifier(decoded), images)


def resize(maps: Tensor, like: Tensor) -> Tensor:
    """Bilinear up-sampling to the size of the maps `like`."""
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


# Training: section 3 of the paper.


def train(method: str, settings: Settings) -> Segmenter:
    """Train one method. The seed and the number of steps are the same for all methods."""
    torch.manual_seed(settings.seed)
    device, steps = settings.device, settings.steps
    segmenter = Segmenter(len(CLASSES)).to(device)
    # The discriminators D_g and D_s with their losses. Only the method ass uses them.
    global_alignment = semshift.GlobalAlignment(len(CLASSES), base_channels=16).to(device)
    semantic_alignment = semshift.SemanticAlignment(segmenter.channels, len(CLASSES)).to(device)

    optimiser = torch.optim.AdamW(segmenter.parameters(), settings.learning_rate, weight_decay=1e-4)
    discriminators = [*global_alignment.parameters(), *semantic_alignment.parameters()]
    discriminator_optimiser = torch.optim.Adam(discriminators, settings.discriminator_learning_rate, betas=(0.9, 0.99))
    learning_rate = semshift.Polynomial(settings.learning_rate, 0.0, steps)
    # The gradients of an untrained discriminator are noise. So both lambdas are 0 for a fifth of the steps, then rise.
    fifth = max(1, steps // 5)
    lambda_global, lambda_semantic = (
        semshift.Then(semshift.Constant(0.0), fifth, semshift.Sigmoid(0.0, weight, fifth))
        for weight in (settings.lambda_global, settings.lambda_semantic)
    )

    for step, batch in enumerate(tqdm(batches(settings), desc=method, total=steps, unit="step")):
        (x_s, y_s), (x_l, y_l), (x_u, _) = ([part.to(device) for part in batch[name]] for name in DOMAINS)

        # Supervised loss: cross-entropy on the source images and on the few labelled target images.
        features_s, logits_s = segmenter(x_s)
        loss = F.cross_entropy(logits_s, y_s, ignore_index=255)
        if method != "source-only":
            features_l, logits_l = segmenter(x_l)
            loss = loss + F.cross_entropy(logits_l, y_l, ignore_index=255)

        if method == "ass":
            # Global alignment compares the output maps P of source and unlabelled target images.
            # L_g = -log D_g(P(x_u)).
            _, logits_u = segmenter(x_u)
            global_losses = global_alignment(logits_s, logits_u)
            # Semantic alignment compares the class prototypes v_k of source and labelled target images.
            # L_s = -log D_s(v_k(x_l)), the mean over the classes k that are present.
            semantic_losses = semantic_alignment(features_s, y_s, features_l, y_l)
            # The paper alternates: it trains the segmenter with frozen discriminators, then the discriminators on
            # detached inputs. Here one backward pass does both. `confusion` (L_g, L_s) treats the discriminators as
            # frozen, and `discriminator` detaches its inputs.
            loss = loss + lambda_global(step) * global_losses.confusion + global_losses.discriminator
            loss = loss + lambda_semantic(step) * semantic_losses.confusion + semantic_losses.discriminator

        optimiser.param_groups[0]["lr"] = learning_rate(step)
        optimiser.zero_grad()
        discriminator_optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # because torch does not type it
        optimiser.step()
        discriminator_optimiser.step()
    return segmenter.eval()


# Evaluation and picture.


@torch.no_grad()
def predict(segmenter: Segmenter, scenes: Scenes) -> Tensor:
    """The most likely class of every pixel, `int64 [N, H, W]`."""
    device = next(segmenter.parameters()).device
    return torch.cat(
        [segmenter(to_tensor(scenes[i].image)[None].to(device))[1].argmax(1).cpu() for i in range(len(scenes))]
    )


def mean_iou(predictions: Tensor, labels: Tensor) -> float:
    """Mean intersection over union (mIoU) of the classes, from one confusion matrix over all images."""
    return float(MulticlassJaccardIndex(len(CLASSES))(predictions, labels))


def draw(settings: Settings, scenes: Scenes, labels: Tensor, predictions: dict[str, Tensor], shown: int = 4) -> Path:
    """Draw a few images, their ground truth and the predictions of every method, with each mIoU as a title."""
    columns = {"target image": None, "ground truth": labels}
    for name, predicted in predictions.items():
        columns[f"{name.replace('ass', 'ASS')}\nmIoU {100 * mean_iou(predicted, labels):.1f}"] = predicted
    figure = Figure(figsize=(1.8 * len(columns), 1.2 * shown + 1.55), layout="constrained")
    figure.suptitle(
        f"labelled target images: {settings.labelled}; one seed: {settings.seed}; "
        f"mIoU in percent over {len(scenes)} target test images"
    )
    panels = figure.subplots(shown, len(columns), squeeze=False)
    for row, index in zip(panels, np.linspace(0, len(scenes) - 1, shown, dtype=int).tolist()):
        for axes, maps in zip(row, columns.values()):
            look: dict[str, Any] = {"cmap": ListedColormap(CLASS_COLOURS), "vmin": -0.5, "vmax": len(CLASSES) - 0.5}
            axes.imshow(scenes[index].image if maps is None else maps[index].numpy(), interpolation="nearest", **look)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(panels[0], columns):
        axes.set_title(title, fontsize=15)
    handles = [Patch(color=colour, label=name) for colour, name in zip(CLASS_COLOURS, CLASSES)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(CLASSES), fontsize=12, columnspacing=1, handlelength=1
    )
    path = settings.out / "ass.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train every method, print its mIoU on the target test images, and draw its predictions."""
    parser = argparse.ArgumentParser(prog="python -m examples.ass", description=__doc__.partition("\n")[0])
    for field in fields(Settings):
        how: dict[str, Any] = {"type": type(field.default), "default": field.default}
        if field.name == "methods":
            how = {"nargs": "+", "choices": METHODS, "default": METHODS}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how)
    try:
        settings = Settings(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))

    scenes = Scenes("target", "test", 100, seed=settings.seed)
    labels = torch.stack([torch.from_numpy(scenes[i].label).long() for i in range(len(scenes))])
    predictions = {method: predict(train(method, settings), scenes) for method in settings.methods}
    scores = {method: mean_iou(predicted, labels) for method, predicted in predictions.items()}
    path = draw(settings, scenes, labels, predictions)
    for method, score in scores.items():
        print(f"mIoU {method}: {100 * score:.1f}")
    print(f"picture: {path}")
    return scores


if __name__ == "__main__":
    main()

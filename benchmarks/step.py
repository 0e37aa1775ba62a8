"""Time that `semshift.SemanticAlignment` adds to a training step: `python benchmarks/step.py [--check] [--json FILE]`.

The plain step uses the network of `examples/ass.py`: cross-entropy on source and labelled target images, a backward and
an optimiser step. With semantic alignment, the step also calls the module, runs its two losses in the same backward,
and steps the discriminator's Adam.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from timing import head, rounds, table
from torch import Tensor
from torch.nn import functional as F

import semshift

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.ass import Segmenter, to_tensor
from examples.scenes import CLASSES, draw

Batch = tuple[Tensor, Tensor]
MOST_PERCENT = 10


def images_of(domain: Literal["source", "target"], count: int, size: tuple[int, int], device: str) -> Batch:
    """Images and labels of a domain of the built-in scenes."""
    scenes = [draw(domain, "train", i, seed=0, size=size) for i in range(count)]
    images = torch.stack([to_tensor(image) for image, _ in scenes])
    return images.to(device), torch.stack([torch.from_numpy(label).long() for _, label in scenes]).to(device)


def step_without(source: Batch, target: Batch, width: int, device: str) -> Callable[[], None]:
    """Build a step of joint training."""
    segmenter = Segmenter(len(CLASSES), width).to(device)
    optimiser = torch.optim.AdamW(segmenter.parameters(), 3e-3, weight_decay=1e-4)

    def step() -> None:
        loss = torch.zeros((), device=device)
        for images, labels in (source, target):
            loss = loss + F.cross_entropy(segmenter(images)[1], labels, ignore_index=255)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()

    return step


def step_with(source: Batch, target: Batch, width: int, device: str) -> Callable[[], semshift.AlignmentLosses]:
    """Build the same step with semantic alignment, on a separate network."""
    segmenter = Segmenter(len(CLASSES), width).to(device)
    align = semshift.SemanticAlignment(segmenter.channels, len(CLASSES)).to(device)
    optimiser = torch.optim.AdamW(segmenter.parameters(), 3e-3, weight_decay=1e-4)
    discriminator_optimiser = torch.optim.Adam(align.parameters(), 5e-4, betas=(0.9, 0.99))

    def step() -> semshift.AlignmentLosses:
        loss, features = torch.zeros((), device=device), []
        for images, labels in (source, target):
            feature, logits = segmenter(images)
            features.append(feature)
            loss = loss + F.cross_entropy(logits, labels, ignore_index=255)
        losses = align(features[0], source[1], features[1], target[1])
        loss = loss + 0.01 * losses.confusion + losses.discriminator
        optimiser.zero_grad()
        discriminator_optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        discriminator_optimiser.step()
        return losses

    return step


def check_losses(losses: semshift.AlignmentLosses) -> None:
    """Refuse to measure a step in which no class is compared: its accuracies are nan, and both losses are 0."""
    accuracies = losses.figures["source_accuracy"], losses.figures["target_accuracy"]
    assert all(accuracy.isfinite() for accuracy in accuracies), f"no class is compared: {losses.figures}"
    for name, loss in (("confusion", losses.confusion), ("discriminator", losses.discriminator)):
        assert loss.isfinite(), f"the {name} loss is {loss.item()}"
        assert loss > 0, f"the {name} loss is {loss.item()}"


def main() -> None:
    """Print the table; with --check, fail if semantic alignment adds more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", nargs=2, type=int, default=[96, 128], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=4, help="images of each domain in a step (default: 4)")
    parser.add_argument("--width", type=int, default=16, help="channels of the network's first stage (default: 16)")
    parser.add_argument("--reps", type=int, default=40, help="number of pairs of steps (default: 40)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--check", action="store_true", help=f"exit with status 1 if it adds over {MOST_PERCENT} %%")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(where := head(args.device), flush=True)
    size = (args.size[0], args.size[1])
    source, target = (images_of(domain, args.images, size, args.device) for domain in ("source", "target"))
    classes = len(set(source[1].unique().tolist()) & set(target[1].unique().tolist()))
    without, whole = (make(source, target, args.width, args.device) for make in (step_without, step_with))
    check_losses(whole())
    seconds = rounds({"without": without, "with": whole}, args.reps, args.device)
    check_losses(whole())
    ms = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    # Differences are taken within pairs, since a slow phase of the machine lasts longer than a pair.
    more = [1e3 * (b - a) for a, b in zip(seconds["without"], seconds["with"])]
    percent = [100 * (b / a - 1) for a, b in zip(seconds["without"], seconds["with"])]
    low, middle, high = statistics.quantiles(percent, n=4) if len(percent) > 1 else 3 * percent
    print(
        f"\n{args.images} source and {args.images} labelled target images per step, {size[0]} x {size[1]}, width "
        f"{args.width}; {classes} classes are compared; medians over {len(percent)} pairs\n"
    )
    columns = ["step without, ms", "with semantic alignment, ms", "more, ms", "more", "middle half of the pairs"]
    row = [f"{ms['without']:.1f}", f"{ms['with']:.1f}", f"{statistics.median(more):.1f}", f"{middle:.1f} %"]
    print(table(columns, [[*row, f"{low:.1f} to {high:.1f} %"]]))
    if args.json:
        figures = {"head": where, "size": size, "images": args.images, "width": args.width, "classes": classes}
        args.json.write_text(json.dumps(figures | {"seconds": seconds, "more_percent": middle}, indent=1))
    if args.check and middle > MOST_PERCENT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

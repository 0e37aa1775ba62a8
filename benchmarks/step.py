"""What the semantic branch adds to a training step: `python benchmarks/step.py [--check] [--json FILE]`.

The step is the example trainer's, built from its own functions: cross-entropy on source and labelled target images.
The branch pools class prototypes from both, confuses a discriminator of them, and lets it learn in turn.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from timing import head, medians, table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import semshift
from examples.scenes import draw
from examples.workbench.build import build_critic, build_optimiser, build_segmenter
from examples.workbench.data import image_tensor
from examples.workbench.settings import Data, Network, Settings
from examples.workbench.views import cross_entropy, semantic_view

Batch = dict[str, dict[str, Tensor]]


def scenes(settings: Settings, device: str) -> Batch:
    """Images and labels of the built-in scenes, so many of each labelled domain as a step takes."""
    batch: Batch = {}
    domains: dict[str, Literal["source", "target"]] = {"source": "source", "labelled": "target"}
    for name, domain in domains.items():
        drawn = [draw(domain, "train", i, seed=0, size=settings.data.size) for i in range(settings.optimiser.images)]
        batch[name] = {
            "image": torch.stack([image_tensor(image) for image, _ in drawn]).to(device),
            "label": torch.stack([torch.from_numpy(label).long() for _, label in drawn]).to(device),
        }
    return batch


def trainer(settings: Settings, batch: Batch, device: str, *, branch: bool) -> Callable[[], None]:
    """A step of training, with the semantic branch or without it, each on networks of its own."""
    segmenter = build_segmenter(settings).to(device)
    optimiser = build_optimiser(settings, segmenter)
    adversary = settings.semantic_adversary
    critic = build_critic("semantic", settings, segmenter).to(device)
    critic_optimiser = torch.optim.Adam(critic.parameters(), adversary.learning_rate, betas=(0.9, 0.99))
    seen = {domain: torch.zeros(len(settings.data.classes), dtype=torch.bool, device=device) for domain in batch}

    def step() -> None:
        outputs = {domain: segmenter(part["image"]) for domain, part in batch.items()}
        loss = torch.zeros((), device=device)
        for domain, part in batch.items():
            loss = loss + cross_entropy(outputs[domain].logits, part["label"], settings)
        view = semantic_view(outputs, batch, seen, settings) if branch else None
        if view is not None:
            confusion = view.confusion_loss(semshift.frozen(critic)(view.target), weight=view.target_weight)
            loss = loss + adversary.weight * confusion
        if not math.isfinite(float(loss.detach())):
            raise SystemExit("the loss is no longer finite")
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if view is not None:
            source, target = critic(view.source.detach()), critic(view.target.detach())
            critic_loss = view.discriminator_loss(
                source, target, source_weight=view.source_weight, target_weight=view.target_weight
            )
            critic_optimiser.zero_grad()
            torch.autograd.backward(critic_loss)
            critic_optimiser.step()

    return step


def main() -> None:
    """Print the table; with --check fail where the branch adds more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", nargs=2, type=int, default=[96, 128], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--width", type=int, default=Network.width, help="channels of the network's first stage")
    parser.add_argument("--reps", type=int, default=50)
    parser.add_argument("--threads", type=int, help="of the CPU; PyTorch's choice if not given")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the branch adds more than 10 %%")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    where = head(args.device)
    print(where, flush=True)
    size = (args.size[0], args.size[1])
    settings = Settings(method="semantic", data=Data(size=size), network=Network(width=args.width))
    batch = scenes(settings, args.device)
    make = functools.partial(trainer, settings, batch, args.device)
    seconds = medians({"without": make(branch=False), "with": make(branch=True)}, args.reps, args.device)
    without, whole = 1e3 * seconds["without"], 1e3 * seconds["with"]
    percent = 100 * (whole / without - 1)
    images = settings.optimiser.images
    print(f"\n{images} source and {images} labelled target images a step, {size[0]} x {size[1]}, width {args.width}\n")
    columns = ["step without, ms", "with the semantic branch, ms", "more, ms", "more"]
    print(table(columns, [[f"{without:.2f}", f"{whole:.2f}", f"{whole - without:.2f}", f"{percent:.1f} %"]]))
    if args.json:
        figures = {"head": where, "size": size, "width": args.width, "without_ms": without, "with_ms": whole}
        args.json.write_text(json.dumps(figures | {"more_ms": whole - without, "more_percent": percent}, indent=1))
    if args.check and percent > 10:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

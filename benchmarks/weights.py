"""A fixed weight of semantic alignment against `balanced_weight`: `python benchmarks/weights.py`.

The training is joint training with semantic alignment on the built-in scenes, as in `examples/ass.py` but without
global alignment. All runs use the same images and the same initial weights. The scores are on validation images.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import head, table
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import semshift

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.ass import Segmenter, Settings, batches, mean_iou, predict
from examples.scenes import CLASSES, Scenes

WAYS: dict[str, Callable[..., Tensor | float]] = {
    "none (joint)": lambda *_: 0.0,
    "fixed, 0.01": lambda *_: 0.01,
    "fixed, 0.1": lambda *_: 0.1,
    "balanced, ratio 0.01": lambda *terms: semshift.balanced_weight(*terms, 0.01),
    "balanced, ratio 0.1": lambda *terms: semshift.balanced_weight(*terms, 0.1),
}
"""Functions that compute the weight from the labelled images' loss, the confusion loss and the features."""


def train(way: str, settings: Settings) -> tuple[Segmenter, float]:
    """Train a network; return it with the mean weight over the steps after the discriminator's head start and ramp."""
    torch.manual_seed(settings.seed)
    segmenter = Segmenter(len(CLASSES))
    align = semshift.SemanticAlignment(segmenter.channels, len(CLASSES))
    optimiser = torch.optim.AdamW(segmenter.parameters(), weight_decay=1e-4)
    discriminator_optimiser = torch.optim.Adam(
        align.parameters(), settings.discriminator_learning_rate, betas=(0.9, 0.99)
    )
    rate = semshift.Polynomial(settings.learning_rate, 0.0, settings.steps)
    fifth, weights = max(1, settings.steps // 5), []
    rise = semshift.Then(semshift.Constant(0.0), fifth, semshift.Sigmoid(0.0, 1.0, fifth))
    for step, batch in enumerate(tqdm(batches(settings), desc=way, total=settings.steps, leave=False)):
        (x_s, y_s), (x_l, y_l) = batch["source"], batch["labelled"]
        features_s, logits_s = segmenter(x_s)
        features_l, logits_l = segmenter(x_l)
        labelled_loss = F.cross_entropy(logits_l, y_l, ignore_index=255)
        losses = align(features_s, y_s, features_l, y_l)
        weight = WAYS[way](labelled_loss, losses.confusion, features_l)
        loss = F.cross_entropy(logits_s, y_s, ignore_index=255) + labelled_loss
        loss = loss + rise(step) * weight * losses.confusion + losses.discriminator
        optimiser.param_groups[0]["lr"] = rate(step)
        optimiser.zero_grad()
        discriminator_optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        discriminator_optimiser.step()
        weights += [float(weight)] if step >= 2 * fifth else []
    return segmenter.eval(), statistics.fmean(weights)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file after every run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(where := head("cpu"), flush=True)
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    weights: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in args.seeds:
        scenes = Scenes("target", "val", 60, seed=seed)
        labels = torch.stack([torch.from_numpy(scenes[i].label).long() for i in range(len(scenes))])
        for way in WAYS:
            segmenter, weight = train(way, Settings(seed=seed, steps=args.steps, device="cpu"))
            scores[way].append(100 * mean_iou(predict(segmenter, scenes), labels))
            weights[way].append(weight)
            print(f"seed {seed}, {way}: {scores[way][-1]:.1f}", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"head": where, "scores": scores, "weights": weights}, indent=1))
    rows = []
    for way, values in scores.items():
        gains = [value - joint for value, joint in zip(values, scores["none (joint)"])]
        spread = [statistics.stdev(each) if len(each) > 1 else float("nan") for each in (values, gains)]
        error = spread[1] / len(gains) ** 0.5
        row = [f"{statistics.fmean(values):.1f} ± {spread[0]:.1f}", f"{statistics.fmean(gains):+.1f} ± {error:.1f}"]
        rows.append([way, f"{statistics.fmean(weights[way]):.3g}", *row])
    print(f"\n{args.steps} steps, seeds {', '.join(map(str, args.seeds))}\n")
    print(table(["weight of semantic alignment", "mean weight", "validation mIoU", "over joint, paired"], rows))


if __name__ == "__main__":
    main()

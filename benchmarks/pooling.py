"""Pooling on the CPU, compared with all usual ways to write it: `python benchmarks/pooling.py [--check] [--json FILE]`.

First all ways are checked against float64, forward and backward. Then they are timed in one process, each once in every
round. The time of every way includes the check of the labels, the ignored pixels and the counts.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import head, medians, peak_mib, rounds, table
from torch import Tensor
from torch.nn.functional import interpolate, pad
from ways import ONE_HOT, WAYS, Way, by_index_add

import semshift

# Images, channels, height, width, classes.
SHAPES = (
    (2, 2048, 65, 129, 19),
    (2, 256, 128, 256, 19),
    (2, 19, 512, 1024, 19),
    (2, 512, 65, 129, 150),
    (1, 256, 128, 128, 2000),
)
# A way that takes longer, or handles more elements class by class, is left out for that shape. The output reports it.
LONGEST_SECONDS = 3.0
MOST_ELEMENTS = 2**29
Pooled = tuple[Tensor, Tensor]
Call = Callable[[Tensor], Pooled]


def whole(way: Way, features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None) -> Pooled:
    """Run a way together with the code that a careful user adds: the check, the ignored pixels, the counts."""
    semshift.check_labels(labels, num_classes, ignore_index=ignore_index)
    slots = labels if ignore_index is None else torch.where(labels == ignore_index, num_classes, labels)
    slots = slots.long()
    sums = way(features, slots, num_classes + 1)[:num_classes]
    return sums, torch.bincount(slots.flatten(), minlength=num_classes + 1)[:num_classes]


def ours(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None) -> Pooled:
    """Pool with semshift's `class_sums`."""
    pooled = semshift.class_sums(features, labels, num_classes, ignore_index=ignore_index)
    return pooled.sums, pooled.mass


def round_trip(call: Call, leaf: Tensor, grad: Tensor) -> Tensor:
    """Run forward and backward, and return the gradient of the features."""
    sums, _ = call(leaf)
    return torch.autograd.grad(sums, leaf, grad.to(sums.dtype))[0]


def label_map(images: int, height: int, width: int, num_classes: int, kind: str, seed: int) -> Tensor:
    """Labels in segments of 8 x 8 pixels, as in real label maps, or noise; 2 % are ignored if 255 is not a class."""
    generator = torch.Generator().manual_seed(seed)
    grid = (height, width) if kind == "random" else (-(-height // 8), -(-width // 8))
    labels = torch.randint(0, num_classes, (images, 1, *grid), generator=generator).double()
    labels = interpolate(labels, (height, width), mode="nearest-exact")[:, 0].long()
    if num_classes <= 255:
        labels[torch.rand(labels.shape, generator=generator) < 0.02] = 255
    return labels


def agree(calls: dict[str, Call], leaf: Tensor, labels: Tensor, grad: Tensor, ignore: int | None) -> dict[str, float]:
    """Stop if a way disagrees with float64; return the seconds of each way's first forward and backward.

    In any order, adding n floats has an error of at most n * eps * sum |x|. The gradient is a copy of rows; ways that
    compute the mean round it twice.
    """
    num_classes, wide = len(grad), leaf.detach().double()
    want, counts = whole(by_index_add, wide, labels, num_classes, ignore)
    of_absolutes, _ = whole(by_index_add, wide.abs(), labels, num_classes, ignore)
    slots = labels if ignore is None else torch.where(labels == ignore, num_classes, labels)
    spread = pad(grad, (0, 0, 0, 1))[slots].movedim(-1, 1).to(leaf.dtype)
    in_half = leaf.dtype.itemsize == 2
    bound = counts[:, None] * torch.finfo(torch.float32 if in_half else leaf.dtype).eps * of_absolutes
    seconds = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        gradient = round_trip(call, leaf, grad)
        seconds[name] = time.perf_counter() - begin
        if not ((gradient - spread).abs() <= torch.finfo(leaf.dtype).eps * spread.abs()).all():
            raise SystemExit(f"{name}: the backward is off by {(gradient - spread).abs().max().item():.3g}")
        sums, mass = call(leaf.detach())
        if not torch.equal(mass, counts):
            raise SystemExit(f"{name}: wrong counts")
        # In half precision only ours keeps float32 sums. The other ways may lose precision, and are timed anyway.
        excess = ((sums.double() - want).abs() - bound).max().item()
        if not (excess <= 0 or (in_half and name != "ours")):
            raise SystemExit(f"{name}: off by {excess:.3g} more than n * eps * sum |x|")
    return seconds


def hard(shapes: list[tuple[int, ...]], args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the main table, for forward and for forward with backward, and a list of the ways left out."""
    results, left_out = [], []
    dtypes = [getattr(torch, name) for name in args.dtype]
    for shape, dtype, channels_last in itertools.product(shapes, dtypes, (False, True)):
        images, channels, height, width, num_classes = shape
        ignore = 255 if num_classes <= 255 else None
        features = torch.randn(images, channels, height, width).to(dtype)
        features = features.to(memory_format=torch.channels_last) if channels_last else features
        labels = label_map(images, height, width, num_classes, args.labels, args.seed)
        grad = torch.randn(num_classes, channels)
        leaf = features.clone().requires_grad_()
        large = {"loop"} if num_classes * features.numel() > MOST_ELEMENTS else set()
        large |= ONE_HOT if num_classes * labels.numel() > MOST_ELEMENTS else set()
        given: dict[str, Any] = {"labels": labels, "num_classes": num_classes, "ignore_index": ignore}
        calls: dict[str, Call] = {
            name: functools.partial(whole, WAYS[name], **given) for name in args.ways if name not in large
        }
        calls["ours"] = functools.partial(ours, **given)
        first = agree(calls, leaf, labels, grad, ignore)
        slow = {name for name in first if name != "ours" and first[name] > LONGEST_SECONDS}
        calls = {name: call for name, call in calls.items() if name not in slow}
        layout = "channels-last" if channels_last else "NCHW"
        place = f"{', '.join(map(str, shape))}, {str(dtype)[6:]}, {layout}"
        left_out += [f"{place}: {name}, too many elements to handle class by class" for name in sorted(large)]
        left_out += [f"{place}: {name}, {first[name]:.1f} s per call" for name in sorted(slow)]
        forward = {name: functools.partial(call, features) for name, call in calls.items()}
        both = {name: functools.partial(round_trip, call, leaf, grad) for name, call in calls.items()}
        for direction, moved, runs in (("forward", 1, forward), ("forward + backward", 2, both)):
            # The floor moves the same number of bytes: one read of the features, or one copy (a read and a write).
            floor = functools.partial(torch.sum if moved == 1 else torch.clone, features)
            seconds = medians({**runs, "floor": floor}, min(3, args.reps))
            # Ways that are nearly as fast as the fastest are timed again, without the slow ones in between.
            fastest = min(seconds[name] for name in set(runs) - {"ours"})
            heat = {name: run for name, run in runs.items() if name == "ours" or seconds[name] <= 1.4 * fastest}
            times = rounds({**heat, "floor": floor}, args.reps)
            seconds |= {name: statistics.median(of) for name, of in times.items()}
            best = min(set(heat) - {"ours"}, key=seconds.__getitem__)
            results.append(
                {
                    "shape": list(shape),
                    "dtype": str(dtype)[6:],
                    "layout": layout,
                    "direction": direction,
                    "ms": {name: 1e3 * value for name, value in seconds.items()},
                    "gb_per_s": moved * features.nbytes / seconds["ours"] / 1e9,
                    "share_of_floor": seconds["floor"] / seconds["ours"],
                    "extra_mib": {name: peak_mib(run) for name, run in runs.items()},
                    "best": best,
                    # The ratio is taken within each round, since a slow phase of the machine lasts longer than a round.
                    "ratio": statistics.median(a / b for a, b in zip(times["ours"], times[best])),
                }
            )
    return results, left_out


def show_hard(rows: list[dict[str, Any]], left_out: list[str], args: argparse.Namespace) -> None:
    """Print the main table."""
    shown = [*(name for name in WAYS if any(name in row["ms"] for row in rows)), "floor", "ours"]
    columns = ["B, C, h, w, K", "dtype", "layout", "direction", *shown, "GB/s", "of floor", "MiB", "to the best"]
    lines = [
        [
            ", ".join(map(str, row["shape"])),
            row["dtype"],
            row["layout"],
            row["direction"],
            *(f"{row['ms'][name]:.3g}" if name in row["ms"] else "" for name in shown),
            f"{row['gb_per_s']:.3g}",
            f"{100 * row['share_of_floor']:.0f} %",
            "" if row["extra_mib"]["ours"] is None else f"{row['extra_mib']['ours']:.3g}",
            f"{row['ratio']:.2f} ({row['best']})",
        ]
        for row in rows
    ]
    print(f"\nmilliseconds; MiB: memory that ours needs beyond the features; labels: {args.labels}\n")
    print(f"{table(columns, lines)}\n")
    print("\n".join(f"left out of {line}" for line in left_out), flush=True)


def missed_hard(rows: list[dict[str, Any]]) -> list[str]:
    """Missed thresholds: no way is faster by 5 %, and at two shapes or more, ours beats all by a fifth both ways."""
    missed = [
        f"{row['shape']} {row['dtype']} {row['layout']} {row['direction']}: ratio {row['ratio']:.2f} to {row['best']}"
        for row in rows
        if row["ratio"] > 1.05
    ]
    # The two directions of a shape, layout and dtype are adjacent rows.
    fast = {str(a["shape"]) for a, b in zip(rows[::2], rows[1::2]) if max(a["ratio"], b["ratio"]) <= 0.8}
    few = f"only {len(fast)} shapes have a ratio of at most 0.8 in both directions, of the two needed: {sorted(fast)}"
    return missed if len(fast) >= 2 else [*missed, few]


def small(args: argparse.Namespace) -> dict[str, float]:
    """Microseconds that ours takes beyond the bare PyTorch lines, at 64 pixels and 64 channels."""
    features = torch.randn(1, 64, 8, 8, requires_grad=True)
    labels = torch.randint(0, 19, (1, 8, 8))
    grad = torch.randn(19, 64)

    def bare() -> Tensor:
        slots = torch.where(labels == 255, 19, labels).flatten()
        pixels = features.movedim(1, -1).reshape(-1, 64)
        torch.bincount(slots, minlength=20)
        return torch.zeros(20, 64).index_add_(0, slots, pixels)[:19]

    def line() -> Tensor:
        return semshift.class_sums(features, labels, 19).sums

    def repeated(call: Callable[[], Tensor], backward: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(backward):
                for _ in range(100):
                    torch.autograd.grad(call(), features, grad) if backward else call()

        return run

    runs = {
        "bare": repeated(bare, False),
        "ours": repeated(line, False),
        "bare, both": repeated(bare, True),
        "ours, both": repeated(line, True),
    }
    micro = {name: 1e4 * value for name, value in medians(runs, 40).items()}
    return micro | {"extra": micro["ours"] - micro["bare"], "extra, both": micro["ours, both"] - micro["bare, both"]}


def bilinear(args: argparse.Namespace) -> dict[str, Any]:
    """Measure pooling at label resolution, against upsampling the features and pooling them in the best way."""
    channels, height, width, to_height, to_width, num_classes = args.bilinear
    ignore = 255 if num_classes <= 255 else None
    features = torch.randn(1, channels, height, width)
    labels = label_map(1, to_height, to_width, num_classes, args.labels, args.seed)

    def upsampled(way: Way) -> Pooled:
        large = interpolate(features, (to_height, to_width), mode="bilinear")
        return whole(way, large, labels, num_classes, ignore)

    def line() -> Pooled:
        pooled = semshift.class_sums(features, labels, num_classes, ignore_index=ignore)
        return pooled.sums, pooled.mass

    runs: dict[str, Callable[[], Pooled]] = {
        name: functools.partial(upsampled, WAYS[name]) for name in ("bmm", "index_add_", "scatter_add_")
    }
    runs["ours"] = line
    # float64 for a few channels only, which would otherwise fill the memory. Channels are pooled independently.
    some = slice(0, 32)
    large = interpolate(features[:, some].double(), (to_height, to_width), mode="bilinear")
    want, counts = whole(by_index_add, large, labels, num_classes, ignore)
    # Roundings: adding n terms, float32 positions of up to h and w, and a product of weights for each cell.
    roundings = counts + 4 * (height + width) + height * width
    bound = (torch.finfo(torch.float32).eps * features.abs().max() * counts * roundings)[:, None]
    first = {}
    for name, run in runs.items():
        begin = time.perf_counter()
        sums, mass = run()
        first[name] = time.perf_counter() - begin
        if not torch.equal(counts, mass) or not ((sums[:, some] - want).abs() <= bound).all():
            raise SystemExit(f"bilinear: {name} does not agree with float64")
    del large, sums
    # These calls need gigabytes, so only the best of them is timed again.
    best = min(set(runs) - {"ours"}, key=first.__getitem__)
    runs = {best: runs[best], "ours": line}
    seconds = medians(runs, min(3, args.reps))
    memory = {name: peak_mib(run) for name, run in runs.items()}
    theirs, mine = memory[best], memory["ours"]
    return {
        "ms": {name: 1e3 * value for name, value in seconds.items()},
        "extra_mib": memory,
        "first_ms": {name: 1e3 * value for name, value in first.items()},
        "best": best,
        "times_faster": seconds[best] / seconds["ours"],
        "times_smaller": None if theirs is None or mine is None else theirs / max(mine, 1e-3),
    }


def main() -> None:
    """Print the tables; with --check, fail if a threshold is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--labels", default="segments", choices=["segments", "random"], help="kind of label maps")
    parts = ["hard", "small", "bilinear"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, help="measure only these parts")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="ways to compare with ours")
    parser.add_argument("--shape", nargs=5, type=int, action="append", metavar=("B", "C", "h", "w", "K"))
    usual = [2048, 65, 129, 512, 1024, 19]
    parser.add_argument("--bilinear", nargs=6, type=int, default=usual, metavar=("C", "h", "w", "H", "W", "K"))
    parser.add_argument("--reps", type=int, default=15, help="rounds of timing (default: 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a threshold is missed")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"head": head("cpu"), "labels": args.labels}
    print(figures["head"], flush=True)
    missed: list[str] = []
    if "hard" in args.only:
        rows, left_out = hard([tuple(shape) for shape in args.shape or SHAPES], args)
        figures |= {"hard": rows, "left_out": left_out}
        show_hard(rows, left_out, args)
        missed += missed_hard(rows)
    if "small" in args.only:
        micro = figures["small"] = small(args)
        print("\n64 pixels, 64 channels, microseconds per call\n")
        print(table(list(micro), [[f"{value:.1f}" for value in micro.values()]]))
        missed += [f"small, {k}: {micro[k]:.0f} us" for k in ("extra", "extra, both") if micro[k] > 60]
    if "bilinear" in args.only:
        result = figures["bilinear"] = bilinear(args)
        lines = [
            [name, f"{value:.4g}", "" if (mib := result["extra_mib"][name]) is None else f"{mib:.4g}"]
            for name, value in result["ms"].items()
        ]
        c, h, w, to_h, to_w, k = args.bilinear
        print(f"\nbilinear: {c} x {h} x {w} pooled at {to_h} x {to_w}, {k} classes; all but ours upsample first\n")
        print(table(["way", "ms", "MiB"], lines))
        ratios = {"faster": (result["times_faster"], 30), "smaller": (result["times_smaller"], 50)}
        for name, (value, threshold) in ratios.items():
            if value is not None:
                print(f"{'' if name == 'smaller' else chr(10)}{value:.1f} times {name} than {result['best']}")
                missed += [f"bilinear: {value:.1f} times {name}"] if value < threshold else []
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print("".join(f"\nmissed: {line}" for line in missed))
    if args.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

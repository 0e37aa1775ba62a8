"""Pooling against every usual way to write it: `python benchmarks/pooling.py [--check] [--json FILE]`.

First all ways are shown to agree with float64, then they are timed side by side in one process, each once in every
round. Checks of the labels, their handling and the counts are inside the time of every way.
"""

import argparse
import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import head, medians, peak_mib, table
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from semshift.labels import check_labels
from semshift.pooling import class_sums

# Images, channels, height, width, classes.
SHAPES = (
    (2, 2048, 65, 129, 19),
    (2, 256, 128, 256, 19),
    (2, 19, 512, 1024, 19),
    (2, 512, 65, 129, 150),
    (1, 256, 128, 128, 2000),
)
MANY_CLASSES = (1, 256, 256, 256, 100_000)
Way = Callable[[Tensor, Tensor, int], Tensor]


def by_bmm(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """One-hot labels times features."""
    hot = torch.zeros(len(slots), rows, slots[0].numel(), device=slots.device, dtype=features.dtype)
    hot.scatter_(1, slots.flatten(1)[:, None], 1)
    return (hot @ features.flatten(2).mT).sum(0)


def by_bmm_other_order(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """Features times one-hot labels."""
    hot = torch.zeros(len(slots), slots[0].numel(), rows, device=slots.device, dtype=features.dtype)
    hot.scatter_(2, slots.flatten(1)[:, :, None], 1)
    return (features.flatten(2) @ hot).sum(0).mT


def by_einsum(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """An einsum over `one_hot`."""
    return torch.einsum("bchw,bhwk->kc", features, one_hot(slots, rows).to(features.dtype))


def by_scatter_add(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """`scatter_add_` along the pixels, the index expanded over the channels."""
    images, channels = features.shape[:2]
    index = slots.flatten(1)[:, None].expand(images, channels, -1)
    return features.new_zeros(images, channels, rows).scatter_add_(2, index, features.flatten(2)).sum(0).mT


def by_scatter_reduce(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """The same through `scatter_reduce`."""
    images, channels = features.shape[:2]
    index = slots.flatten(1)[:, None].expand(images, channels, -1)
    zeros = features.new_zeros(images, channels, rows)
    return zeros.scatter_reduce(2, index, features.flatten(2), "sum").sum(0).mT


def by_index_add(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """`index_add_` of a row for each pixel, copied together where the channels do not lie side by side."""
    pixels = features.movedim(1, -1).reshape(-1, features.shape[1])
    return features.new_zeros(rows, features.shape[1]).index_add_(0, slots.flatten(), pixels)


def by_loop(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """A loop over the classes, masking each."""
    return torch.stack([(features * (slots == k)[:, None]).sum((0, 2, 3)) for k in range(rows)])


def by_torch_scatter(features: Tensor, slots: Tensor, rows: int) -> Tensor:
    """The package torch_scatter."""
    from torch_scatter import scatter

    pixels: Tensor = features.flatten(2)
    summed: Tensor = scatter(pixels, slots.flatten(1)[:, None].expand_as(pixels), dim=2, dim_size=rows, reduce="sum")
    return summed.sum(0).mT


WAYS: dict[str, Way] = {
    "bmm": by_bmm,
    "bmm, other order": by_bmm_other_order,
    "einsum": by_einsum,
    "scatter_add_": by_scatter_add,
    "scatter_reduce": by_scatter_reduce,
    "index_add_": by_index_add,
    "loop": by_loop,
}
if importlib.util.find_spec("torch_scatter"):
    WAYS["torch_scatter"] = by_torch_scatter


def whole(way: Way, features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None) -> Any:
    """A way with what a careful user puts around it: the check, the ignored pixels, the counts."""
    if labels.device.type == "cpu":
        check_labels(labels, num_classes, ignore_index=ignore_index)
    slots = labels if ignore_index is None else torch.where(labels == ignore_index, num_classes, labels)
    slots = slots.long()
    sums = way(features, slots, num_classes + 1)[:num_classes]
    if labels.device.type == "cpu":
        return sums, torch.bincount(slots.flatten(), minlength=num_classes + 1)[:num_classes]
    ones = torch.ones_like(slots).flatten()
    return sums, ones.new_zeros(num_classes + 1).scatter_add_(0, slots.flatten(), ones)[:num_classes]


def ours(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None) -> Any:
    """The library's one line."""
    pooled = class_sums(features, labels, num_classes, ignore_index=ignore_index)
    return pooled.sums, pooled.mass


def label_map(images: int, height: int, width: int, num_classes: int, kind: str, seed: int) -> Tensor:
    """Segments of 8 x 8 pixels as label maps have them, or noise; 2 % ignored where 255 is free."""
    generator = torch.Generator().manual_seed(seed)
    grid = (height, width) if kind == "random" else (-(-height // 8), -(-width // 8))
    labels = torch.randint(0, num_classes, (images, 1, *grid), generator=generator).double()
    labels = interpolate(labels, (height, width), mode="nearest-exact")[:, 0].long()
    if num_classes <= 255:
        labels[torch.rand(labels.shape, generator=generator) < 0.02] = 255
    return labels


def agree(results: dict[str, Any], features: Tensor, labels: Tensor, num_classes: int, ignore: int | None) -> None:
    """Refuse a way that is further from float64 than any order of summation allows."""
    wide = features.detach().double()
    want, counts = whole(by_index_add, wide, labels, num_classes, ignore)
    of_absolutes, _ = whole(by_index_add, wide.abs(), labels, num_classes, ignore)
    precise = torch.finfo(features.dtype if features.dtype.itemsize > 2 else torch.float32).eps
    for name, (sums, mass) in results.items():
        assert torch.equal(mass, counts), f"{name}: other counts"
        # In half precision only ours keeps to float32; what others lose is theirs, and they are timed all the same.
        if name == "ours" or features.dtype.itemsize > 2:
            terms = counts[:, None] + 4
            error, bound = (sums.double() - want).abs(), terms * precise * of_absolutes
            # TF32 is off, so products of floats are as exact as sums.
            assert (error <= bound).all(), f"{name}: off by {(error - bound).max().item():.3g} beyond the bound"


def hard(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the main table, forward and forward with backward."""
    results = []
    shapes = SHAPES if args.device == "cpu" else (*SHAPES, MANY_CLASSES)
    dtypes = [getattr(torch, name) for name in args.dtype]
    for shape, dtype, channels_last in itertools.product(shapes, dtypes, (False, True)):
        images, channels, height, width, num_classes = shape
        ignore = 255 if num_classes <= 255 else None
        features = torch.randn(images, channels, height, width).to(args.device, dtype)
        features = features.to(memory_format=torch.channels_last) if channels_last else features
        labels = label_map(images, height, width, num_classes, args.labels, args.seed).to(args.device)
        # Left out where one call would take seconds or tens of gigabytes.
        of_classes = labels.numel() * num_classes > 2**29
        left_out = {"loop"} if num_classes > 200 or args.device == "cpu" and channels > 512 else set()
        left_out |= {"loop", "bmm", "bmm, other order", "einsum"} if of_classes else set()
        ways = {name: way for name, way in WAYS.items() if name not in left_out}
        calls: dict[str, Callable[[], Any]] = {
            name: (lambda way=way, f=features: whole(way, f, labels, num_classes, ignore))  # type: ignore[misc]
            for name, way in ways.items()
        }
        calls["ours"] = lambda: ours(features, labels, num_classes, ignore)  # noqa: B023
        agree({name: call() for name, call in calls.items()}, features, labels, num_classes, ignore)
        calls["floor"] = (lambda: features.clone()) if args.device == "cuda" else (lambda: features.sum())  # noqa: B023
        forward = medians(calls, args.reps, args.device)
        # A copy reads and writes: reading alone is half of it.
        forward["floor"] /= 2 if args.device == "cuda" else 1
        leaf = features.clone().requires_grad_()
        grad = torch.randn(num_classes, channels).to(args.device)
        both: dict[str, Callable[[], Any]] = {
            name: (
                lambda way=way: torch.autograd.grad(  # type: ignore[misc]
                    (sums := whole(way, leaf, labels, num_classes, ignore)[0]), leaf, grad.to(sums.dtype)
                )
            )
            for name, way in ways.items()
        }
        both["ours"] = lambda: torch.autograd.grad(ours(leaf, labels, num_classes, ignore)[0], leaf, grad)  # noqa: B023
        both["floor"] = lambda: features.clone()  # noqa: B023
        round_trip = medians(both, args.reps, args.device)
        for direction, seconds, moved in (("forward", forward, 1), ("forward + backward", round_trip, 2)):
            best = min(ways, key=lambda name: seconds[name])
            results.append(
                {
                    "shape": list(shape),
                    "dtype": str(dtype)[6:],
                    "layout": "channels-last" if channels_last else "NCHW",
                    "direction": direction,
                    "ms": {name: 1e3 * value for name, value in seconds.items()},
                    "gb_per_s": moved * features.nbytes / seconds["ours"] / 1e9,
                    "share_of_floor": seconds["floor"] / seconds["ours"],
                    "extra_mib": peak_mib(calls["ours"] if moved == 1 else both["ours"], args.device),
                    "best": best,
                    "ratio": seconds["ours"] / seconds[best],
                }
            )
    return results


def small(args: argparse.Namespace) -> dict[str, float]:
    """Microseconds beyond the bare lines at 64 pixels and 64 channels."""
    features = torch.randn(1, 64, 8, 8, device=args.device, requires_grad=True)
    labels = torch.randint(0, 19, (1, 8, 8), device=args.device)
    grad = torch.randn(19, 64, device=args.device)

    def bare() -> Tensor:
        slots = torch.where(labels == 255, 19, labels).flatten()
        pixels = features.movedim(1, -1).reshape(-1, 64)
        torch.zeros(20, device=args.device, dtype=torch.int64).scatter_add_(0, slots, torch.ones_like(slots))
        return torch.zeros(20, 64, device=args.device).index_add_(0, slots, pixels)[:19]

    def line() -> Tensor:
        return class_sums(features, labels, 19).sums

    def repeated(call: Callable[[], object], without: bool) -> Callable[[], object]:
        def run() -> None:
            with torch.set_grad_enabled(not without):
                for _ in range(100):
                    call()

        return run

    runs = {
        "bare": repeated(bare, True),
        "ours": repeated(line, True),
        "bare, both": repeated(lambda: torch.autograd.grad(bare(), features, grad), False),
        "ours, both": repeated(lambda: torch.autograd.grad(line(), features, grad), False),
    }
    micro = {name: 1e4 * value for name, value in medians(runs, 40, args.device).items()}
    return micro | {"extra": micro["ours"] - micro["bare"], "extra, both": micro["ours, both"] - micro["bare, both"]}


def bilinear(args: argparse.Namespace) -> dict[str, float | None]:
    """Pooling at label resolution, against up-sampling the features and pooling those."""
    features = torch.randn(1, 2048, 65, 129, device=args.device)
    labels = label_map(1, 512, 1024, 19, args.labels, args.seed).to(args.device)

    def upsampled() -> Any:
        return whole(by_scatter_add, interpolate(features, (512, 1024), mode="bilinear"), labels, 19, 255)

    def line() -> Any:
        pooled = class_sums(features, labels, 19, resample="bilinear")
        return pooled.sums, pooled.mass

    (want, counts), (sums, mass) = upsampled(), line()
    assert torch.equal(counts, mass)
    # Interpolating in float32 rounds as often as summing; a mean is compared, whose terms are of order one.
    assert ((want - sums) / counts.clamp(min=1)[:, None]).abs().max() < 1e-3
    del want, sums
    seconds = medians({"up-sample, then pool": upsampled}, min(3, args.reps), args.device)
    seconds |= medians({"ours": line}, args.reps, args.device)
    memory = {"up-sample, then pool": peak_mib(upsampled, args.device), "ours": peak_mib(line, args.device)}
    times = seconds["up-sample, then pool"] / seconds["ours"]
    return {f"{name}, ms": 1e3 * value for name, value in seconds.items()} | {
        **{f"{name}, MiB": value for name, value in memory.items()},
        "times faster": times,
    }


def main() -> None:
    """Print the tables; with --check fail where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--labels", default="segments", choices=["segments", "random"])
    parser.add_argument("--only", nargs="+", default=["hard", "small", "bilinear"])
    parser.add_argument("--reps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the CPU; PyTorch's choice if not given")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar of docs/benchmarks.md is missed")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"head": head(args.device), "labels": args.labels}
    print(figures["head"], flush=True)
    missed = []
    if "hard" in args.only:
        rows = figures["hard"] = hard(args)
        shown = [*(name for name in WAYS if any(name in row["ms"] for row in rows)), "floor", "ours"]
        columns = ["B, C, h, w, K", "dtype", "layout", "direction", *shown, "GB/s", "of the floor", "MiB", "to the best"]
        lines = [
            [
                ", ".join(map(str, row["shape"])),
                row["dtype"],
                row["layout"],
                row["direction"],
                *(f"{row['ms'][name]:.3g}" if name in row["ms"] else "" for name in shown),
                f"{row['gb_per_s']:.3g}",
                f"{100 * row['share_of_floor']:.0f} %",
                "" if row["extra_mib"] is None else f"{row['extra_mib']:.3g}",
                f"{row['ratio']:.2f} ({row['best']})",
            ]
            for row in rows
        ]
        print(f"\nmilliseconds; labels: {args.labels}\n\n{table(columns, lines)}", flush=True)
        slow = [row for row in rows if row["ratio"] > 1.05]
        missed += [f"{row['shape']} {row['layout']} {row['direction']}: ratio {row['ratio']:.2f}" for row in slow]
        fast = [(str(row["shape"]), row["layout"]) for row in rows if row["ratio"] <= 0.8]
        both = {place for place in fast if fast.count(place) == 2}
        missed += [] if len(both) >= 2 else [f"at most 0.8 in both directions only at {sorted(both)}"]
    if "small" in args.only:
        figures["small"] = small(args)
        print("\n64 pixels, 64 channels, microseconds a call:", {k: round(v, 1) for k, v in figures["small"].items()})
        missed += [f"small: {figures['small']['extra']:.0f} us more"] if figures["small"]["extra"] > 60 else []
    if "bilinear" in args.only:
        figures["bilinear"] = result = bilinear(args)
        print("\nbilinear, 2048 x 65 x 129 from 512 x 1024, 19 classes:", {k: v and round(v, 1) for k, v in result.items()})
        missed += [f"bilinear: {result['times faster']:.0f} times"] if (result["times faster"] or 0) < 30 else []
        if (result["ours, MiB"] or 0) > (result["up-sample, then pool, MiB"] or 0) / 50:
            missed.append(f"bilinear: {result['ours, MiB']:.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    for line in missed:
        print("missed:", line)
    if args.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

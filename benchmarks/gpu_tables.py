"""The tables of `on_gpu.py`: times measured with CUDA graphs, shares of the device's copy speed, and our thresholds.

On a CPU, times are measured without graphs. This rehearses the program and says nothing about a GPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_checks import Case, Grid, label_map, made, noise, pooled
from torch import Tensor
from ways import Way, by_bmm, by_bmm_other_order, by_index_add, by_scatter_add

import semshift

__all__ = [
    "COLUMNS",
    "RESAMPLING_COLUMNS",
    "cells",
    "copy_speed",
    "hard_row",
    "resampled_cells",
    "resampled_row",
    "verdict",
]

OTHERS: dict[str, Way] = {
    "index_add_": by_index_add,
    "scatter_add_": by_scatter_add,
    "one-hot product": by_bmm,
    "one-hot product, other order": by_bmm_other_order,
}
# Successive calls must not find their input in the cache.
CACHES, LEAST_BYTES = 4, 2**28
MEDIAN_OF, SECONDS = 7, 0.02
# Few enough calls that the queue of kernel launches never fills.
QUEUED = 50
Call = Callable[[], object]
COLUMNS = (
    "B, C, h, w, K | dtype | layout | MB | ours, ms | share | best other, ms | other / ours | backward, ms | share | "
    "host, us | extra memory"
)
RESAMPLING_COLUMNS = "B, C, h, w, H, W | dtype | resample | ms | features at copy speed, ms"


def copies(one: int, device: str) -> int:
    """Number of inputs of `one` bytes that together far exceed the cache; at least two."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(max(LEAST_BYTES, CACHES * cache) / max(1, one)))


def elapsed(run: Call, times: int, device: str) -> float:
    """Seconds for `times` runs, by the device's clock."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    seconds: float = begin.elapsed_time(end) / 1e3
    return seconds


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    """Capture all calls in one graph, with separate results; None if they cannot be captured."""
    torch.cuda.synchronize()
    try:
        # Most calls that cannot be captured force a device sync. A failed capture would corrupt the allocator's state.
        torch.cuda.set_sync_debug_mode("error")
        calls[0]()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
    except RuntimeError:
        # The context manager does not do this.
        torch.cuda.set_stream(torch.cuda.default_stream())
        return None
    del kept
    return graph


def seconds_of(calls: Sequence[Call], device: str) -> tuple[float, str]:
    """Median seconds per call, and how it was timed: by a graph, or by events, which include the host's time."""
    calls[0]()
    graph = captured(calls) if device == "cuda" else None
    run: Call = graph.replay if graph else lambda: [call() for call in calls]
    elapsed(run, 1, device)
    once = elapsed(run, 1, device)
    seconds = SECONDS if device == "cuda" else 0.0
    times = min(200, max(1, math.ceil(seconds / max(once, 1e-6))))
    median = statistics.median(elapsed(run, times, device) for _ in range(MEDIAN_OF))
    return median / times / len(calls), "graph" if graph else "events" if device == "cuda" else "plain"


def host_seconds(call: Call, device: str) -> float:
    """Seconds until a call returns on the host, without waiting for the device."""
    taken = []
    for _ in range(MEDIAN_OF if device == "cuda" else 1):
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(QUEUED):
            call()
        taken.append((time.perf_counter() - begin) / QUEUED)
        if device == "cuda":
            torch.cuda.synchronize()
    return statistics.median(taken)


def copy_speed(smoke: bool, device: str) -> dict[str, float]:
    """Bytes per second of a copy (read and written), of a sum (read) and of a fill (written)."""
    large = [noise((2**16 if smoke else 2**28,), device, seed) for seed in range(2)]
    calls: dict[str, tuple[int, Call]] = {
        "copy": (2, lambda: large[0].copy_(large[1])),
        "sum": (1, lambda: large[0].sum()),
        "fill": (1, lambda: large[0].fill_(1.0)),
    }
    return {name: moved * large[0].nbytes / seconds_of([call], device)[0] for name, (moved, call) in calls.items()}


def whole(way: Way, features: Tensor, labels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Run a way together with the code that a careful user adds: for the ignored pixels and the counts."""
    slots, rows = labels, case.num_classes + 1
    if case.ignore_index is not None:
        slots = torch.where(labels == case.ignore_index, case.num_classes, labels)
    # This is the only count that neither forces a device sync nor adds pixel by pixel in memory.
    counts = torch.histc(slots.float(), rows, 0, rows)
    return way(features, slots, rows)[: case.num_classes], counts[: case.num_classes].long()


def extra_share(call: Call, features: Tensor) -> float:
    """Peak memory of a call, as a share of the features' memory."""
    if not features.is_cuda:
        return 0.0
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - held) / features.nbytes


def hard_row(case: Case, copy: float, device: str) -> dict[str, Any]:
    """Measure a shape: the forward of ours and of the best other way, our backward, and our time on the host."""
    features, labels = made(case, device)
    labels = labels.long()
    inputs = [(features, labels)]
    inputs += [(features.clone(), labels.clone()) for _ in range(copies(features.nbytes, device) - 1)]
    ours = [lambda pair=pair: pooled(*pair, case) for pair in inputs]
    seconds, how = seconds_of(ours, device)
    others, failed = {}, {}
    for name, way in OTHERS.items():
        calls = [lambda pair=pair, way=way: whole(way, *pair, case) for pair in inputs]
        try:
            sums, counts = whole(way, *inputs[0], case)
            assert torch.equal(counts, pooled(*inputs[0], case).mass), "wrong counts"
            del sums
            others[name] = seconds_of(calls, device)[0]
        except (RuntimeError, AssertionError) as error:
            failed[name] = str(error).splitlines()[0]
    rows = noise((case.num_classes, case.shape[1]), device).to(case.dtype)
    options = case.num_classes, case.ignore_index, False, case.channels_last
    back = [lambda of=of: torch.ops.semshift.spread_rows(rows, of, *options) for _, of in inputs]
    backward, _ = seconds_of(back, device)
    host, extra = host_seconds(ours[0], device), extra_share(ours[0], features)
    best = min(others, key=others.__getitem__, default=None)
    return {
        "case": str(case),
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "channels_last": case.channels_last,
        "bytes": features.nbytes,
        "seconds": seconds,
        "timed_by": how,
        "share": features.nbytes / seconds / copy,
        "others": others,
        "failed": failed,
        "best": best,
        "ratio": others[best] / seconds if best else math.inf,
        "backward": backward,
        "backward_share": features.nbytes / backward / copy,
        "host": host,
        "extra": extra,
    }


def milliseconds(seconds: float, timed_by: str) -> str:
    """Milliseconds, and the method of measuring if it was not a graph."""
    return f"{1e3 * seconds:.3f}" + ("" if timed_by == "graph" else f" ({timed_by})")


def cells(row: dict[str, Any]) -> str:
    """A row of the main table."""
    best = f"{1e3 * row['others'][row['best']]:.3f} ({row['best']})" if row["best"] else "none"
    failed = "".join(f"; {name} failed: {why}" for name, why in row["failed"].items())
    columns = [
        row["case"],
        f"{row['bytes'] / 1e6:.0f}",
        milliseconds(row["seconds"], row["timed_by"]),
        f"{row['share']:.2f}",
        best + failed,
        f"{row['ratio']:.2f}",
        f"{1e3 * row['backward']:.3f}",
        f"{row['backward_share']:.2f}",
        f"{1e6 * row['host']:.0f}",
        f"{100 * row['extra']:.1f} %",
    ]
    return " | ".join(columns)


def resampled_row(grid: Grid, dtype: torch.dtype, resample: Any, copy: float, device: str) -> dict[str, Any]:
    """Measure pooling with labels of a different size, and the time to read the features at copy speed."""
    images, _, _, _, *size = grid
    features = noise(grid[:4], device).to(dtype)
    inputs = [(features, label_map(images, *size, 19, device))]
    inputs += [tuple(of.clone() for of in inputs[0]) for _ in range(copies(features.nbytes, device) - 1)]
    calls = [lambda pair=pair: semshift.class_sums(*pair, 19, resample=resample) for pair in inputs]
    seconds, how = seconds_of(calls, device)
    return {
        "grid": grid,
        "dtype": str(dtype)[6:],
        "resample": resample,
        "seconds": seconds,
        "timed_by": how,
        "own": features.nbytes / copy,
    }


def resampled_cells(row: dict[str, Any]) -> str:
    """A row of the table of resampling."""
    shape, taken = ", ".join(map(str, row["grid"])), milliseconds(row["seconds"], row["timed_by"])
    return f"{shape} | {row['dtype']} | {row['resample']} | {taken} | {1e3 * row['own']:.3f}"


def least_share(row: dict[str, Any]) -> float | None:
    """Threshold for the forward's share of the copy speed; None if its shape has no threshold."""
    _, channels, _, _, num_classes = row["shape"]
    half, megabytes = row["dtype"] != "float32", row["bytes"] / 1e6
    if num_classes > 32 or (channels < 64 and channels != 19):
        return None
    if channels == 19:
        return (0.25 if half and row["channels_last"] else 0.45) if megabytes >= 150 else None
    if megabytes >= 256:
        return (0.75 if channels == 64 else 0.8) if half else 0.85
    return 0.7 if megabytes >= 128 else 0.55 if megabytes >= 64 else None


def verdict(rows: Sequence[dict[str, Any]], resampled: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each threshold, met or missed; the missed cases follow with their values."""
    judged: list[tuple[str, str, float, float, bool]] = []
    for row in rows:
        least = least_share(row)
        if least is not None:
            back = 0.75 if row["dtype"] != "float32" else 0.85
            judged.append(("forward", row["case"], row["share"], least, row["share"] >= least))
            judged.append(("backward", row["case"], row["backward_share"], back, row["backward_share"] >= back))
        judged.append(("ours / best other", row["case"], 1 / row["ratio"], 1.05, row["ratio"] * 1.05 >= 1))
        judged.append(("host, us", row["case"], 1e6 * row["host"], 60, row["host"] <= 60e-6))
    for row in resampled:
        if row["resample"] in ("bilinear", "area"):
            most = 4 * row["own"] + 50e-6
            name = f"{', '.join(map(str, row['grid']))} | {row['dtype']}"
            judged.append((f"{row['resample']}, ms", name, 1e3 * row["seconds"], 1e3 * most, row["seconds"] <= most))
    lines = []
    for kind in dict.fromkeys(kind for kind, *_ in judged):
        of = [one for one in judged if one[0] == kind]
        missed = [one for one in of if not one[4]]
        lines.append(f"{'missed' if missed else 'met'}: {kind}: {len(of) - len(missed)} of {len(of)}")
        lines += [f"  {name}: {value:.3g} against {threshold:.3g}" for _, name, value, threshold, _ in missed]
    return lines

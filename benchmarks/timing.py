"""Shared parts of the benchmarks: interleaved timing, peak memory, and a heading with device and versions."""

import ctypes
import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import semshift

__all__ = ["head", "medians", "peak_mib", "resident_mib", "rounds", "table"]


def head(device: str) -> str:
    """A line with the date, the device, the threads and the versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        models = [line for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
        name = models[0].split(":")[1].strip() if models else platform.processor()
        threads = torch.get_num_threads()
        name = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return (
        f"{datetime.date.today()}, {name}, torch {torch.__version__}, semshift {semshift.__version__}, "
        f"Python {platform.python_version()}"
    )


def rounds(runs: Mapping[str, Callable[[], object]], reps: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run; in every round each runs once, and the first round is left out.

    There are `reps` rounds. Short runs are noisier, so they get more: up to ten times as many within two seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # The order changes in each round, since a run that follows a large copy finds less in the cache.
    order, shuffled = list(runs), random.Random(0)
    while len(taken := seconds[order[0]]) <= reps or (len(taken) <= 10 * reps and sum(map(sum, seconds.values())) < 2):
        shuffled.shuffle(order)
        for name in order:
            run = runs[name]
            _wait(device)
            begin = time.perf_counter()
            kept = run()
            _wait(device)
            seconds[name].append(time.perf_counter() - begin)
            del kept
    return {name: of[1:] for name, of in seconds.items()}


def medians(runs: Mapping[str, Callable[[], object]], reps: int) -> dict[str, float]:
    """Median seconds of each run over the rounds of `rounds`."""
    return {name: statistics.median(of) for name, of in rounds(runs, reps).items()}


def peak_mib(run: Callable[[], object]) -> float | None:
    """Peak MiB of a call beyond the memory held before it; None if unknown. Run the call once before."""
    before = resident_mib()
    if before is None:
        return None
    # This resets the high-water mark on Linux.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(0.0, _status("VmHWM") - before)


def resident_mib() -> float | None:
    """MiB of the process in memory, without the allocator's free memory; None if the system does not report it."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

"""What the benchmarks share: interleaved medians, peak memory, and a head that says where a table comes from."""

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
    """One line: date, device, threads and versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        models = [line for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
        name = models[0].split(":")[1].strip() if models else platform.processor()
        name = f"{name}, {torch.get_num_threads()} threads"
    return (
        f"{datetime.date.today()}, {name}, torch {torch.__version__}, semshift {semshift.__version__}, "
        f"Python {platform.python_version()}"
    )


def rounds(runs: Mapping[str, Callable[[], object]], reps: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each, all of them once in every round; a first round is left out.

    There are `reps` rounds, and more of short ones, up to ten times as many within two seconds: their noise is larger.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    # In another order each round: what runs after a copy of everything finds less in the cache.
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
    """Median seconds of each over such rounds."""
    return {name: statistics.median(of) for name, of in rounds(runs, reps).items()}


def peak_mib(run: Callable[[], object]) -> float | None:
    """MiB that a call, not the first of its kind, takes at its peak beyond what is held before; None if not known."""
    before = resident_mib()
    if before is None:
        return None
    # Linux forgets the high-water mark on this.
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(0.0, _status("VmHWM") - before)


def resident_mib() -> float | None:
    """MiB of the process in memory, without what the allocator only keeps; None where the system does not say."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown, the columns after the first to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

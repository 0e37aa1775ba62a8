"""Speed and memory of drawing batches: `python benchmarks/sampling.py [--check] [--json FILE]`.

The indices per second, the time to the first batch and the memory must not depend on the number of images or the step.
"""

import argparse
import functools
import gc
import itertools
import json
import statistics
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import head, medians, resident_mib, table

import semshift

SIZES = tuple(10**power for power in range(3, 10))
LATE = 10**9
BATCH = 8


def sampler(size: int, first_step: int, steps: int | None = None) -> semshift.MixedBatchSampler:
    """A sampler of eight images per batch, half of them from each of two domains of the given size."""
    half = BATCH // 2
    per_batch = {"source": half, "target": half}
    return semshift.MixedBatchSampler(
        {"source": size, "target": size}, per_batch, seed=0, first_step=first_step, steps=steps
    )


def draw(size: int, first_step: int, steps: int) -> None:
    """Draw all batches of `steps` steps."""
    for _ in sampler(size, first_step, steps):
        pass


def first_batch(size: int, first_step: int) -> list[int]:
    """Make a sampler and take one batch, as a resumed run does."""
    return next(iter(sampler(size, first_step)))


def memory(size: int) -> dict[str, float | None]:
    """MiB of a sampler in the middle of its draws: the peak of Python and NumPy, and the growth of the process."""
    gc.collect()
    tracemalloc.start()
    held = _begun(size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del held
    before = resident_mib()
    held = _begun(size)
    after = resident_mib()
    del held
    return {"traced": peak / 2**20, "resident": None if before is None or after is None else after - before}


def _begun(size: int) -> Iterator[list[int]]:
    batches = iter(sampler(size, LATE))
    for _ in range(1000):
        next(batches)
    return batches


def main() -> None:
    """Print the table; with --check, fail if a threshold is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=15, help="rounds of timing (default: 15)")
    parser.add_argument("--steps", type=int, default=1000, help="batches drawn in one timing (default: 1000)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a threshold is missed")
    args = parser.parse_args()
    where = head("cpu")
    print(where, flush=True)
    places = list(itertools.product(SIZES, (0, LATE)))
    draws = {f"{n}, {step}": functools.partial(draw, n, step, args.steps) for n, step in places}
    firsts = {f"{n}, {step}": functools.partial(first_batch, n, step) for n, step in places}
    draw_seconds, first_seconds = medians(draws, args.reps), medians(firsts, args.reps)
    # The first round warms up. The median of the others is used, since the allocator keeps memory in whole pages.
    rounds = [{n: memory(n) for n in SIZES} for _ in range(6)][1:]
    rows = []
    for name, (images, step) in zip(draws, places):
        mib = {kind: _median([of[images][kind] for of in rounds]) for kind in ("traced", "resident")}
        rows.append(
            {
                "images": images,
                "step": step,
                "indices_per_second": BATCH * args.steps / draw_seconds[name],
                "first_batch_ms": 1e3 * first_seconds[name],
                "traced_mib": mib["traced"],
                "resident_mib": mib["resident"],
            }
        )
    print(f"\n{BATCH} indices per batch, from two domains with `images` images each; memory is that at step {LATE:,}\n")
    columns = ["images", "step", "indices per second", "first batch, ms", "MiB traced", "MiB resident"]
    lines = [
        [
            f"{row['images']:,}",
            f"{row['step']:,}",
            f"{row['indices_per_second']:,.0f}",
            f"{row['first_batch_ms']:.3f}",
            f"{row['traced_mib']:.3f}",
            "" if row["resident_mib"] is None else f"{row['resident_mib']:.3f}",
        ]
        for row in rows
    ]
    print(table(columns, lines))
    missed = missed_thresholds(rows)
    print("".join(f"\nmissed: {line}" for line in missed))
    if args.json:
        args.json.write_text(json.dumps({"head": where, "steps": args.steps, "rows": rows}, indent=1))
    if args.check and missed:
        raise SystemExit(1)


def missed_thresholds(rows: list[dict[str, Any]]) -> list[str]:
    """The missed thresholds, as lines.

    They are 200,000 indices per second, at most 1 MB more memory for 10^9 images than for 10^3, and at most twice the
    time to the first batch at a late step.
    """
    missed = [
        f"{row['images']:,} images, step {row['step']:,}: {row['indices_per_second']:,.0f} indices per second"
        for row in rows
        if row["indices_per_second"] < 200_000
    ]
    for early, late in zip(rows[::2], rows[1::2]):
        times = late["first_batch_ms"] / early["first_batch_ms"]
        missed += (
            [f"{late['images']:,} images: a late first batch takes {times:.1f} times as long"] if times > 2 else []
        )
    for kind in ("traced_mib", "resident_mib"):
        few, many = rows[0][kind], rows[-1][kind]
        if few is not None and many - few > 1e6 / 2**20:
            missed.append(f"{kind}: {many - few:.2f} MiB more for {rows[-1]['images']:,} images")
    return missed


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    main()

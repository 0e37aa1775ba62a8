"""All GPU checks and measurements in one program: `python3 benchmarks/on_gpu.py --out DIR`, at most eight minutes.

It needs torch, Triton, NumPy, pytest and hypothesis, but no network, and it uses the semshift of this checkout. Each
result is appended to `DIR/results.md`, and its figures to `DIR/figures.jsonl`, as soon as it is known, so that a crash
loses nothing. `--smoke` runs every stage at tiny sizes within half a minute. Without a GPU only `--smoke` works.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from gpu_checks import GRIDS, ODD_SHAPES, RESAMPLES, SHAPES, SMOKE_SHAPES, Case, cases, checks, once, other_checks
from gpu_tables import COLUMNS, RESAMPLING_COLUMNS, cells, copy_speed, hard_row, resampled_cells, resampled_row, verdict
from timing import head

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES = ("speed", "compile", "checks", "tests", "memcheck", "resampling", "table")
PROCESSES = 16
# A row of a table is started only if this many seconds are left.
LAST_ROW = 15


class StopError(Exception):
    """A failure after which the remaining stages would waste time."""


class Run:
    """The state that the stages share: the arguments, the time left, the files and the failures."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.smoke = args, args.smoke
        self.end = time.monotonic() + 60 * args.minutes
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.failed: list[str] = []
        self.copy = 1.0
        self.rows: list[dict[str, Any]] = []
        self.resampled: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds left of the time limit."""
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """Print a line and append it to the results."""
        print(text, flush=True)
        with (self.out / "results.md").open("a") as file:
            file.write(text + "\n")

    def too_long(self) -> None:
        """End the program, since a kernel that hangs would use up the device's time."""
        self.say("FAILED: out of time, in the middle of a stage")
        os._exit(1)

    def figures(self, **values: Any) -> None:
        """Append figures, one JSON object per line."""
        with (self.out / "figures.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def fail(self, what: str) -> None:
        """Record a failure and print it."""
        self.failed.append(what)
        self.say(f"FAILED: {what}")

    def commands(self, commands: list[list[str]], most_seconds: float, **environment: str) -> list[tuple[int, str]]:
        """Run all commands at once, and return the exit status and output of each; kill those that take too long."""
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
        end = time.monotonic() + max(1, min(most_seconds, self.left()))
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
            running = [
                subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT)
                for command, file in zip(commands, files)
            ]
            for process in running:
                try:
                    process.wait(max(0.1, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for file in files:
                file.seek(0)
            return [(process.returncode, file.read()) for process, file in zip(running, files)]


def itself(*arguments: str) -> list[str]:
    """The command that runs this program in a separate process."""
    return [sys.executable, __file__, *arguments]


def tail(text: str, lines: int = 40) -> str:
    """The end of an output."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def speed(run: Run) -> None:
    """Measure how fast the device copies, reads and writes; all shares in the tables refer to the copy speed."""
    speeds = copy_speed(run.smoke, DEVICE)
    run.copy = speeds["copy"]
    run.say("GB/s: " + ", ".join(f"{name} {value / 1e9:.0f}" for name, value in speeds.items()))
    run.figures(**speeds)


def compile_all(run: Run) -> None:
    """Compile every kernel variant into Triton's cache, in many processes at once."""
    count = min(PROCESSES, os.cpu_count() or 1)
    commands = [itself("--share", str(i), str(count), *["--smoke"] * run.smoke) for i in range(count)]
    for status, output in run.commands(commands, 180, OMP_NUM_THREADS="1"):
        if status:
            run.say(tail(output))
            raise StopError(f"a compiling process ended with status {status} (-9: it took too long)")
    kernels = len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))
    run.say(f"{count} processes, {kernels} compiled kernels")
    if DEVICE == "cuda" and not kernels:
        raise StopError("no kernel was compiled: pooling did not use Triton")


def check_all(run: Run) -> None:
    """Compare pooling with float64; the program stops if pooling is wrong."""
    passed, wrong = 0, 0
    for name, check in checks(run.smoke, DEVICE):
        if run.left() < LAST_ROW:
            raise StopError(f"no time left for the checks from {name} on")
        try:
            seen = check()
            passed += 1
            run.figures(check=name, seen=seen)
        except Exception:
            wrong += 1
            run.fail(f"{name}\n{tail(traceback.format_exc(), 12)}")
            if wrong == 8:
                break
    run.say(f"{passed} checks passed, {wrong} failed")
    if wrong:
        raise StopError("pooling is wrong; to measure it anyway, use --only resampling table")


def tests(run: Run) -> None:
    """Run the tests marked `gpu`."""
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    chosen = [path for path in marked if path.name == "test_class_sums.py"] if run.smoke else marked
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    options += ["-o", "addopts=--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, chosen)]
    ((status, output),) = run.commands([command], 120)
    run.say(tail(output, 1 if status == 0 else 60))
    if status:
        run.fail(f"pytest ended with {status}")


def memcheck(run: Run) -> None:
    """Run small cases under compute-sanitizer, with a separate allocation for each tensor."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    before = [program, "--tool", "memcheck", "--error-exitcode", "1"] if program and DEVICE == "cuda" else []
    if not before:
        run.say("compute-sanitizer is not available: the same cases run without it")
    command = [*before, *itself("--share", "memcheck", "1", *["--smoke"] * run.smoke)]
    # PyTorch's caching allocator would hide reads past the end of a tensor.
    ((status, output),) = run.commands([command], 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    run.say(tail(output, 1 if status == 0 else 40))
    if "Device not supported" in output:
        run.say("compute-sanitizer does not work on this machine")
    elif status:
        run.fail(f"memcheck ended with {status}")


def resampling(run: Run) -> None:
    """Write the table of labels on a different grid."""
    run.say(f"| {RESAMPLING_COLUMNS} |\n|{' --- |' * (RESAMPLING_COLUMNS.count('|') + 1)}")
    grids = ((2, 16, 9, 17, 64, 128),) if run.smoke else GRIDS
    dtypes = (torch.float32, torch.bfloat16)
    for grid, dtype, resample in itertools.product(grids, dtypes, RESAMPLES):
        row = resampled_row(grid, dtype, resample, run.copy, DEVICE)
        run.resampled.append(row)
        run.figures(**row)
        run.say(f"| {resampled_cells(row)} |")


def table(run: Run) -> None:
    """Write the main table; its last rows are left out if time is short."""
    run.say(f"| {COLUMNS} |\n|{' --- |' * (COLUMNS.count('|') + 1)}")
    shapes = SMOKE_SHAPES if run.smoke else SHAPES
    kinds = [Case(*of) for of in itertools.product(shapes, (torch.float32, torch.bfloat16), (False, True))]
    for case in kinds:
        if run.left() < LAST_ROW:
            run.say(f"\nleft out for lack of time: {'; '.join(map(str, kinds[kinds.index(case) :]))}")
            return
        try:
            row = hard_row(case, run.copy, DEVICE)
        except Exception:
            run.fail(f"{case}\n{tail(traceback.format_exc(), 12)}")
            continue
        finally:
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        run.rows.append(row)
        run.figures(**row)
        run.say(f"| {cells(row)} |")


def share(which: str, count: int, smoke: bool) -> None:
    """Run the part of a separate process: its share of all cases, or the small cases for compute-sanitizer."""
    if which != "memcheck":
        for case in cases(smoke)[int(which) :: count]:
            once(case, DEVICE)
        for _, check in list(other_checks(smoke, DEVICE))[int(which) :: count]:
            # A failure here occurs again in the checks, which report it.
            with contextlib.suppress(Exception):
                check()
        return
    # Each shape has twelve kinds. Five and twelve have no common factor, so every kind occurs.
    small = [case for case in cases(smoke) if case.shape in ODD_SHAPES + SMOKE_SHAPES][::5]
    for case in small:
        once(case, DEVICE)
    print(f"{len(small)} cases")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    parser.add_argument("--only", nargs="+", default=list(STAGES), choices=STAGES, help="run only these stages")
    parser.add_argument("--smoke", action="store_true", help="run every stage at tiny sizes")
    minutes_help = "time limit; the last rows are left out if they would exceed it (default: 8)"
    parser.add_argument("--minutes", type=float, default=8, help=minutes_help)
    parser.add_argument("--share", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share:
        share(args.share[0], int(args.share[1]), args.smoke)
        return
    if DEVICE == "cpu" and not args.smoke:
        parser.error("there is no CUDA device; --smoke rehearses the stages on the CPU")
    run = Run(args)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    begin = time.monotonic()
    watch = threading.Timer(60 * args.minutes + 10, run.too_long)
    watch.daemon = True
    watch.start()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        try:
            _stages(run)
        finally:
            watch.cancel()
    if run.rows or run.resampled:
        about = " (for tiny sizes, which the thresholds do not cover)" if args.smoke else ""
        run.say(f"\n## Verdict{about}\n\n" + "\n".join(verdict(run.rows, run.resampled)))
    run.say(f"\n{time.monotonic() - begin:.0f} s; " + (f"{len(run.failed)} FAILED" if run.failed else "nothing failed"))
    sys.exit(1 if run.failed else 0)


def _stages(run: Run) -> None:
    run.say(f"# {head(DEVICE)}")
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "missing"
    run.say(f"Triton {triton}, CUDA {torch.version.cuda}, {platform.platform()}, {os.cpu_count()} cores")
    if DEVICE == "cpu":
        run.say("**A rehearsal on the CPU: no kernel runs, and no time or figure says anything about a GPU.**")
    stages = dict(zip(STAGES, (speed, compile_all, check_all, tests, memcheck, resampling, table)))
    for name in [name for name in STAGES if name == "speed" or name in run.args.only]:
        began = time.monotonic()
        run.say(f"\n## {name}\n")
        try:
            stages[name](run)
        except StopError as stopped:
            run.fail(f"{name}: {stopped}; the stages after it were left out")
            return
        except Exception:
            run.fail(f"{name}\n{tail(traceback.format_exc())}")
            if name == "speed":
                # Every share in the tables needs the copy speed.
                return
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        run.say(f"\n{time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()

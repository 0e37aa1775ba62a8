"""benchmarks/on_gpu.py: its rehearsal, its checks, which must see planted faults, and its verdict."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import semshift

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAGES = ("speed", "compile", "checks", "tests", "memcheck", "resampling", "table")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_checks")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_tables")


@pytest.mark.slow
def test_rehearsal(tmp_path):
    command = [sys.executable, BENCHMARKS / "on_gpu.py", "--smoke", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = (tmp_path / "results.md").read_text()
    assert results == done.stdout
    assert ("rehearsal" in results) == (DEVICE == "cpu")
    places = [results.index(f"## {name}\n") for name in STAGES]
    assert places == sorted(places)
    assert " 0 failed" in results
    assert "ours / best other: " in results
    figures = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    rows = [row for row in figures if "ratio" in row]
    assert len(rows) == 12
    assert all(len(row["others"]) == 4 and not row["failed"] for row in rows)
    assert sum("resample" in row for row in figures) == 8


@pytest.mark.slow
def test_no_row_is_begun_without_time(tmp_path):
    command = [sys.executable, BENCHMARKS / "on_gpu.py", "--smoke", "--only", "table", "--minutes", "0.2"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out for lack of time: 2, 65, 9, 11, 19 | float32 | NCHW;" in done.stdout


def test_a_failed_check_ends_it_and_what_was_found_stays(monkeypatch, checks, tmp_path, capsys):
    program = importlib.import_module("on_gpu")

    def wrong():
        raise AssertionError("other counts")

    monkeypatch.setattr(program, "checks", lambda *_: [("one", wrong), ("other", lambda: "fine")])
    # The program sets this variable if it is not set.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--smoke", "--only", "checks", "table", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    results = (out / "results.md").read_text()
    assert results == capsys.readouterr().out
    assert "FAILED: one\n" in results
    assert "1 checks passed, 1 failed" in results
    assert "## table" not in results


def failures(checks, named=""):
    """Names of the checks that fail."""
    failed = []
    for name, check in checks.checks(True, DEVICE):
        if name.startswith(named):
            try:
                check()
            except AssertionError:
                failed.append(name)
    return failed


def plant(monkeypatch, change):
    """Pooling whose sums or counts are changed."""
    right = semshift.class_sums

    def wrong(features, labels, num_classes, **options):
        return change(right(features, labels, num_classes, **options), features)

    monkeypatch.setattr(semshift, "class_sums", wrong)


def rounded(pooled, features):
    return semshift.ClassSums(pooled.sums + (pooled.sums.bfloat16().float() - pooled.sums).detach(), pooled.mass)


def miscounted(pooled, features):
    mass = pooled.mass.clone()
    mass.view(-1)[0] += 1
    return semshift.ClassSums(pooled.sums, mass)


def twice_the_gradient(pooled, features):
    return semshift.ClassSums(2 * pooled.sums - pooled.sums.detach(), pooled.mass)


def everywhere(pooled, features):
    strange = (features.detach().float() * 0).sum()
    return semshift.ClassSums(pooled.sums + strange, pooled.mass)


def nowhere(pooled, features):
    # Only the value changes, since a wrong gradient would be detected too.
    pooled.sums.data.nan_to_num_(0, 0, 0)
    return pooled


def like_tf32(pooled, features):
    return semshift.ClassSums(pooled.sums * (1 - 2**-12), pooled.mass)


RUNS = iter(range(10**6))


def unlike(pooled, features):
    return semshift.ClassSums(pooled.sums * (1 + next(RUNS) % 2 * 2**-22), pooled.mass)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (rounded, "2, 65, 9, 11, 19 | float32"),
        (rounded, "bilinear, TF32 on"),
        (miscounted, "2, 65, 9, 11, 19 | float32"),
        (miscounted, "bilinear, TF32 on"),
        (twice_the_gradient, "2, 65, 9, 11, 19 | float32"),
        (everywhere, "not finite"),
        (nowhere, "not finite"),
        (like_tf32, "bilinear, TF32 on"),
        (unlike, "bit-identical in ten runs"),
    ],
)
def test_a_planted_fault_is_seen(monkeypatch, checks, change, named):
    every = [name for name, _ in checks.checks(True, DEVICE) if name.startswith(named)]
    plant(monkeypatch, change)
    assert set(failures(checks, named)) == set(every) != set()


def test_a_loose_bound_does_not_hide_rounded_features(monkeypatch, checks):
    case = checks.Case((1, 8, 64, 64, 1), torch.float32, False)
    features, labels = checks.made(case, DEVICE)
    checks.agrees(case, features.abs(), labels)
    # Of 4096 features, n * eps is more than TF32 loses.
    plant(monkeypatch, lambda pooled, _: semshift.ClassSums(pooled.sums - 2**-12 * pooled.sums.detach(), pooled.mass))
    with pytest.raises(AssertionError, match="off by"):
        checks.agrees(case, features.abs(), labels)


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_checks_pass(checks):
    assert failures(checks) == []


def row(shape, dtype="float32", **others):
    given = {"shape": shape, "dtype": dtype, "channels_last": False, "case": f"{shape} {dtype}", "bytes": 270e6}
    return given | {"share": 1.0, "backward_share": 1.0, "ratio": 1.0, "host": 60e-6} | others


@pytest.mark.parametrize(
    ("given", "least"),
    [
        (row((8, 256, 256, 256, 19)), 0.85),
        (row((8, 256, 256, 256, 19), "bfloat16"), 0.8),
        (row((8, 64, 512, 512, 19), "bfloat16"), 0.75),
        (row((2, 2048, 65, 129, 19), bytes=137e6), 0.7),
        (row((2, 2048, 65, 129, 19), "bfloat16", bytes=69e6), 0.55),
        (row((2, 256, 128, 256, 19), "bfloat16", bytes=34e6), None),
        (row((8, 19, 512, 1024, 19), bytes=319e6), 0.45),
        (row((8, 19, 512, 1024, 19), "bfloat16", channels_last=True, bytes=159e6), 0.25),
        (row((2, 19, 512, 1024, 19), bytes=80e6), None),
        (row((8, 256, 256, 256, 60)), None),
    ],
)
def test_thresholds(tables, given, least):
    assert tables.least_share(given) == least


def test_verdict(tables):
    shape = (8, 256, 256, 256, 19)
    slow = row(shape, share=0.84, backward_share=0.849, ratio=0.95, host=61e-6)
    grid = {"grid": (2, 2048, 65, 129, 512, 1024), "dtype": "float32", "own": 50e-6}
    resampled = [grid | {"resample": name, "seconds": 251e-6} for name in ("bilinear", "nearest")]
    lines = tables.verdict([row(shape), slow], [*resampled, grid | {"resample": "area", "seconds": 249e-6}])
    assert [line for line in lines if not line.startswith(" ")] == [
        "missed: forward: 1 of 2",
        "missed: backward: 1 of 2",
        "missed: ours / best other: 1 of 2",
        "missed: host, us: 1 of 2",
        "missed: bilinear, ms: 0 of 1",
        "met: area, ms: 1 of 1",
    ]
    assert "0.84 against 0.85" in lines[1]

import json
import sys
import textwrap
import time

import pytest

from examples.workbench.studies.compare import compare, comparison_table, draw_comparison
from examples.workbench.errors import InputError
from tests.errors import refuses

TRAINER = """
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--method"); parser.add_argument("--seed", type=int); parser.add_argument("--out")
parser.add_argument("--steps", type=int, default=7); parser.add_argument("--labelled", type=int, default=4)
parser.add_argument("--resume", action="store_true"); parser.add_argument("--fail", default="")
parser.add_argument("--sleep", default=""); parser.add_argument("--mute", action="store_true")
parser.add_argument("--gather", type=int, default=0)
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=a.resume)
(out / "started").write_text(str(time.monotonic()))
print("one thread" if os.environ["OMP_NUM_THREADS"] == "1" else "threads", "resumed" if a.resume else "new")
if a.method == a.sleep:
    time.sleep(60)
while len(list(out.parent.glob("*/started"))) < a.gather:
    time.sleep(0.01)
if a.method == a.fail:
    sys.exit("error: expected a better method")
if not a.mute:
    miou = 0.25 + 0.125 * a.seed + 0.0625 * (a.method == "ass")
    metrics = {"method": a.method, "labelled": a.labelled, "seed": a.seed, "steps": a.steps, "num_classes": 2,
        "miou": miou, "iou": {"road": miou, "pole": None}, "resumed_from": [3] if a.resume else [],
        "seconds": 2.0, "versions": {"torch": "2.13.0"}}
    (out / "metrics.json").write_text(json.dumps(metrics))
(out / "ended").write_text(str(time.monotonic()))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER)
    monkeypatch.setattr(run_queue, "_TRAIN", [sys.executable, str(program)])
    return tmp_path / "out"


def result(method, seed, miou, **changes):
    run = {
        "method": method,
        "labelled": 4,
        "seed": seed,
        "steps": 100,
        "num_classes": 3,
        "miou": miou,
        "iou": {"road": miou, "pole": None, "bus": None if seed else miou / 2},
        "resumed_from": [],
        "seconds": 30.6,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
    }
    return run | changes


def test_comparison_runs_every_method_with_every_seed(trainer):
    results = compare(["--steps", "5"], methods=["joint", "ass"], seeds=[0, 2], out=trainer)
    runs = [("joint", 0), ("joint", 2), ("ass", 0), ("ass", 2)]
    assert [(run["method"], run["seed"]) for run in results] == runs
    assert [run["miou"] for run in results] == [0.25, 0.5, 0.3125, 0.5625]
    assert all(run["steps"] == 5 for run in results)
    assert results[0]["command"] == (
        f"python -m examples.workbench train --method joint --seed 0 --out {trainer / 'joint-seed0'} --steps 5"
    )
    assert json.loads((trainer / "comparison.json").read_text()) == results
    log = (trainer / "ass-seed2.log").read_text().splitlines()
    assert log == ["train --method ass --seed 2 --steps 5", "one thread new"]
    text = (trainer / "comparison.md").read_text(encoding="utf-8")
    assert text.startswith(comparison_table(results))
    assert text.endswith(
        "\nEach run: `python -m examples.workbench train --method METHOD --seed SEED --steps 5`, 2 at a time, "
        "OMP_NUM_THREADS=1.\n"
    )
    assert (trainer / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not list(trainer.glob(".*"))


def test_one_job_runs_one_at_a_time(trainer):
    compare([], methods=["joint"], seeds=[0, 1, 2], out=trainer, jobs=1, threads=2)
    assert (trainer / "joint-seed0.log").read_text().splitlines()[1] == "threads new"
    times = [
        float((trainer / f"joint-seed{seed}" / name).read_text()) for seed in range(3) for name in ("started", "ended")
    ]
    assert times == sorted(times)


def test_three_jobs_run_three_at_a_time(trainer):
    # Each ends only once it has seen three start.
    compare(["--gather=3"], methods=["joint"], seeds=[0, 1, 2], out=trainer, jobs=3)


def test_finished_runs_are_kept_and_half_finished_ones_resumed(trainer):
    compare([], methods=["joint", "ass"], seeds=[0], out=trainer)
    began = (trainer / "joint-seed0" / "started").read_text()
    (trainer / "ass-seed0" / "metrics.json").write_text('{"method": "ass", "mi')
    results = compare([], methods=["joint", "ass"], seeds=[0], out=trainer)
    assert (trainer / "joint-seed0" / "started").read_text() == began
    assert [run["resumed_from"] for run in results] == [[], [3]]
    log = (trainer / "ass-seed0.log").read_text().splitlines()
    assert log == ["train --method ass --seed 0", "one thread new", "one thread resumed"]


def test_metrics_that_lack_a_key_are_half_finished(trainer):
    compare([], methods=["joint"], seeds=[0], out=trainer)
    (trainer / "joint-seed0" / "metrics.json").write_text('{"method": "joint", "seed": 0}')
    assert compare([], methods=["joint"], seeds=[0], out=trainer)[0]["resumed_from"] == [3]


def test_a_run_with_other_arguments_is_refused(trainer):
    compare(["--steps", "5"], methods=["joint"], seeds=[0], out=trainer)
    with refuses(InputError, trainer / "joint-seed0", "--steps 6", trainer / "joint-seed0.log", "--steps 5"):
        compare(["--steps", "6"], methods=["joint"], seeds=[0], out=trainer)


@pytest.mark.parametrize(
    ("arguments", "method", "seed", "words"),
    [
        (["--steps", "6"], "joint", 0, ("steps 6", 5)),
        (["--labelled=8"], "joint", 0, ("labelled 8", 4)),
        ([], "ass", 0, ("method ass", "joint")),
        ([], "joint", 1, ("seed 1", 0)),
    ],
)
def test_a_run_without_a_log_is_known_by_its_metrics(trainer, arguments, method, seed, words):
    compare(["--steps", "5"], methods=["joint"], seeds=[0], out=trainer)
    folder = trainer / f"{method}-seed{seed}"
    (trainer / "joint-seed0.log").unlink()
    (trainer / "joint-seed0").rename(folder)
    with refuses(InputError, folder, *words):
        compare(arguments, methods=[method], seeds=[seed], out=trainer)


def test_a_failing_run_stops_the_comparison_and_ends_the_others(trainer):
    began = time.monotonic()
    with refuses(InputError, "error: expected a better method", trainer / "joint-seed0.log"):
        compare(["--fail=joint", "--sleep=ass"], methods=["ass", "joint", "global"], seeds=[0], out=trainer)
    assert time.monotonic() - began < 30  # the other would have slept for a minute
    assert not (trainer / "global-seed0").exists()
    assert not (trainer / "comparison.json").exists()


def test_a_run_that_leaves_no_metrics_is_told(trainer):
    with refuses(InputError, "metrics.json", trainer / "joint-seed0.log"):
        compare(["--mute"], methods=["joint"], seeds=[0], out=trainer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("methods", []),
        ("methods", ["ass", "ASS"]),
        ("methods", ["ass", "ass"]),
        ("seeds", []),
        ("seeds", [1, 1]),
        ("seeds", [0, -1]),
        ("jobs", 0),
        ("threads", -1),
    ],
)
def test_unfit_arguments_are_refused(tmp_path, name, value):
    arguments = {"methods": ["ass"], "seeds": [0], "out": tmp_path / "out", name: value}
    with refuses(InputError, name, value):
        compare([], **arguments)
    assert not (tmp_path / "out").exists()


def test_table_by_hand():
    # joint 40, 42, 47: mean 43, deviations -3, -1, 4, variance 26 / 2, spread 3.606.
    # ass 45, 50, 49: mean 48, deviations -3, 2, 1, variance 14 / 2, spread 2.646.
    # Differences 5, 8, 2: mean 5, spread 3. Bus, in seed 0 only: 20 and 22.5.
    values = {"joint": [0.40, 0.42, 0.47], "ass": [0.45, 0.50, 0.49]}
    results = [result(method, seed, miou) for method, of in values.items() for seed, miou in enumerate(of)]
    expected = """\
        mIoU in percent on the test images: mean ± sample standard deviation over the seeds. \
4 labelled target images, 100 steps.

        | method | mIoU | seed 0 | seed 1 | seed 2 |
        | --- | ---: | ---: | ---: | ---: |
        | joint | 43.0 ± 3.6 | 40.0 | 42.0 | 47.0 |
        | ass | 48.0 ± 2.6 | 45.0 | 50.0 | 49.0 |

        Difference to `joint` with the same seed, in points: mean ± sample standard deviation.

        | method | difference | seed 0 | seed 1 | seed 2 |
        | --- | ---: | ---: | ---: | ---: |
        | ass | +5.0 ± 3.0 | +5.0 | +8.0 | +2.0 |

        IoU of each class in percent: mean over the seeds whose test images or predictions hold it.

        | class | joint | ass |
        | --- | ---: | ---: |
        | road | 43.0 | 48.0 |
        | pole | – | – |
        | bus | 20.0 | 22.5 |

        6 runs, 3 min 4 s in all. Versions: python 3.11.2, torch 2.13.0.
        """
    assert comparison_table(results) == textwrap.dedent(expected)


def test_one_seed_has_no_spread_and_a_missing_run_no_value():
    results = [result("joint", 3, 0.4), result("ass", 3, 0.39996), result("ass", 4, 0.5)]
    lines = comparison_table(results).splitlines()
    assert "| joint | 40.0 ± – | 40.0 | – |" in lines
    # Differences only where both have the seed, and no negative zero.
    assert "| ass | +0.0 ± – | +0.0 | – |" in lines


def test_without_the_baseline_there_are_no_differences():
    table = comparison_table([result("ass", 0, 0.5), result("global", 0, 0.5)])
    assert "Difference" not in table
    assert "Difference" not in comparison_table([result("joint", 0, 0.5)])


def test_versions_that_differ_are_both_named_and_hours_are_told():
    results = [result("ass", 0, 0.5), result("ass", 1, 0.5, versions={"torch": "2.4.1"}, seconds=7200)]
    last = comparison_table(results).splitlines()[-1]
    assert last == "2 runs, 2 h 0 min in all. Versions: python 3.11.2, torch 2.13.0 and 2.4.1."


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (result("ass", 0, 0.5, labelled=8), ("labelled", 4, 8, "ass with seed 0")),
        (result("ass", 0, 0.5, steps=101), ("steps", 100, 101, "ass with seed 0")),
        (
            result("ass", 0, 0.5, iou={"road": 0.5}),
            ("classes", ["road", "pole", "bus"], ["road"], "ass with seed 0"),
        ),
        (result("joint", 0, 0.5), ("joint with seed 0",)),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, other, words):
    with refuses(InputError, *words):
        comparison_table([result("joint", 0, 0.5), other])
    with refuses(InputError, *words):
        draw_comparison(tmp_path / "a.png", [result("joint", 0, 0.5), other])


def test_no_runs_are_refused():
    with refuses(InputError, "run", "none"):
        comparison_table([])


@pytest.mark.parametrize("methods", [["joint", "ass"], ["ass"]])
def test_the_figure_is_a_function_of_the_runs(tmp_path, methods):
    runs = [result(method, seed, 0.4 + seed / 10) for method in methods for seed in range(2)]
    for name in "ab":
        draw_comparison(tmp_path / f"{name}.png", runs)
    draw_comparison(tmp_path / "c.png", [*runs[:-1], runs[-1] | {"miou": 0.6}])
    first, again, changed = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again != changed

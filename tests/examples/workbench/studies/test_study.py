"""Studies: rows of a file, runs that are skipped, resumed and recorded, and their table. Training is faked."""

import json
import sys

import numpy as np
import pytest
import yaml

from examples.workbench.__main__ import STUDIES, main
from examples.workbench.__main__ import _parse as parse_train
from examples.workbench.errors import InputError
from examples.workbench.studies.study import Study, draw_curves, draw_study, read_study, run_study, study_table
from tests.errors import mentions, refuses

TRAINER = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("method", "out", "data-root", "labelled", "fail"):
    parser.add_argument(f"--{name}")
for name in ("seed", "steps"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--boost", type=float, default=0)
parser.add_argument("--resume", action="store_true")
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=a.resume)
with open(out.parent / "started", "a") as log:
    log.write(f"{out.name}\\n")
if a.fail and not a.resume:
    sys.exit("error: expected luck")
miou = 0.5 + 0.01 * a.seed + a.boost
score = {"miou": miou, "iou": {"road": miou, "pole": None}}
(out / "metrics.json").write_text(json.dumps({"method": a.method, "labelled": 4, "seed": a.seed, "steps": a.steps,
    "num_classes": 2, **score, "validation": {**score, "miou": miou + 0.25}, "resumed_from": [], "seconds": 60.0,
    "versions": {"torch": "2.13.0"}}))
"""

STUDY = Study(
    title="A study",
    split="test",
    baseline="joint",
    seeds=[0, 1, 2],
    train={"steps": 7},
    rows={"joint": {"method": "joint"}, "boosted": {"method": "ass", "boost": 0.02}},
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER)
    monkeypatch.setattr(run_queue, "_TRAIN", [sys.executable, str(program)])
    return tmp_path


def run(folder, study=STUDY, out="out", **options):
    chosen = {"data_root": None, "jobs": 2, "threads": 1} | options
    return run_study(study, records=folder / "records" / "study.json", out=folder / out, **chosen)


def started(folder, out="out"):
    log = folder / out / "started"
    return sorted(log.read_text().split()) if log.exists() else []


def changed(**changes):
    return Study(**{**STUDY.__dict__, **changes})


def test_every_row_is_run_with_every_seed(folder):
    results = run(folder)
    assert started(folder) == sorted(f"{row}-seed{seed}" for row in STUDY.rows for seed in range(3))
    assert [(r["row"], r["seed"], r["method"]) for r in results] == [
        *(("joint", seed, "joint") for seed in range(3)),
        *(("boosted", seed, "ass") for seed in range(3)),
    ]
    assert results[3]["options"] == {"steps": 7, "method": "ass", "boost": 0.02}
    assert json.loads((folder / "records" / "study.json").read_text()) == results


def test_what_is_recorded_is_not_run_again(folder):
    results = run(folder)
    # Neither here, nor where the run folders are not at hand.
    assert run(folder) == results
    assert run(folder, out="elsewhere") == results
    assert len(started(folder)) == 6
    assert started(folder, "elsewhere") == []


def test_a_changed_row_is_run_again_and_the_others_are_kept(folder):
    before = run(folder)
    rows = {**STUDY.rows, "boosted": {"method": "ass", "boost": 0.03}}
    after = run(folder, changed(rows=rows), out="second")
    assert started(folder, "second") == [f"boosted-seed{seed}" for seed in range(3)]
    assert after[:3] == before[:3]
    assert after[3]["miou"] == pytest.approx(before[3]["miou"] + 0.01)


def test_a_changed_row_in_the_same_folder_is_refused(folder):
    run(folder)
    with refuses(InputError, "boosted-seed0", "--boost 0.03"):
        run(folder, changed(rows={**STUDY.rows, "boosted": {"method": "ass", "boost": 0.03}}))


def test_an_interrupted_study_keeps_its_records_and_goes_on(folder):
    rows = {**STUDY.rows, "fails": {"method": "ass", "fail": "once"}}
    study = changed(rows=rows, seeds=[0])
    with refuses(InputError, "expected luck"):
        run(folder, study, jobs=1)
    kept = json.loads((folder / "records" / "study.json").read_text())
    assert [record["row"] for record in kept] == ["joint", "boosted"]
    results = run(folder, study, jobs=1)
    assert [record["row"] for record in results] == ["joint", "boosted", "fails"]
    assert started(folder) == ["boosted-seed0", "fails-seed0", "fails-seed0", "joint-seed0"]


def test_the_data_root_is_no_part_of_a_record(folder):
    results = run(folder, data_root=str(folder))
    assert "data-root" not in json.dumps(results)
    assert run(folder, out="elsewhere", data_root="another") == results


@pytest.mark.parametrize(("split", "shift"), [("test", 0.0), ("validation", 25.0)])
def test_table_by_hand(folder, split, shift):
    study = changed(split=split)
    table = study_table(study, run(folder, study))
    assert f"mIoU in percent on {split} images" in table
    assert "Every run: `train --steps 7`." in table
    joint = [f"{value + shift:.1f}" for value in (51.0, 50.0, 51.0, 52.0)]
    boosted = [f"{value + shift:.1f}" for value in (53.0, 52.0, 53.0, 54.0)]
    assert f"| joint | joint |  | {joint[0]} ± 1.0 |  | {' | '.join(joint[1:])} |" in table
    assert f"| boosted | ass | boost 0.02 | {boosted[0]} ± 1.0 | +2.0 ± 0.0 | {' | '.join(boosted[1:])} |" in table
    assert "| boosted | 53.0 | – |" in table
    assert "6 runs, 6 min 0 s in all. Versions: torch 2.13.0." in table


def test_the_difference_is_over_the_seeds_of_both_with_its_standard_error(folder):
    results = [dict(r) for r in run(folder)]
    results[4]["miou"] += 0.03
    results = [r for r in results if (r["row"], r["seed"]) != ("joint", 2)]
    # Differences of 2 and 5 points: mean 3.5, deviation 2.12, divided by the root of two.
    assert "| +3.5 ± 1.5 |" in study_table(STUDY, results)


def test_the_figure_is_drawn(folder):
    draw_study(folder / "study.png", STUDY, run(folder))
    assert (folder / "study.png").stat().st_size > 10_000


def test_curves_are_those_of_the_runs_and_their_mean(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(study_module, "save_figure", lambda figure, path: drawn.append((figure, path)))
    results = run(folder)
    assert not draw_curves(folder / "curves.png", STUDY, results)
    assert not drawn
    curves = {0: [[5, 0.2], [7, 0.5]], 1: [[5, 0.4], [7, 0.6]], 2: [[7, 0.7]]}
    results = [{**r, "curve": curves[r["seed"]]} if r["row"] == "boosted" else r for r in results]
    assert draw_curves(folder / "curves.png", STUDY, results)
    ((figure, path),) = drawn
    assert path == folder / "curves.png"
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    # Where one of the runs has not looked, there is no mean.
    expected = [[[5, 20], [7, 50]], [[5, 40], [7, 60]], [[7, 70]], [[7, 60]]]
    assert [np.round(line, 9).tolist() for line in lines] == expected
    assert [text.get_text() for text in figure.legends[0].texts] == ["boosted"]


def test_the_command_draws_curves_where_there_are_some(folder, monkeypatch):
    (folder / "mine.yaml").write_text(yaml.safe_dump(STUDY.__dict__))
    (folder / "trainer.py").write_text(
        TRAINER.replace('"resumed_from": []', '"curve": [[7, miou]], "resumed_from": []')
    )
    assert main(["study", str(folder / "mine.yaml"), "--records", str(folder / "r"), "--out", str(folder / "o")]) == 0
    assert {path.name for path in (folder / "r").iterdir()} == {"mine.json", "mine.md", "mine.png", "mine-curves.png"}


def test_the_command_leaves_records_table_and_figure(folder, capsys):
    (folder / "mine.yaml").write_text(yaml.safe_dump(STUDY.__dict__))
    arguments = ["study", str(folder / "mine.yaml"), "--records", str(folder / "r"), "--out", str(folder / "o")]
    assert main(arguments) == 0
    assert {path.name for path in (folder / "r").iterdir()} == {"mine.json", "mine.md", "mine.png"}
    assert "| boosted |" in capsys.readouterr().out


def test_the_report_of_what_is_on_record_runs_nothing(folder, capsys, monkeypatch):
    (folder / "mine.yaml").write_text(yaml.safe_dump({**STUDY.__dict__, "seeds": STUDY.seeds[:1]}))
    arguments = ["study", str(folder / "mine.yaml"), "--records", str(folder / "r"), "--out", str(folder / "o")]
    assert main([*arguments, "--report-only"]) == 2
    mentions(capsys.readouterr().err, "error", folder / "r" / "mine.json")
    assert main(arguments) == 0
    before, _ = capsys.readouterr()
    (folder / "mine.yaml").write_text(yaml.safe_dump({**STUDY.__dict__, "seeds": [*STUDY.seeds, 99]}))
    monkeypatch.setattr("examples.workbench.run_queue._TRAIN", ["/none"])
    assert main([*arguments, "--report-only"]) == 0
    after, _ = capsys.readouterr()
    assert f"{len(STUDY.rows)} runs, " in before
    assert f"{len(STUDY.rows)} runs, " in after
    assert "seed 99" in after


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "train"}, ("split", "validation", "test", "train")),
        ({"baseline": "none"}, ("baseline", "rows", "none")),
        ({"seeds": [1, 1]}, ("seeds", [1, 1])),
        ({"seeds": []}, ("seeds", "[]")),
        ({"rows": {"joint": {"method": "magic"}}}, ("row joint", "method", "magic")),
        ({"rows": {"joint": {}}}, ("row joint", "method", "None")),
        ({"rows": ["joint"]}, ('"rows"', ["joint"])),
        ({"seeds": 3}, ('"seeds"', 3)),
        ({"train": None}, ("required: train",)),
        ({"colour": "red"}, ("title, split, baseline, seeds, train, rows", "'colour'")),
    ],
)
def test_bad_studies(tmp_path, changes, words):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**STUDY.__dict__, **changes}))
    with pytest.raises(InputError) as caught:
        read_study(tmp_path / "bad.yaml")
    # On the command line what jsonargparse says in two lines is one.
    mentions(" ".join(str(caught.value).split()), tmp_path / "bad.yaml", *words)


@pytest.mark.parametrize("content", [None, "[1, 2", "just words"])
def test_files_that_are_no_study(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "bad.yaml").write_text(content)
    assert main(["study", str(tmp_path / "bad.yaml")]) == 2
    mentions(capsys.readouterr().err, "error", tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_with_the_trainer_parse(path):
    study = read_study(path)
    for options in study.rows.values():
        named = {**study.train, **options}
        arguments = [f"--{key}={json.dumps(v) if isinstance(v, bool | list) else v}" for key, v in named.items()]
        settings, _ = parse_train("train", arguments)
        assert settings.method == options["method"]

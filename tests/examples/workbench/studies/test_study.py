"""Studies: files and command lines, runs that are skipped, resumed, recorded and terminated. Training is faked."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from docs.pages import read_blocks
from examples.workbench.errors import InputError
from examples.workbench.studies.runs import run_study
from examples.workbench.studies.study import STUDIES, Study, read_records, read_study, study_of_methods
from tests.errors import mentions, refuses

STUDY = Study(
    title="A study",
    split="test",
    baseline="joint",
    seeds=[0, 1, 2],
    train={"steps": 7},
    rows={"joint": {"method": "joint"}, "strong": {"method": "ass", "global_alignment.weight": 0.2}},
)


def run(folder, study=STUDY, out="out", **options):
    return run_study(study, records=folder / "study.json", out=folder / out, **options)


def started(folder, out="out"):
    log = folder / out / "started"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return sorted(name for name, *_ in lines if name != "ended")


def changed(**changes):
    return dataclasses.replace(STUDY, **changes)


def stronger(weight=0.3):
    return changed(rows={**STUDY.rows, "strong": {"method": "ass", "global_alignment.weight": weight}})


def test_every_row_runs_with_every_seed_and_is_recorded(folder):
    results = run(folder)
    assert started(folder) == [f"{row}-seed{seed}" for row in STUDY.rows for seed in range(3)]
    found = [(r["row"], r["seed"], r["method"], round(r["miou"], 9)) for r in results]
    assert found == [
        *(("joint", seed, "joint", 0.53 + 0.01 * seed) for seed in range(3)),
        *(("strong", seed, "ass", round(0.7 + 0.01 * seed, 9)) for seed in range(3)),
    ]
    assert results[3]["options"] == {"steps": 7, "method": "ass", "global_alignment.weight": 0.2}
    settings = results[3]["settings"]
    assert (settings["steps"], settings["global_alignment.weight"], settings["labelled"]) == (7, 0.2, 4)
    assert not {"seed", "log_every", "data.workers"} & settings.keys()
    lines = (folder / "study.json").read_text().splitlines()
    assert len(lines) == 2 + 6
    assert sorted(json.loads("".join(lines)), key=str) == sorted(results, key=str)


def test_runs_go_seed_by_seed_and_some_rows_have_fewer(folder, capsys):
    fewer = changed(fewer_seeds={"strong": 2})
    results = run(folder, fewer, jobs=1)
    lines = [line.split()[0] for line in (folder / "out" / "started").read_text().splitlines()]
    order = ["joint-seed0", "strong-seed0", "joint-seed1", "strong-seed1", "joint-seed2"]
    assert lines[::2] == order
    assert [(r["row"], r["seed"]) for r in results] == [*(("joint", s) for s in range(3)), ("strong", 0), ("strong", 1)]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5
    mentions(told[1], "strong-seed0", "70.0", "2 of 5", "left")
    mentions(told[4], "joint-seed2", "55.0", "5 of 5")
    # A row that has fewer seeds than before keeps its other records, which do not count.
    run(folder)
    assert read_records(fewer, folder / "study.json") == results
    assert len(json.loads((folder / "study.json").read_text())) == 6


def test_what_is_recorded_is_not_run_again(folder, capsys):
    results = run(folder, data_root=folder)
    (folder / "out" / "joint-seed0" / "metrics.json").unlink()
    # No run is repeated: not here, not without the run folders, and not with the data in a different place.
    assert run(folder) == run(folder, out="elsewhere", data_root=folder / "moved") == results
    assert len(started(folder)) == 6
    assert started(folder, "elsewhere") == []
    assert str(folder) not in json.dumps(results)
    assert "left out" not in capsys.readouterr().err


def test_changed_settings_make_a_record_stale_and_a_run_replaces_it(folder, capsys):
    before = run(folder)
    study = stronger()
    assert read_records(study, folder / "study.json") == before[:3]
    mentions(capsys.readouterr().err.splitlines()[-1], folder / "study.json", 3, "global_alignment.weight")
    after = run(folder, study, out="second")
    assert started(folder, "second") == [f"strong-seed{seed}" for seed in range(3)]
    assert after[:3] == before[:3]
    assert after[3]["miou"] == pytest.approx(before[3]["miou"] + 0.1)
    assert len(json.loads((folder / "study.json").read_text())) == 6


@pytest.mark.parametrize(
    ("edit", "stale"),
    [
        (lambda settings: settings.pop("labelled"), None),
        (lambda settings: settings.pop("global_alignment.weight"), "global_alignment.weight"),
        (lambda settings: settings.update(labelled=5), "labelled"),
        (lambda settings: settings.update({"network.name": "small-2"}), "network.name differs"),
        (lambda settings: settings.update({"data.source.images": "a"}), "data.source.images differs"),
        (lambda settings: settings.update({"self_training.gone": False}), "self_training.gone no longer exists"),
        (lambda settings: settings.update({"self_training.gone": None}), None),
    ],
    ids=[
        "a setting at its default is new",
        "a setting is new",
        "a default has changed",
        "a choice is gone",
        "a folder is no longer named",
        "a setting is gone, which may have been at its default",
        "a setting is gone, which was null",
    ],
)
def test_a_record_counts_while_its_settings_are_those_of_the_row(folder, capsys, edit, stale):
    (*_, record) = run(folder, changed(seeds=[0]))
    edit(record["settings"])
    (folder / "study.json").write_text(json.dumps([record]))
    capsys.readouterr()
    assert len(read_records(STUDY, folder / "study.json")) == (stale is None)
    said = capsys.readouterr().err
    assert (stale or "") in said
    assert (stale is None) == (said == "")
    with_other_intervals = changed(train={"steps": 7, "log_every": 3, "save_every": 4})
    assert len(read_records(with_other_intervals, folder / "study.json")) == (stale is None)


def test_a_folder_with_other_settings_is_refused(folder):
    run(folder, changed(seeds=[0]))
    with refuses(
        InputError, "--out", folder / "out" / "strong-seed0" / "settings.yaml", "global_alignment.weight", 0.3, 0.2
    ):
        run(folder, stronger())
    assert len(started(folder)) == 2


def test_a_finished_run_without_a_record_is_recorded_and_an_unfinished_one_resumes(folder):
    results = run(folder, changed(seeds=[0]))
    (folder / "study.json").unlink()
    (folder / "out" / "strong-seed0" / "metrics.json").unlink()
    assert run(folder, changed(seeds=[0])) == results
    assert started(folder) == ["joint-seed0", "strong-seed0", "strong-seed0"]


def test_one_job_runs_one_at_a_time(folder):
    run(folder, changed(seeds=[0]), jobs=1, threads=3, data_root=folder)
    lines = [line.split() for line in (folder / "out" / "started").read_text().splitlines()]
    assert [line[0] for line in lines] == ["joint-seed0", "ended", "strong-seed0", "ended"]
    assert lines[0][1:3] == ["3", str(folder)]


def alive(folder):
    """The runs whose processes have not ended."""
    for path in (folder / "out").glob("*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
            yield path.parent.name


@pytest.mark.parametrize(("jobs", "first"), [(1, "joint"), (2, "semantic")])
def test_a_run_that_fails_terminates_the_others(folder, monkeypatch, jobs, first):
    monkeypatch.setenv("FAIL", "ass")
    monkeypatch.setenv("SLEEP", "semantic")
    # With two jobs the second fails only once the first, which would take two minutes, has started.
    monkeypatch.setenv("GATHER", str(jobs))
    rows = {name: {"method": name} for name in (first, "ass", "global")}
    began = time.monotonic()
    with refuses(InputError, "ass-seed0", 1, "error: expected luck", folder / "out" / "ass-seed0.log"):
        run(folder, changed(baseline=first, rows=rows, seeds=[0]), jobs=jobs)
    assert time.monotonic() - began < 60
    assert not list(alive(folder))
    assert {path.stem for path in (folder / "out").glob("*.yaml")} == {"ass-seed0", f"{first}-seed0"}
    # The finished runs are recorded.
    assert (folder / "study.json").exists() == (first == "joint")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_study_terminates_its_runs(folder, signum):
    (folder / "study.yaml").write_text(yaml.safe_dump({**dataclasses.asdict(STUDY), "seeds": [0]}))
    program = (
        "import sys, pathlib\n"
        "from examples.workbench.studies import runs, study\n"
        "from examples.workbench.training.signals import stop_at_once\n"
        f"runs._TRAIN, folder = [sys.executable, {str(folder / 'trainer.py')!r}], pathlib.Path({str(folder)!r})\n"
        "with stop_at_once():\n"
        "    read = study.read_study(folder / 'study.yaml')\n"
        "    runs.run_study(read, records=folder / 'study.json', out=folder / 'out')\n"
    )
    root = Path(__file__).parents[4]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "SLEEP": "ass"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (folder / "out" / "strong-seed0" / "pid").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signum)
        assert process.wait(30)
    assert not list(alive(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "train"}, ("split", "validation", "test", "train")),
        ({"baseline": "none"}, ("baseline", "joint", "none")),
        ({"seeds": [1, 1]}, ("seeds", [1, 1])),
        ({"seeds": []}, ("seeds", "[]")),
        ({"seeds": [-1]}, ("seeds", [-1])),
        ({"rows": ["joint"]}, ('"rows"', ["joint"])),
        ({"train": None}, ("required: train",)),
        ({"fewer_seeds": {"strng": 2}}, ("fewer_seeds", "strng", "did you mean strong?")),
        ({"fewer_seeds": {"strong": 0}}, ("fewer_seeds.strong", 3, 0)),
        ({"fewer_seeds": {"strong": 4}}, ("fewer_seeds.strong", 3, 4)),
        ({"fewer_seeds": {"strong": 1.5}}, ("fewer_seeds", 1.5)),
        ({"colour": "red"}, ("title, split, baseline, seeds, train, rows", "'colour'")),
        ("[1, 2", ()),
        ("just words", ()),
        ("steps: 20", ("--methods", "--config")),
    ],
)
def test_bad_studies(tmp_path, changes, words):
    plain = changes if isinstance(changes, str) else yaml.safe_dump({**dataclasses.asdict(STUDY), **changes})
    (tmp_path / "bad.yaml").write_text(plain)
    with pytest.raises(InputError) as caught:
        read_study(tmp_path / "bad.yaml")
    # On the command line what jsonargparse says in two lines is one.
    mentions(" ".join(str(caught.value).split()), tmp_path / "bad.yaml", *words)
    with refuses(InputError, tmp_path / "none.yaml"):
        read_study(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", ["[1, 2", "[1]", '[{"row": "joint", "seed": 0, "options": {}}]'])
def test_files_that_hold_no_records(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        read_records(STUDY, tmp_path / "bad.json")


def test_rows_with_wrong_options_are_named():
    with pytest.raises(InputError, match=r"strong.*global_alignment\.weight"):
        _ = stronger(-1).settings


def test_methods_on_the_command_line_are_rows():
    study = study_of_methods(["ass", "joint"], [3, 4], ["--steps", "9", "--data.scenes.test=5"])
    assert (study.baseline, study.split, study.seeds, list(study.rows)) == ("joint", "test", [3, 4], ["ass", "joint"])
    assert study.settings["ass"].steps == 9
    assert [settings.method for settings in study.settings.values()] == ["ass", "joint"]
    assert study.settings["joint"].data.scenes.test == 5
    assert study_of_methods(["ass", "semantic"], [0], []).baseline == "ass"
    assert study_of_methods(["ass", "joint"], [0], ["--config", "a/mine.yaml"]).title == "mine: ass, joint"


def test_a_study_needs_images_that_score_it():
    folders = [f"--data.{split}.{kind}={split}" for split in ("source", "target") for kind in ("images", "labels")]
    with refuses(InputError, "joint", "data.test"):
        _ = study_of_methods(["joint"], [0], folders).settings


@pytest.mark.parametrize(
    "arguments", [["--seed", "3"], ["--method=ass"], ["--resume"], ["5"], ["--steps", "5", "6", "7"]], ids=" ".join
)
def test_options_that_a_study_cannot_pass_on(arguments):
    with refuses(InputError, *arguments):
        study_of_methods(["ass"], [0], arguments)


def test_the_study_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workbench = STUDIES.parent
    mine = yaml.safe_load((workbench / "template.yaml").read_text())
    mine["data"]["validation"] = {"images": "a", "labels": "b"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    (block,) = [block for block in read_blocks(workbench / "README.md") if block.language == "yaml"]
    (tmp_path / "study.yaml").write_text(block.code)
    study = read_study(tmp_path / "study.yaml")
    assert {settings.labelled for settings in study.settings.values()} == {10}
    assert len(study.runs) == 10


RESULTS = Path(__file__).parents[4] / "docs" / "results"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_workbench_can_be_run(path):
    study = read_study(path)
    assert [settings.method for settings in study.settings.values()] == [row["method"] for row in study.rows.values()]


@pytest.mark.parametrize("records", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_records_of_the_workbench_are_those_of_its_studies(records):
    study = read_study(STUDIES / f"{records.stem}.yaml")
    assert study.baseline in {record["row"] for record in read_records(study, records)}

"""The command `study` over several studies. Training is faked."""

import dataclasses
import json

import pytest
import yaml

from examples.workbench.__main__ import main
from examples.workbench.studies import command
from tests.errors import mentions
from tests.examples.workbench.studies.test_study import STUDY


@pytest.fixture
def study(folder, monkeypatch, capsys):
    """Run the command on two studies, `one` and `two`, of two rows and two seeds; its status, output and errors."""
    monkeypatch.chdir(folder)
    rows = {"joint": {"method": "joint"}, "strong": {"method": "ass"}}
    for name in ("one", "two"):
        rows["strong"] = rows["strong"] | {"global_alignment.weight": 0.1 if name == "one" else 0.2}
        plain = dataclasses.asdict(dataclasses.replace(STUDY, title=f"Study {name}", seeds=[0, 1], rows=rows))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))

    def run(*arguments):
        capsys.readouterr()
        return (main(["study", *arguments]), *capsys.readouterr())

    return run


def holds(text, *fragments):
    assert [fragment for fragment in fragments if fragment not in text] == []


def started(folder, name):
    lines = (folder / "runs" / "study" / name / "started").read_text().splitlines()
    return [line.split()[0] for line in lines if not line.startswith("ended")]


def test_several_studies_go_on_where_they_stopped(study, folder, monkeypatch):
    monkeypatch.setenv("FAIL", "ass")
    status, _, errors = study("one.yaml", "two.yaml", "--jobs", "1")
    assert status == 2
    mentions(errors.splitlines()[-1], "strong-seed0", "expected luck")
    monkeypatch.delenv("FAIL")
    status, out, _ = study("one.yaml", "two.yaml", "--jobs", "1")
    assert status == 0
    order = ["joint-seed0", "strong-seed0", "strong-seed0", "joint-seed1", "strong-seed1"]
    assert started(folder, "one") == order
    assert started(folder, "two") == [order[0], *order[2:]]
    results = folder / "runs" / "study"
    for name in ("one", "two"):
        assert len(json.loads((results / name / f"{name}.json").read_text())) == 4
        text = (results / name / f"{name}.md").read_text()
        assert text.endswith(f"`python -m examples.workbench study {name}.yaml`\n")
    summary = (results / "summary.md").read_text()
    holds(summary, "Study one", "Study two", "+7.0 ± 0.0 (2)", "+17.0 ± 0.0 (2)", "study one.yaml two.yaml`")
    # Printed without the picture.
    assert summary.split("![")[0].strip() in out
    assert (results / "summary.png").exists()


def test_reports_of_what_is_on_record(study, folder):
    """`one` alone has runs: the other is named, and nothing is run."""
    assert study("one.yaml", "--records", "records")[0] == 0
    status, out, errors = study("one.yaml", "two.yaml", "--records", "records", "--report-only", "--summary", "a/b.md")
    assert status == 0
    mentions(errors.strip(), "records/two.json", "Study two")
    assert {path.name for path in (folder / "a").iterdir()} == {"b.md", "b.png"}
    holds(out, "Summary of one", "records/one.json", "a/b.md")
    assert {path.suffix for path in (folder / "records").iterdir()} == {".json", ".md", ".png"}
    assert not (folder / "runs" / "study" / "two").exists()
    status, _, errors = study("one.yaml", "two.yaml", "--report-only")
    assert status == 2
    mentions(errors.splitlines()[-1], "one, two")


def test_studies_of_the_workbench_keep_records_in_the_docs(study, monkeypatch):
    """And their summary, unless one of the studies is not theirs."""
    asked = []
    monkeypatch.setattr(command, "run_study", lambda study, **how: asked.append(str(how["records"])) or [])
    monkeypatch.setattr(command, "write_report", lambda *arguments: "")
    monkeypatch.setattr(command, "write_summary", lambda found, path, words: asked.append(str(path)) or "")
    for names in (["scenes"], ["scenes", "scenes-steps"], ["scenes", "one.yaml"]):
        assert study(*names)[0] == 0
    results, own = "docs/results", "runs/study"
    assert asked == [
        *(f"{results}/{name}" for name in ("scenes.json", "scenes.json", "scenes-steps.json", "summary.md")),
        *(f"{results}/scenes.json", f"{own}/one/one.json", f"{own}/summary.md"),
    ]


def test_every_study_is_checked_before_the_first_one_runs(study, folder):
    text = (folder / "two.yaml").read_text()
    (folder / "two.yaml").write_text(text.replace("steps: 7", "stepz: 7"))
    status, _, errors = study("one.yaml", "two.yaml")
    assert status == 2
    mentions(errors.strip(), "Study two", "--stepz", "did you mean --steps?")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one.yaml", "../one.yaml"], ("different names", "one")),
        (["one.yaml", "scens"], ("scens", "did you mean scenes?")),
        (["one.yaml", "--jobs", "1", "two.yaml"], ("before all options", "two.yaml")),
        (["--jobs", "1", "one.yaml"], ("before all options", "--methods", "neither")),
        (["one.yaml", "--methods", "joint"], ("both", "one.yaml", "--methods")),
        (["one.yaml", "--summary", "a.md"], ("--summary", "a.md")),
        (["one.yaml", "two.yaml", "--summary", "a.json"], ("--summary", "a.json")),
    ],
)
def test_bad_command_lines(study, folder, arguments, words):
    (folder / "below").mkdir()
    (folder / "below" / "one.yaml").write_text((folder / "one.yaml").read_text())
    arguments = [argument.replace("../", "below/") for argument in arguments]
    status, _, errors = study(*arguments)
    assert status == 2
    mentions(errors.strip(), *words)
    assert not (folder / "runs").exists()

"""Tables and figures of studies, by hand."""

import dataclasses
import re

import numpy as np
import pytest
from matplotlib.colors import same_color

from examples.workbench.errors import InputError
from examples.workbench.studies import report
from examples.workbench.studies.report import draw_curves, draw_study, study_table, write_report
from examples.workbench.studies.study import Study
from tests.errors import refuses

STUDY = Study(
    title="A study",
    split="test",
    baseline="joint",
    seeds=[0, 1, 2],
    train={"steps": 7},
    rows={"joint": {"method": "joint"}, "late": {"method": "ass", "network.auxiliary": False}, "none": {}},
)
# joint 40, 42, 47: mean 43, deviations -3, -1, 4, variance 26 / 2, spread 3.606.
# late 45, 50, 49: mean 48, deviations -3, 2, 1, variance 14 / 2, spread 2.646.
# Differences 5, 8, 2: mean 5, spread 3, divided by the root of three 1.732. Bus, in seed 0 only: 20 and 22.5.
MIOU = {"joint": [0.40, 0.42, 0.47], "late": [0.45, 0.50, 0.49]}


def record(row, seed, miou, **changes):
    iou = {"road": miou, "pole": None, "bus": None if seed else miou / 2}
    validation = {"miou": miou + 0.25, "iou": iou}
    versions = {"python": "3.11.2", "torch": "2.13.0"}
    run = {"row": row, "seed": seed, "miou": miou, "iou": iou, "validation": validation, "seconds": 30.6}
    return run | {"versions": versions} | changes


RESULTS = [record(row, seed, miou) for row, of in MIOU.items() for seed, miou in enumerate(of)]


def cells(table):
    """The lines of the two tables by their first cells, without the padding."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line[:2] == "| "]
    second = [line[0] for line in lines].index("class")
    return [{line[0]: line[1:] for line in part} for part in (lines[:second], lines[second:])]


def test_table_by_hand():
    table = study_table(STUDY, RESULTS)
    rows, classes = cells(table)
    assert rows["row"] == ["mIoU", "difference", "seeds 0, 1, 2"]
    assert rows["joint"] == ["43.0 ± 3.6", "–", "40.0, 42.0, 47.0"]
    assert rows["late"] == ["48.0 ± 2.6", "+5.0 ± 1.7", "45.0, 50.0, 49.0"]
    assert "none" not in rows
    assert [line for line in table.splitlines() if line[:2] == "- "] == [
        "- `late`: method `ass`, `network.auxiliary=false`"
    ]
    expected = {"road": ["43.0", "48.0"], "pole": ["–", "–"], "bus": ["20.0", "22.5"]}
    assert classes == {"class": ["joint", "late"]} | expected
    assert "`train --steps=7`" in table
    assert table.splitlines()[-1] == "6 runs, 3 min 4 s in total. Versions: python 3.11.2, torch 2.13.0."


def test_missing_runs_and_single_seeds():
    # Differences only where both have the seed, and no negative zero.
    results = [record("joint", 1, 0.4), record("late", 0, 0.5), record("late", 1, 0.39996)]
    rows, _ = cells(study_table(STUDY, results))
    assert rows["joint"] == ["40.0", "–", "–, 40.0, –"]
    assert rows["late"] == ["45.0 ± 7.1", "+0.0", "50.0, 40.0, –"]
    rows, _ = cells(study_table(STUDY, results[1:]))
    assert rows["late"][:2] == ["45.0 ± 7.1", "–"]


def test_a_study_of_one_seed_says_so_and_claims_no_spread():
    table = study_table(dataclasses.replace(STUDY, seeds=[1]), RESULTS[1::3])
    rows, _ = cells(table)
    assert rows == {"row": ["mIoU", "difference"], "joint": ["42.0", "–"], "late": ["50.0", "+8.0"]}
    assert "one seed (1)" in table
    assert not any(word in table for word in ("±", "deviation", "standard error", "mean over"))


@pytest.mark.parametrize(("rows", "classes"), [(3, 12), (12, 3), (30, 2), (12, 19)])
def test_tables_are_at_most_110_characters_wide(rows, classes):
    """Of each class and row there is one value, whichever way round the tables are."""
    names = ["joint", *(f"row-{row}" for row in range(1, rows))]
    study = dataclasses.replace(STUDY, rows={name: {"method": "joint"} for name in names})
    iou = {f"class {k}": k / 1000 for k in range(classes)}
    results = [
        record(row, 0, 0.1, iou={name: value + i / 10 for name, value in iou.items()})
        for i, row in enumerate(study.rows)
    ]
    lines = [line for line in study_table(study, results).splitlines() if line[:2] == "| "]
    assert max(map(len, lines)) <= 110
    values, header = {}, []
    for line in lines[rows + 1 :]:
        name, *numbers = (cell.strip() for cell in line[1:-1].split("|"))
        if name in ("row", "class"):
            header = numbers
        else:
            values |= {frozenset((name, other)): number for other, number in zip(header, numbers, strict=True)}
    assert values == {
        frozenset((row, name)): f"{100 * value + 10 * i:.1f}"
        for i, row in enumerate(study.rows)
        for name, value in iou.items()
    }


def test_validation_images_hours_and_versions_that_differ():
    study = dataclasses.replace(STUDY, split="validation")
    results = [*RESULTS[:5], RESULTS[5] | {"versions": {"torch": "2.4.1"}, "seconds": 7200}]
    table = study_table(study, results)
    assert cells(table)[0]["late"] == ["73.0 ± 2.6", "+5.0 ± 1.7", "70.0, 75.0, 74.0"]
    assert "validation" in table
    assert table.splitlines()[-1] == "6 runs, 2 h 2 min in total. Versions: python 3.11.2, torch 2.13.0 and 2.4.1."


@pytest.fixture
def figures(monkeypatch):
    """Figures that would have been saved."""
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def test_the_figure_has_a_mark_for_each_run_and_the_means(figures, tmp_path):
    draw_study(tmp_path / "a.png", STUDY, RESULTS)
    left, right = figures[0].axes
    for axes, expected in ((left, [[40, 42, 47], [45, 50, 49]]), (right, [[np.nan] * 3, [5, 8, 2]])):
        np.testing.assert_allclose([line.get_xdata() for line in axes.lines if line.get_marker() == "o"], expected)
    assert [float(line.get_xdata()[0]) for line in left.lines if line.get_marker() == "|"] == pytest.approx([43, 48])
    assert [float(line.get_xdata()[0]) for line in right.lines if line.get_marker() == "|"] == pytest.approx([5])
    assert [text.get_text() for text in left.texts] == ["43.0", "48.0"]
    assert [text.get_text() for text in right.texts] == ["+5.0"]
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["one seed", "mean of the seeds"]
    draw_study(tmp_path / "a.png", STUDY, RESULTS[3:])
    assert len(figures[1].axes) == 1


def test_rows_with_one_seed_are_marked(figures, tmp_path):
    draw_study(tmp_path / "a.png", STUDY, [*RESULTS[:3], RESULTS[3]])
    left, right = figures[0].axes
    for axes, shown in ((left, ["joint", "late"]), (right, ["late"])):
        rims = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"][-len(shown) :]
        assert [rim == "white" for rim in rims] == [row == "late" for row in shown]
        assert sum(line.get_marker() == "|" for line in axes.lines) == len(shown) - 1
    assert "one seed only" in figures[0].legends[0].texts[-1].get_text()


def test_small_differences_do_not_fill_the_axis(figures, tmp_path):
    results = [record(row, seed, 0.4 + 0.001 * seed) for row in ("joint", "late") for seed in range(3)]
    draw_study(tmp_path / "a.png", STUDY, results)
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        assert high - low >= 5
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 2 <= len(ticks) <= 5
        assert axes.xaxis.get_offset_text().get_text() == ""
    low, high = figures[0].axes[0].get_xlim()
    assert low < 40
    assert high > 40.2


def test_curves_are_those_of_the_runs_and_their_mean(figures, tmp_path):
    draw_curves(tmp_path / "a.png", STUDY, RESULTS)
    assert not figures
    curves = [[[5, 0.2], [7, 0.5]], [[5, 0.4], [7, 0.6]], [[7, 0.7]]]
    draw_curves(tmp_path / "a.png", STUDY, [*RESULTS[:3], *(r | {"curve": c} for r, c in zip(RESULTS[3:], curves))])
    lines = figures[0].axes[0].lines
    # Where one of the runs was not evaluated, there is no mean.
    expected = [[[5, 20], [7, 50]], [[5, 40], [7, 60]], [[7, 70]], [[7, 60]]]
    assert [np.round(line.get_xydata(), 9).tolist() for line in lines] == expected
    assert all(same_color(line.get_color(), lines[0].get_color()) for line in lines)
    assert [text.get_text() for text in figures[0].legends[0].texts] == ["late"]


def test_the_report_stands_beside_the_records(tmp_path):
    results = [r | {"curve": [[7, r["miou"]]]} for r in RESULTS]
    for name, found in (("a", RESULTS), ("b", results)):
        table = write_report(STUDY, found, tmp_path / f"{name}.json", "python -m examples.workbench study a")
        text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
        assert text.startswith(table)
        *pictures, command = text.removeprefix(table).strip().split("\n\n")
        assert command == "`python -m examples.workbench study a`"
        found = [re.fullmatch(r"!\[.+\]\((.+)\)", picture)[1] for picture in pictures]
        assert found == [f"{name}.png"] + ["b-curves.png"] * (name == "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a.md", "a.png", "b.md", "b.png", "b-curves.png"}
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with refuses(InputError, tmp_path / "c.json", STUDY.title, "none"):
        write_report(STUDY, [], tmp_path / "c.json", "")

"""The summary of several studies, by hand."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from examples.workbench.studies import summary
from examples.workbench.studies.study import STUDIES, read_records, read_study
from examples.workbench.studies.summary import draw_summary, summary_table, write_summary
from tests.examples.workbench.studies.test_report import RESULTS, STUDY, record

# In the other study `late` has two of three seeds: 52 and 49.99 against 50 and 50, differences 2 and -0.01.
OTHER = dataclasses.replace(
    STUDY, title="Another", rows={"joint": {}, "late": {}, "bare": {}}, fewer_seeds={"late": 2}, train={"steps": 9}
)
OTHERS = [
    *(record("joint", seed, 0.5) for seed in range(3)),
    record("late", 0, 0.52),
    record("late", 1, 0.4999),
    record("bare", 2, 0.45),
]
FOUND = {"first": (STUDY, RESULTS), "second": (OTHER, OTHERS)}


def test_table_by_hand():
    table = summary_table(FOUND)
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line[:2] == "| "]
    assert lines == [
        ["row", "first", "second"],
        ["joint", "43.0 ± 3.6 (3)", "50.0 ± 0.0 (3)"],
        ["late", "48.0 ± 2.6, +5.0 ± 1.7 (3)", "51.0 ± 1.4, +1.0 ± 1.0 (2)"],
        ["bare", "–", "45.0, -5.0 (1)"],
    ]
    notes = table.splitlines()[-2:]
    for note, words in zip(notes, (("first", "A study", "6 runs"), ("second", "Another", "--steps=9", "6 runs"))):
        assert all(word in note for word in (*words, "test images", "joint"))


def test_the_number_of_seeds_is_that_of_the_difference():
    """Without the baseline there is none, and the seeds of the row count."""
    lines = summary_table({"a": (STUDY, RESULTS[1:]), "b": (STUDY, RESULTS[3:])}).splitlines()
    row = [cell.strip() for line in lines if line.startswith("| late") for cell in line[1:-1].split("|")]
    assert row[1].endswith("± 3.0 (2)")
    assert row[2] == "48.0 ± 2.6 (3)"


def test_the_figure_has_a_panel_for_each_study_and_a_dot_for_each_seed(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(summary, "save_figure", lambda figure, path: drawn.append(figure))
    draw_summary(tmp_path / "a.png", FOUND)
    panels = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["A study", "Another"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["joint", "late", "bare"]
    none = [np.nan] * 3
    for axes, dots, mean, bar in (
        (panels[0], [none, [5, 8, 2], none], 5.0, 2 * 3**0.5),
        (panels[1], [none, [2, -0.01, np.nan], [np.nan, np.nan, -5]], 0.995, 2 * 1.005),
    ):
        seeds = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(np.transpose(seeds), dots)
        # A row with one seed has no error.
        ((points, _, (bars,)),) = axes.containers
        assert points.get_xdata() == pytest.approx([mean])
        assert bars.get_segments()[0][:, 0] == pytest.approx([mean - bar, mean + bar])
    assert [text.get_text() for text in panels[0].texts] == ["mIoU 43.0", "+5.0", "not run"]
    assert [text.get_text() for text in panels[1].texts] == ["mIoU 50.0", "+1.0", "-5.0, one seed"]
    assert panels[0].get_xlim() == panels[1].get_xlim()


@pytest.mark.parametrize("order", [list(FOUND), list(FOUND)[::-1]], ids="-".join)
def test_the_shared_scale_holds_the_data_of_every_panel(order, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(summary, "save_figure", lambda figure, path: drawn.append(figure))
    draw_summary(tmp_path / "a.png", {name: FOUND[name] for name in order})
    panels = drawn[0].axes
    low, high = panels[0].get_xlim()
    spans = [axes.dataLim.intervalx for axes in panels]
    assert low < min(span[0] for span in spans)
    assert high > max(span[1] for span in spans)
    assert len({tuple(span) for span in spans}) == len(panels)


def test_table_and_figure_stand_beside_each_other(tmp_path):
    table = write_summary(FOUND, tmp_path / "all.md", "python -m examples.workbench study first second")
    text = (tmp_path / "all.md").read_text(encoding="utf-8")
    assert text.startswith(table)
    picture, command = text.removeprefix(table).split("\n\n")[-2:]
    assert re.fullmatch(r"\n?!\[.+\]\(all.png\)", picture)
    assert command == "`python -m examples.workbench study first second`\n"
    assert text == f"{table}\n{picture.strip()}\n\n{command}"
    assert {path.name for path in tmp_path.iterdir()} == {"all.md", "all.png"}


def test_the_summary_and_its_page_have_the_figures_of_the_records():
    """docs/results.md has the scores and the differences in two tables, README some differences. Words are free."""
    docs = Path(__file__).parents[4] / "docs"
    found = {}
    for name in ("kitti-camvid", "idd-camvid", "airsim-camvid"):
        study = read_study(STUDIES / f"{name}.yaml")
        found[name] = (study, read_records(study, docs / "results" / f"{name}.json"))
    table = summary_table(found)
    assert (docs / "results" / "summary.md").read_text().startswith(table)
    scores, differences = {}, {}
    cell = r"([\d.]+ ± [\d.]+)(?:, ([+-][\d.]+ ± [\d.]+))? (\(\d\))"
    for row, cells in re.findall(r"^\| ([\w-]+) +\| +(\d.*) \|$", table, re.MULTILINE):
        parts = [re.fullmatch(cell, text.strip()).groups() for text in cells.split("|")]
        scores[row] = [f"{score} {seeds}" for score, _, seeds in parts]
        # The baseline has no difference: the page gives its score.
        differences[row] = [score if row == "joint" else difference for score, difference, _ in parts]
    assert len(scores) == 7
    page = (docs / "results.md").read_text().replace("**", "")
    lines = re.findall(r"^\| `([\w-]+)`(?:: mIoU)? \| ([^|]+ \| [^|]+ \| [^|]+?)( \| \d+)? \|$", page, re.MULTILINE)
    assert len(lines) == 14
    assert {row: cells.split(" | ") for row, cells, minutes in lines if minutes} == scores
    assert {row: cells.split(" | ") for row, cells, minutes in lines if not minutes} == differences
    readme = (docs.parent / "README.md").read_text().replace("**", "")
    lines = re.findall(r"^\| `([\w-]+)`[^|]* \| ([^|]+ ± [^|]+ \| [^|]+ \| [^|]+?) \|$", readme, re.MULTILINE)
    assert {row for row, _ in lines} == {"labelled-only", "self-training", "semantic", "ass"}
    assert all(cells.split(" | ") == differences[row] for row, cells in lines)

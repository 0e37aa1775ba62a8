"""The run folder's history: rows as written, and the rows that remain of a damaged file."""

import pytest

from examples.workbench.training.run_folder import append_history, read_history


@pytest.mark.parametrize(
    "line", [b'{"step": 2', b"\xff\x00", b'{"stfp": 2}', b"7", b"null", b'{"step": null}'], ids=repr
)
def test_a_damaged_row_is_left_out_and_removed(line, tmp_path, capsys):
    rows = [{"step": step, "loss/segmentation": 1.0 / (step + 1)} for step in range(4)]
    for row in rows:
        append_history(tmp_path, row)
    assert read_history(tmp_path) == rows
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert read_history(tmp_path) == rows
    assert read_history(tmp_path, before=3) == rows[:3]
    assert "1 damaged" in capsys.readouterr().err
    assert (tmp_path / "history.jsonl").read_bytes().count(b"\n") == 3


def test_a_run_without_rows_has_no_history(tmp_path):
    assert read_history(tmp_path) == []

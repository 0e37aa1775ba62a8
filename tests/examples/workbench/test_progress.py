"""Progress: bars in a terminal; elsewhere plain lines and nothing that redraws one."""

import io
import sys
from pathlib import Path

import pytest

from examples.workbench import progress
from examples.workbench.progress import bar, on_terminal, say, time_left
from examples.workbench.training.train import train
from tests.examples.workbench.tiny import tiny

# The trainer's libraries give their own warnings.
pytestmark = pytest.mark.filterwarnings("default")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "term", "drawn"), [(Terminal, "xterm", True), (Terminal, "dumb", False), (io.StringIO, "xterm", False)]
)
def test_bars_are_drawn_in_terminals_only(stream, term, drawn, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", term)
    assert on_terminal() == drawn
    assert list(bar(range(3), desc="check")) == [0, 1, 2]
    say("a line")
    printed = sys.stderr.getvalue()
    assert ("\r" in printed) == ("check" in printed) == drawn
    assert "a line\n" in printed


def test_a_bar_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert list(bar(range(3), disable=True)) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


@pytest.mark.slow
def test_a_run_without_a_terminal_prints_plain_lines(tmp_path, capsys):
    train(tiny(log_every=3, steps=7, validate_every=3), tmp_path / "run")
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = [line for line in printed.splitlines() if not line.startswith("warning: data.")]
    assert [line.split(":")[0] for line in lines] == [f"ass step {n}/7" for n in (1, 4, 7)]
    for line in lines:
        assert all(words in line for words in ("segmentation ", "global ", "semantic ", " acc ", " left"))


def test_a_run_in_a_terminal_has_a_bar_and_no_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    train(tiny(steps=2), tmp_path / "run")
    printed = sys.stderr.getvalue()
    assert "ass 2/2" in printed
    assert "ass step" not in printed
    assert "img/s" not in printed


def test_nothing_but_progress_draws_bars():
    """So that no bar is drawn if there is no terminal."""
    files = Path(progress.__file__).parent.rglob("*.py")
    users = [path.name for path in files if "import tqdm" in path.read_text(encoding="utf-8")]
    assert users == ["progress.py"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s left"), (59, "59 s left"), (247, "4.1 min left"), (7300, "2.0 h left")]
)
def test_time_left(seconds, words):
    assert time_left(seconds) == words

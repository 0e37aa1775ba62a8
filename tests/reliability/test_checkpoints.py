"""Checkpoints: whole or not at all, damage noticed, and a resumed run ends bit-identically."""

import json
import os

import pytest
import torch

from examples.workbench.errors import InputError, MachineError
from examples.workbench.files import write_whole
from examples.workbench.training import checkpoints
from tests.errors import mentions, refuses
from tests.examples.workbench.tiny import checkpoint, equal, history
from tests.reliability.tiny import at_step, same_run

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def save(out, step):
    checkpoints.save_checkpoint(out, checkpoints.Progress(step), {"segmenter": torch.nn.Linear(30, 20)}, {})
    return out / f"checkpoints/step-{step:08d}.pt"


def flip(content, place):
    return content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]


def damaged(content):
    """The content with one bit of one byte changed, truncated, or zeroed, and whether all loaders must notice it."""
    weights = content.index(b"/data/0")
    for place in range(0, len(content), 7):
        # Bits of dates and padding matter to no reader; those of weights always do.
        yield flip(content, place), weights + 100 < place < weights + 2400
    # Where the list of members says that the first tensor is a folder.
    place = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0")) + 38
    yield content[:place] + b"\x10" + content[place + 1 :], True
    for length in range(0, len(content), 7):
        yield content[:length], True
    yield bytes(len(content)), True


def test_damage_is_noticed_or_harmless(tmp_path):
    path = save(tmp_path, 1)
    content, whole = path.read_bytes(), torch.load(path, weights_only=True)
    for changed, must_notice in damaged(content):
        path.write_bytes(changed)
        try:
            found = checkpoints._load(path)
        except InputError:
            continue
        assert not must_notice
        assert equal(found, whole)
    path.write_bytes(content)
    assert equal(checkpoints._load(path), whole)


def test_the_last_three_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 100_000_000):
        save(tmp_path, step)
    kept = sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [9, 10, 100_000_000]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            paths = [os.readlink(f"/proc/self/fd/{arguments[0]}")] if name == "fsync" else map(str, arguments)
            done.append((name, *paths))
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    path = save(tmp_path, 5)
    temporary = str(path.with_name(".step-00000005.pt.tmp"))
    assert done == [("fsync", temporary), ("replace", temporary, str(path)), ("fsync", str(path.parent))]


def test_a_file_that_cannot_be_written_keeps_its_contents(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    # A temporary name that leads to a disk without room.
    (tmp_path / ".file.tmp").symlink_to("/dev/full")
    with refuses(MachineError, path, "No space left on device"):
        write_whole(path, lambda to: to.write_text("after"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


class CutError(Exception):
    """A run that ends without warning."""


def cut(run, monkeypatch, step, *arguments, **options):
    """Train until the middle of a step."""

    def end():
        raise CutError

    with monkeypatch.context() as patch:
        at_step(patch, step, end)
        with pytest.raises(CutError):
            run(*arguments, **options)


# Such that the teacher's labels, the counts of classes and the banks of prototypes change the losses.
PLUS = ("--method", "ass-plus", "--self_training.threshold", 0.2, "--global_alignment.inputs", "balanced")
PLUS += ("--self_training.strong", 0.5, "--self_training.contrast_weight", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "workers", "cuts"), [((), 2, [1]), (PLUS, 1, range(6))], ids=["ass", "ass-plus"])
def test_cut_twice_and_resumed_is_uninterrupted(options, workers, cuts, run, tmp_path, monkeypatch):
    """In the middle of any step, then with another number of workers, then once more."""
    assert run(*options, out=tmp_path / "whole") == 0
    for first in cuts:
        out, second = tmp_path / f"cut-{first}", min(first + 2, 5)
        cut(run, monkeypatch, first, *options, "--data.workers", workers, out=out)
        cut(run, monkeypatch, second, *options, "--data.workers", 0, "--resume", out=out)
        torch.rand(9)  # whatever else has been drawn
        assert run(*options, "--data.workers", workers, "--resume", out=out) == 0
        assert same_run(out, tmp_path / "whole")
        assert history(out) == history(tmp_path / "whole")
        resumed = json.loads((out / "metrics.json").read_text())["resumed_from"]
        assert resumed == [at for at in dict.fromkeys((first // 2 * 2, second // 2 * 2)) if at]


@pytest.mark.slow
def test_validation_keeps_the_best_and_changes_nothing(run, tmp_path, monkeypatch):
    assert run(out=tmp_path / "whole") == 0
    out = tmp_path / "run"
    cut(run, monkeypatch, 4, "--validate_every", 3)
    assert run("--validate_every", 2, "--resume") == 0
    assert equal(checkpoint(out)["stateful"], checkpoint(tmp_path / "whole")["stateful"])
    scores = [row for row in history(out) if "miou/validation" in row]
    assert [row["step"] for row in scores] == [2, 5]
    best = max(scores, key=lambda row: row["miou/validation"])
    kept = torch.load(out / checkpoints.BEST, weights_only=True)
    assert (kept["step"], kept["miou"]) == (best["step"] + 1, best["miou/validation"])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["best"] == {"validation": kept["miou"], "step": kept["step"]}
    assert metrics["validation"]["miou"] == scores[-1]["miou/validation"]
    assert metrics["curve"] == [[row["step"] + 1, row["miou/validation"]] for row in scores]


@pytest.mark.slow
def test_the_best_is_evaluated_on_request(run, tmp_path, capsys):
    from examples.workbench.__main__ import main

    assert run("--validate_every", 3, "--steps", 3) == 0
    command = ["evaluate", "--out", str(tmp_path / "run"), "--split", "validation"]
    tables = []
    for more in ([], ["--best"]):
        capsys.readouterr()
        assert main([*command, *more]) == 0
        tables.append(capsys.readouterr().out)
    # Validated once, at the end: the best network is the last.
    assert tables[0] == tables[1]
    (tmp_path / "run" / checkpoints.BEST).unlink()
    assert main([*command, "--best"]) == 2
    mentions(capsys.readouterr().err, "error", tmp_path / "run", checkpoints.BEST)

"""Checkpoints: whole or not at all, damage noticed, and a run that goes on comes to the same bits."""

import json
import os

import pytest
import torch

from examples.workbench.training import checkpoints, run_folder as runs
from examples.workbench.errors import InputError
from examples.workbench.errors import MachineError
from tests.errors import mentions, refuses
from tests.reliability.tiny import equal, rows, same_run, state, steps

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def save(out, step, networks=None, **changes):
    networks = networks or {"segmenter": torch.nn.Linear(3, 2)}
    checkpoints.save_checkpoint(out, checkpoints.Progress(step, **changes), networks, {"source": torch.arange(2)}, {})
    return out / f"checkpoints/step-{step:08d}.pt"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of two and a half thousand bytes, and what it holds."""
    out = tmp_path_factory.mktemp("small")
    path = save(out, 1)
    return out, path, path.read_bytes(), torch.load(path, weights_only=True)


def loaded(out):
    """What a reader gets; None where the damage is noticed."""
    try:
        return checkpoints._read(checkpoints.newest_checkpoint(out))
    except InputError:
        return None


def test_each_changed_byte_is_noticed(small):
    out, path, whole, contents = small
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert not checkpoints._is_whole(path)
    assert loaded(out) is None
    for length in (4, len(whole)):
        path.write_bytes(bytes(length))
        assert not checkpoints._is_whole(path)
    path.write_bytes(whole)
    assert equal(loaded(out), contents)


def test_each_cut_is_noticed(small):
    out, path, whole, contents = small
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert not checkpoints._is_whole(path)
    path.write_bytes(whole)
    assert equal(loaded(out), contents)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path, capsys):
    networks = {"segmenter": torch.nn.Linear(3, 2)}
    before = {name: value.clone() for name, value in networks["segmenter"].state_dict().items()}
    save(tmp_path, 1, networks)
    with torch.no_grad():
        networks["segmenter"].weight.add_(1)
    newest = save(tmp_path, 2, networks)
    newest.write_bytes(newest.read_bytes()[:-1])
    checkpoints.set_aside_damaged(tmp_path)
    progress = checkpoints.load_checkpoint(tmp_path, networks, {}, {})
    mentions(capsys.readouterr().err, newest_checkpoint, "damaged")
    assert (progress.step, progress.resumed_from) == (1, (1,))
    assert equal(dict(networks["segmenter"].state_dict()), before)
    # Out of the way, so that it counts for none of the three that are kept, but not thrown away.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001.pt",
        "step-00000002.damaged",
    ]


def test_the_last_three_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 100_000_000):
        save(tmp_path, step)
    kept = sorted(int(path.stem.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [9, 10, 100_000_000]


def test_it_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, name=name, real=real):
            if name == "fsync":
                done.append((name, os.readlink(f"/proc/self/fd/{arguments[0]}")))
            else:
                done.append((name, *map(str, arguments)))
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    path = save(tmp_path, 5)
    temporary = str(path.with_name(".step-00000005.pt.tmp"))
    assert done == [("fsync", temporary), ("replace", temporary, str(path)), ("fsync", str(path.parent))]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    # A temporary name that leads to a disk without room.
    (tmp_path / ".file.tmp").symlink_to("/dev/full")
    with refuses(MachineError, path, "No space left on device"):
        checkpoints.write_whole(path, lambda to: to.write_text("after"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    save(tmp_path, 1)
    network = torch.nn.Linear(3, 2)
    network.weight.data[0, 1] = torch.inf
    with refuses(InputError, "finite", "weight of the discriminator", "step 1"):
        save(tmp_path, 2, {"discriminator": network})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    path = tmp_path / "checkpoints/step-00000001.pt"
    path.parent.mkdir()
    checkpoints._save(path, {"stateful": Code()})
    for read in (checkpoints.load_weights, lambda path: checkpoints.load_checkpoint(tmp_path, {}, {}, {})):
        with refuses(InputError, path, "code"):
            read(path)
    torch.load(path, weights_only=False)
    # Once, by the line above.
    assert capsys.readouterr().out == "code ran\n"


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({}, ("KeyError 'run'",)),
        ([1], ("TypeError list indices",)),
        ({"run": {}, "stateful": 3}, ("TypeError 'int' object is not subscriptable",)),
        ({"run": {}, "stateful": {"segmenter": {"a": 1}}}, ("weight", [2, 3], "none")),
    ],
)
def test_other_contents_are_refused(contents, words, tmp_path):
    path = tmp_path / "checkpoints/step-00000001.pt"
    path.parent.mkdir()
    checkpoints._save(path, contents)
    with refuses(InputError, path, *words):
        checkpoints.load_checkpoint(tmp_path, {"segmenter": torch.nn.Linear(3, 2)}, {}, {})


def test_a_checkpoint_holds_all_that_a_run_needs(run, tmp_path):
    assert run("--method", "ass-plus", "--steps", 4) == 0
    found = state(tmp_path / "run")
    assert sorted(found) == ["best", "pixels", "resumed_from", "run", "stateful", "step"]
    assert sorted(found["pixels"]) == ["labelled", "source"]
    assert sorted(found["stateful"]) == [
        "global alignment",
        "global alignment optimiser",
        "labelled bank",
        "optimiser",
        "segmenter",
        "semantic alignment",
        "semantic alignment optimiser",
        "source bank",
        "teacher",
    ]
    assert found["run"]["method"] == "ass-plus"
    assert found["run"]["images"]["source"].startswith("6 (")


class Cut(Exception):  # noqa: N818
    """A run that ends with no warning."""


def cut_at(step, monkeypatch):
    """Let the run end as it writes its row of this step, the step done and no checkpoint of it there."""
    append = run_folder.append_history

    def ends(out, row):
        if row["step"] == step:
            raise Cut
        append(out, row)

    monkeypatch.setattr(runs, "append_history", ends)


@pytest.mark.parametrize(
    ("method", "workers", "cuts"),
    [
        ("ass", 0, [3]),
        pytest.param("ass", 2, [1, 4], marks=pytest.mark.slow),
        pytest.param("ass-plus", 1, range(6), marks=pytest.mark.slow),
    ],
    ids=["ass", "ass-workers", "ass-plus-each-step"],
)
@pytest.mark.slow
def test_cut_twice_and_resumed_is_uninterrupted(method, workers, cuts, run, tmp_path, monkeypatch):
    """In the middle of a step, by an end without warning; then with another number of workers; then once more."""
    assert run("--method", method, out=tmp_path / "whole") == 0
    for first in cuts:
        out = tmp_path / f"cut-{first}"
        for resume, step, loaders in (([], first, workers), (["--resume"], min(first + 2, 5), 0)):
            with monkeypatch.context() as patch:
                cut_at(step, patch)
                with pytest.raises(Cut):
                    run("--method", method, "--data.workers", loaders, *resume, out=out)
        torch.rand(9)  # whatever else has been drawn
        assert run("--method", method, "--data.workers", workers, "--resume", out=out) == 0
        assert same_run(out, tmp_path / "whole")
        assert rows(out) == rows(tmp_path / "whole")
        resumed = json.loads((out / "metrics.json").read_text())["resumed_from"]
        assert resumed == [at for at in dict.fromkeys((first // 2 * 2, min(first + 2, 5) // 2 * 2)) if at]


@pytest.mark.slow
def test_validation_keeps_the_best_and_changes_nothing(run, tmp_path, monkeypatch, capsys):
    assert run(out=tmp_path / "whole") == 0
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut_at(4, patch)
        with pytest.raises(Cut):
            run("--validate_every", 3)
    assert run("--validate_every", 2, "--resume") == 0
    assert equal(state(out)["stateful"], state(tmp_path / "whole")["stateful"])
    looks = [row for row in rows(out) if "miou/validation" in row]
    assert [row["step"] for row in looks] == [2, 5]
    best = max(looks, key=lambda row: row["miou/validation"])
    kept = torch.load(out / checkpoints.BEST, weights_only=True)
    assert (kept["step"], kept["miou"]) == (best["step"] + 1, best["miou/validation"])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["best"] == {"validation": kept["miou"], "step": kept["step"]}
    assert metrics["validation"]["miou"] == looks[-1]["miou/validation"]
    assert metrics["curve"] == [[row["step"] + 1, row["miou/validation"]] for row in looks]


@pytest.mark.slow
def test_the_best_is_evaluated_on_request(run, tmp_path, capsys):
    from examples.workbench.__main__ import main

    assert run("--validate_every", 3, "--steps", 3) == 0
    capsys.readouterr()
    tables = []
    for more in ([], ["--best"]):
        assert main(["evaluate", "--out", str(tmp_path / "run"), "--split", "validation", *more]) == 0
        tables.append(capsys.readouterr().out)
    # One look, at the end: the best is the last.
    assert tables[0] == tables[1]
    (tmp_path / "run" / checkpoints.BEST).unlink()
    assert main(["evaluate", "--out", str(tmp_path / "run"), "--best"]) == 2
    mentions(capsys.readouterr().err, "error", tmp_path / "run" / checkpoints.BEST)
    assert steps(tmp_path / "run") == 4

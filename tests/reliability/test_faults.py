"""Bad days, each of them caused for real: what the run says in one line, its exit status, and what is kept.

docs/resuming.md has a table of them, whose last column names these tests.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from examples.workbench.training import checkpoints, run_folder as runs
from examples.workbench.training import train as train_module
from examples.workbench.__main__ import main
from tests.errors import mentions
from tests.reliability.tiny import TINY, end_all, kill_the_second_rank, rows, same_run, state, steps

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def said(capsys):
    """The last line on standard error, which is all that a user has to read."""

    def last():
        error = capsys.readouterr().err.replace("\r", "\n")
        assert "Traceback" not in error
        return error.splitlines()[-1]

    return last


def line_of(capsys, path):
    """The line on standard error that names the file."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return next(line for line in lines if str(path) in line)


@pytest.fixture(scope="module")
def has_checkpoint(tmp_path_factory, config):
    """A run of six steps, stopped after four, with checkpoints of the second and the fourth."""
    out = tmp_path_factory.mktemp("has_checkpoint") / "run"
    with pytest.MonkeyPatch.context() as patch:
        when(patch, 4, lambda: os.kill(os.getpid(), signal.SIGKILL), instead=KeyboardInterrupt)
        assert main(["train", "--config", str(config), "--out", str(out)]) == 130
    assert [path.name for path in kept(out)] == ["step-00000002.pt", "step-00000004.pt"]
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
    """The same, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--config", str(config), "--out", str(out)]) == 0
    return out


@pytest.fixture
def out(has_checkpoint, tmp_path):
    """A copy of the run that was stopped, to be spoilt and resumed."""
    return Path(shutil.copytree(has_checkpoint, tmp_path / "run"))


def when(patch, step, act, instead=None):
    """Have something happen in the middle of a step, once its row is written."""
    append = run_folder.append_history

    def happens(out, row):
        append(out, row)
        if row["step"] == step:
            if instead is not None:
                raise instead
            act()

    patch.setattr(runs, "append_history", happens)


def kept(out):
    return sorted((out / "checkpoints").glob("step-*.pt"))


# While it trains.


def test_full_disk_at_a_checkpoint(run, said, tmp_path, monkeypatch):
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kept(out)[0].stat().st_size // 2, limits[1]))

    when(monkeypatch, 3, fill)
    try:
        assert run() == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    mentions(said(), "error", out / "checkpoints/step-00000004.pt", "File too large")
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name != "before.pt"] == ["step-00000002.pt"]
    assert state(out)["step"] == 2


def test_full_disk_at_a_row_of_the_log(run, said, tmp_path, monkeypatch):
    def fill():
        (tmp_path / "run/history.jsonl").unlink()
        (tmp_path / "run/history.jsonl").symlink_to("/dev/full")

    when(monkeypatch, 2, fill)
    assert run() == 3
    mentions(said(), "error", "No space left on device")
    assert state(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_full_disk_at_the_end(out, run, said, whole, monkeypatch):
    (out / ".metrics.json.tmp").symlink_to("/dev/full")
    assert run("--resume") == 3
    mentions(said(), "error", out / "metrics.json", "No space left on device")
    assert run("--resume") == 0
    assert same_run(out, whole)


def test_a_poisoned_weight(run, said, tmp_path, monkeypatch):
    build = train_module.build_segmenter

    def poisoned(settings):
        segmenter = build(settings)
        next(iter(segmenter.parameters())).data.view(-1)[0] = torch.nan
        return segmenter

    monkeypatch.setattr(train_module, "build_segmenter", poisoned)
    assert run() == 2
    mentions(said(), "error", "loss", "nan", "step 0", "learning rate")


def test_a_loss_that_diverges(out, run, said, monkeypatch):
    load = checkpoints.load_checkpoint

    def loaded(out, stateful, pixels, run):
        progress = load(out, stateful, pixels, run)
        next(iter(stateful["segmenter"].parameters())).data.mul_(1e38)
        return progress

    monkeypatch.setattr(checkpoints, "load_checkpoint", loaded)
    assert run("--resume") == 2
    line = said()
    mentions(line, "error", "loss", "step 4", "learning rate")
    assert re.search(r"\b(nan|inf)\b", line)
    assert state(out)["step"] == 4


def test_weights_that_overflow(run, said, tmp_path):
    """After a loss that was finite: a checkpoint of them would take the place of a good one."""
    sgd = ("--optimiser.name", "sgd", "--optimiser.learning_rate", "3e38", "--optimiser.weight_decay", 1000)
    assert run(*sgd, "--save_every", 1) == 2
    mentions(said(), "error", "finite", "segmenter", "step 0", "learning rate")
    assert kept(tmp_path / "run") == []


def test_an_image_cut_short(folders, said, tmp_path, config):
    for image in (tmp_path / "data/source/images").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    for workers in ("0", "1"):
        out = tmp_path / workers
        assert main(["train", *folders, "--out", str(out), "--data.workers", workers]) == 2
        line = said()
        mentions(line, "error", "whole")
        assert re.search(r"/source/images/\d\.png\b", line)


@pytest.mark.slow
def test_an_image_that_vanishes(folders, said, tmp_path, monkeypatch):
    when(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "data/target/images"))
    assert main(["train", *folders, "--out", str(tmp_path / "run")]) == 2
    line = said()
    mentions(line, "error", "No such file")
    assert re.search(r"/target/images/\d\.png\b", line)
    assert state(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_an_image_that_never_comes(folders, said, tmp_path):
    """A pipe that nobody writes to, as a file on a file server that has gone."""
    for image in (tmp_path / "data/source/images").iterdir():
        image.unlink()
        os.mkfifo(image)
    options = ["--data.workers", "1", "--data.timeout", "2"]
    assert main(["train", *folders, "--out", str(tmp_path / "run"), *options]) == 3
    mentions(said(), "error", "DataLoader", "2 seconds", "data.workers", "data.timeout")


def test_a_label_out_of_range(folders, said, tmp_path):
    for mask in (tmp_path / "data/target/labels").iterdir():
        Image.new("L", (48, 40), 9).save(mask)
    assert main(["train", *folders, "--out", str(tmp_path / "run")]) == 2
    line = said()
    mentions(line, "error", "[0, 3)", "ignore_index 255", "got 9")
    assert re.search(r"/target/labels/\d\.png\b", line)


def test_a_mask_of_another_size(folders, said, tmp_path):
    for mask in (tmp_path / "data/source/labels").iterdir():
        Image.new("L", (47, 40)).save(mask)
    assert main(["train", *folders, "--out", str(tmp_path / "run")]) == 2
    line = said()
    mentions(line, "error", "48 x 40", "47 x 40")
    assert re.search(r"/source/labels/\d\.png\b", line)


@pytest.mark.slow
def test_a_worker_that_dies(start, tmp_path):
    out = tmp_path / "run"
    process = start("--data.workers", 2, "--steps", 100000)
    process.until(lambda: steps(out) > 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert process.wait() == 3
    error = process.log.read_text()
    assert "Traceback" not in error
    assert re.search(r"error: DataLoader worker .*(killed by signal: Killed|exited unexpectedly)", error)
    assert state(out)["step"] >= 4


@pytest.mark.slow
def test_no_memory(start, tmp_path):
    process = start("--data.size", "[2048, 2048]", "--data.scenes.source", 1, memory=2**29)
    assert process.wait() == 3
    error = process.log.read_text()
    assert "Traceback" not in error
    mentions(error.splitlines()[-1], "error", "out of memory", "fewer or smaller images")


@pytest.mark.slow
def test_two_processes_on_one_run(start, tmp_path):
    out = tmp_path / "run"
    first = start("--steps", 100000)
    first.until(lambda: checkpoints.has_checkpoint(out))
    second = start("--steps", 100000, "--resume", log=tmp_path / "second.txt")
    assert second.wait() == 3
    mentions(second.log.read_text(), "error", "one process", out)
    before = steps(out)
    first.until(lambda: steps(out) > before)
    # However it ends, the next may begin.
    first.kill()
    assert first.wait() == -9
    third = start("--steps", 100000, "--resume", log=tmp_path / "third.txt")
    at = steps(out)
    third.until(lambda: steps(out) > at)
    third.kill(signal.SIGTERM)
    assert third.wait() == 143


@pytest.mark.slow
def test_a_rank_that_dies(config, tmp_path):
    """torchrun ends the others and starts all of them again, by the same command."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "examples.workbench", "train", "--config", str(config), "--resume"]
    command += ["--steps", "80", "--save_every", "4"]
    for name in ("whole", "run"):
        out = tmp_path / name
        with (tmp_path / "log.txt").open("w") as log:
            agent = subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=log, start_new_session=True)
            try:
                if name == "run":
                    kill_the_second_rank(agent, signal.SIGKILL, out)
                assert agent.wait(300) == 0, (tmp_path / "log.txt").read_text()
            finally:
                end_all(agent)
    (at,) = state(out)["resumed_from"]
    assert at >= 8
    assert at % 4 == 0
    assert same_run(out, tmp_path / "whole")
    log = (tmp_path / "log.txt").read_text()
    assert "error: another rank has gone: " in log
    assert "Traceback" not in log


# As it begins, or goes on.


def test_a_folder_that_holds_a_run(out, run, said):
    assert run() == 2
    mentions(said(), "error", "--out", "--resume", out)


def test_a_file_in_the_folders_place(run, said, tmp_path):
    (tmp_path / "run").touch()
    assert run() == 2
    mentions(said(), "error", "--out", "file", tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, so that the folder is somebody else's")
def test_a_folder_that_cannot_be_written(out, run, said, config):
    above = {path: path.stat().st_mode for path in (*config.parents[:3], *out.parents[:3])}
    for path in above:
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        assert run("--resume") == 2
    finally:
        os.seteuid(0)
        for path, mode in above.items():
            path.chmod(mode)
    mentions(said(), "error", "--out", out, "Permission denied")


def test_other_settings(out, run, said):
    assert run("--resume", "--labelled", 3) == 2
    mentions(said(), "error", "--resume", "labelled 3", out / "settings.yaml", 2)
    # The copy for people may have been edited, too: the checkpoint knows better.
    written = yaml.safe_load((out / "settings.yaml").read_text())
    (out / "settings.yaml").write_text(yaml.safe_dump(written | {"labelled": 3}))
    assert run("--resume", "--labelled", 3) == 2
    mentions(said(), "labelled 3", out / "checkpoints/step-00000004.pt", 2)


def test_another_version_of_the_trainer(out, run, said):
    written = yaml.safe_load((out / "settings.yaml").read_text())
    (out / "settings.yaml").write_text(yaml.safe_dump({k: v for k, v in written.items() if k != "precision"}))
    assert run("--resume") == 2
    mentions(said(), "error", "--resume", "version", "precision", out / "settings.yaml")


def test_other_images(folders, said, tmp_path, monkeypatch):
    arguments = ["train", *folders, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        when(patch, 3, None, instead=KeyboardInterrupt)
        assert main(arguments) == 130
    for kind in ("images", "labels"):
        folder = tmp_path / "data/source" / kind
        shutil.copy(folder / "0.png", folder / "9.png")
    said()
    assert main([*arguments, "--resume"]) == 2
    mentions(said(), "error", "--resume", "images.source 4", "has 3")


@pytest.mark.slow
def test_settings_that_do_not_parse(out, run, capsys, whole):
    (out / "settings.yaml").write_bytes(b"steps: [\xff")
    assert run("--resume") == 0
    mentions(line_of(capsys, out / "settings.yaml"), "damaged")
    assert (out / "settings.yaml").read_text() == (whole / "settings.yaml").read_text()
    assert same_run(out, whole)


def test_a_refused_resume_leaves_the_folder_as_it_was(out, run, said):
    (out / "settings.yaml").write_bytes(b"steps: [\xff")
    labelled = (out / "labelled.txt").read_bytes()
    assert run("--resume", "--labelled", 1) == 2
    mentions(said(), "labelled 1", "has 2")
    assert (out / "settings.yaml").read_bytes() == b"steps: [\xff"
    assert (out / "labelled.txt").read_bytes() == labelled


def test_settings_that_do_not_parse_and_no_checkpoint(out, run, said):
    shutil.rmtree(out / "checkpoints")
    (out / "settings.yaml").write_text("- no\n- mapping\n")
    assert run("--resume") == 2
    mentions(said(), "error", out / "settings.yaml")


@pytest.mark.slow
def test_a_history_cut_in_a_line(out, run, capsys, whole):
    with (out / "history.jsonl").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.truncate()
        file.write(b"\xff\x00")
    assert run("--resume") == 0
    mentions(line_of(capsys, out / "history.jsonl"), "1 damaged")
    assert rows(out) == rows(whole)


@pytest.mark.parametrize(
    "damage", ["changed", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("cut", "zeros", "empty"))]
)
def test_a_damaged_checkpoint(damage, out, run, capsys, whole):
    newest = kept(out)[-1]
    data = newest.read_bytes()
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    newest.write_bytes({"cut": data[:-1], "changed": changed, "zeros": bytes(len(data)), "empty": b""}[damage])
    assert run("--resume") == 0
    mentions(line_of(capsys, newest), "damaged")
    # Out of the way of those that are kept.
    assert newest.with_suffix(".damaged").exists()
    assert state(out)["resumed_from"] == (2,)
    assert same_run(out, whole)


def test_every_checkpoint_damaged(out, run, said):
    for path in kept(out):
        path.write_bytes(b"")
    assert run("--resume") == 2
    mentions(said(), "error", out / "checkpoints", "2 damaged")
    assert len(kept(out)) == 2


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def test_a_checkpoint_that_holds_code(out, run, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints._save(kept(out)[-1], {"stateful": Code()})
    assert run("--resume") == 2
    mentions(said(), "error", kept(out)[-1], "code")
    assert main(["evaluate", "--out", str(out)]) == 2
    mentions(said(), "error", kept(out)[-1], "code")
    assert not (tmp_path / "code-ran").exists()


def test_a_checkpoint_of_another_network(out, run, said):
    contents = state(out)
    contents["stateful"]["segmenter"] = torch.nn.Linear(3, 2).state_dict()
    checkpoints._save(kept(out)[-1], contents)
    assert run("--resume") == 2
    mentions(said(), "error", "stem.0.weight", kept(out)[-1], [8, 3, 3, 3], "none")


@pytest.mark.slow
def test_the_weights_before_adaptation_damaged(out, run, said, whole):
    (out / checkpoints.BEFORE).write_bytes(b"")
    assert run("--resume") == 0
    mentions(said(), "no report", out / "checkpoints/before.pt", "damaged")
    assert (out / "metrics.json").exists()
    assert same_run(out, whole)


@pytest.mark.slow
def test_a_file_left_over(out, run):
    left = out / "checkpoints/.step-00000006.pt.tmp"
    left.write_bytes(b"half")
    assert run("--resume") == 0
    assert not left.exists()


@pytest.mark.slow
def test_nothing_to_resume(run, tmp_path):
    assert run("--resume", "--steps", 2) == 0
    assert state(tmp_path / "run")["resumed_from"] == ()


@pytest.mark.slow
def test_a_run_that_is_done(out, run, whole):
    assert run("--resume") == 0
    assert run("--resume") == 0
    assert same_run(out, whole)


# What it is given.


def test_settings_that_are_no_text(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_bytes(b"\xff\xfes\0t\0")
    for command in (["train", "--config", "given.yaml"], ["study", "given.yaml"]):
        assert main(command) == 2
        assert "given.yaml" in said()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", ("given.yaml", "parsing")),
        ("\x00", ("given.yaml", "#x0000")),
        ("steps: !!python/object/apply:os.mkdir [code-ran]", ("given.yaml", "os.mkdir")),
        ("speed: 9", ("given.yaml", "'speed'")),
        ("steps: many", ("given.yaml", "steps", "many")),
        ("data: {size: [8, 8]}", ("data.size", 32, [8, 8])),
        ("data: {scenes: {severity: {light: 7}}}", ("severity.light", "[0, 1]", 7.0)),
    ],
    ids=["cut", "binary", "code", "unknown", "type", "range", "range of the scenes"],
)
def test_settings_that_are_not_fit(text, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_text(text)
    assert main(["train", "--config", "given.yaml", "--out", "run"]) == 2
    mentions(said(), "error", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.yaml"]


@pytest.mark.parametrize("folder", ["../outside", "/etc", "source/../../outside"])
def test_a_path_out_of_the_data_root(folder, folders, said, tmp_path):
    settings = yaml.safe_load(Path(folders[1]).read_text())
    settings["data"]["test"]["images"] = folder
    Path(folders[1]).write_text(yaml.safe_dump(settings))
    assert main(["train", *folders, "--out", str(tmp_path / "run")]) == 2
    mentions(said(), "error", tmp_path / "data", folder)


def test_no_data_root(folders, said, tmp_path):
    assert main(["train", *folders[:2], "--data-root", "/none", "--out", str(tmp_path / "run")]) == 2
    mentions(said(), "error", "/none/source/images")


def test_an_image_without_a_mask(folders, said, tmp_path):
    (tmp_path / "data/source/labels/1.png").unlink()
    assert main(["train", *folders, "--out", str(tmp_path / "run")]) == 2
    mentions(said(), "error", "mask", tmp_path / "data/source/images/1.png")
    assert not (tmp_path / "run").exists()


def test_nothing_to_evaluate(out, said):
    shutil.rmtree(out / "checkpoints")
    assert main(["evaluate", "--out", str(out)]) == 2
    mentions(said(), "error", out / "checkpoints", "none")


def test_the_table_is_of_these_tests():
    """Each row of the table in docs/resuming.md names a test that exists, and there are at least thirty."""
    folder = Path(__file__).parent
    text = (folder.parents[1] / "docs/resuming.md").read_text()
    named = re.findall(r"^\|.*\| `(\w+)\.(\w+)` \|$", text, flags=re.MULTILINE)
    rows_of_faults = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    assert len(named) >= 30
    assert len(named) == len(rows_of_faults) - 1
    for file, name in named:
        assert f"def {name}(" in (folder / f"{file}.py").read_text(), name


assert TINY["save_every"] == 2  # which checkpoints there are, depends on it

"""Real faults of data, disks, processes and files: the error message, the exit status, and the files that are kept."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from examples.workbench.__main__ import main
from examples.workbench.training import checkpoints
from tests.errors import mentions
from tests.examples.workbench.tiny import checkpoint, history
from tests.reliability.tiny import at_step, children, kept, kill_group, kill_second_rank, same_run, steps, wait_until

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, config):
    """A run of six steps, stopped after four, with checkpoints of the second and the fourth."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, interrupt)
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
def out(stopped, tmp_path):
    """A copy of the run that was stopped, to be damaged and resumed."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


# During training.


def test_full_disk_at_a_checkpoint(run, last_line, tmp_path, monkeypatch):
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kept(out)[0].stat().st_size // 2, limits[1]))

    at_step(monkeypatch, 3, fill)
    try:
        assert run() == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    mentions(last_line(), "error", out / "checkpoints/step-00000004.pt", "File too large")
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name != "before.pt"] == ["step-00000002.pt"]
    assert checkpoint(out)["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["history.jsonl", ".metrics.json.tmp"])
def test_full_disk_at_another_file(name, out, run, last_line, whole, monkeypatch):
    def fill():
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        at_step(patch, 4, fill)
        assert run("--resume") == 3
    mentions(last_line(), "error", "No space left on device")
    (out / name).unlink(missing_ok=True)
    assert run("--resume") == 0
    assert same_run(out, whole)


@pytest.mark.parametrize("factor", [torch.nan, 1e38])
def test_a_loss_that_is_not_finite(factor, out, run, last_line, monkeypatch):
    load = checkpoints.load_checkpoint

    def load_and_poison(out, stateful, run):
        progress = load(out, stateful, run)
        next(iter(stateful["segmenter"].parameters())).data.mul_(factor)
        return progress

    monkeypatch.setattr(checkpoints, "load_checkpoint", load_and_poison)
    assert run("--resume") == 2
    line = last_line()
    mentions(line, "error", "loss", "step 4", "learning rate")
    assert re.search(r"\b(nan|inf)\b", line)
    assert checkpoint(out)["step"] == 4


def test_weights_that_overflow(run, last_line, tmp_path):
    """After a loss that was finite: a checkpoint of them would replace a good one."""
    sgd = ("--optimiser.name", "sgd", "--optimiser.learning_rate", "3e38", "--optimiser.weight_decay", 1000)
    assert run(*sgd, "--save_every", 1) == 2
    mentions(last_line(), "error", "finite", "segmenter", "step 0", "learning rate")
    assert kept(tmp_path / "run") == []


def truncate(data):
    for image in (data / "target/images").iterdir():
        image.write_bytes(image.read_bytes()[:60])


def replace_masks(data, size, value):
    for mask in (data / "target/labels").iterdir():
        Image.new("L", size, value).save(mask)


@pytest.mark.parametrize(
    ("spoil", "step", "workers", "words"),
    [
        (lambda data: (data / "source/labels/1.png").unlink(), None, 0, ("label file", "source/images/1.png")),
        (truncate, None, 0, ("target/images/",)),
        pytest.param(truncate, None, 1, ("target/images/",), marks=pytest.mark.slow),
        (lambda data: replace_masks(data, (48, 40), 9), None, 0, ("target/labels/", "[0, 3)", 255, 9)),
        (lambda data: replace_masks(data, (47, 40), 0), None, 0, ("target/labels/", "48 x 40", "47 x 40")),
        (lambda data: shutil.rmtree(data / "target/images"), 2, 0, ("target/images/", "No such file")),
    ],
    ids=["no mask", "truncated", "truncated, by a worker", "label out of range", "mask of another size", "deleted"],
)
def test_a_damaged_file_of_the_data(spoil, step, workers, words, folders, last_line, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if step is None:
        spoil(tmp_path / "data")
    else:
        at_step(monkeypatch, step, lambda: spoil(tmp_path / "data"))
    assert main(["train", *folders, "--out", str(out), "--data.workers", str(workers)]) == 2
    line = last_line()
    mentions(line, "error", *words)
    assert re.search(r"/\d\.png\b", line)
    assert step is None or checkpoint(out)["step"] == step


@pytest.mark.slow
def test_an_image_that_never_comes(folders, last_line, tmp_path):
    """A pipe without a writer behaves like a file on a file server that is down."""
    for image in (tmp_path / "data/source/images").iterdir():
        image.unlink()
        os.mkfifo(image)
    options = ["--data.workers", "1", "--data.timeout", "2"]
    assert main(["train", *folders, "--out", str(tmp_path / "run"), *options]) == 3
    mentions(last_line(), "error", "DataLoader", "2 seconds", "data.workers", "data.timeout")


@pytest.mark.slow
def test_a_worker_that_dies(start, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log.txt"
    process = start("--data.workers", 2, "--steps", 100000)
    wait_until(lambda: steps(out) > 4, process)
    os.kill(children(process.pid)[0], 9)
    process.join(600)
    assert process.exitcode == 3
    error = log.read_text()
    assert "Traceback" not in error
    assert re.search(r"DataLoader worker .*(killed by signal: Killed|exited unexpectedly).*data.workers", error)
    assert checkpoint(out)["step"] >= 4


@pytest.mark.slow
def test_no_memory(start, tmp_path):
    process = start("--data.size", "[32768, 32768]", "--data.scenes.source", 1, memory=2**29)
    process.join(600)
    error = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 3, error
    assert "Traceback" not in error
    mentions(error.splitlines()[-1], "error", "out of memory", "fewer or smaller images")


@pytest.mark.slow
def test_two_processes_on_one_run(start, tmp_path):
    out = tmp_path / "run"
    first = start("--steps", 100000)
    wait_until(lambda: checkpoints.has_checkpoint(out), first)
    second = start("--steps", 100000, "--resume", log=tmp_path / "second.txt")
    second.join(600)
    assert second.exitcode == 3
    mentions((tmp_path / "second.txt").read_text(), "error", "one process", out)
    before = steps(out)
    wait_until(lambda: steps(out) > before, first)
    # However the first ends, the next may begin.
    first.kill()
    first.join()
    third = start("--steps", 100000, "--resume", log=tmp_path / "third.txt")
    before = steps(out)
    wait_until(lambda: steps(out) > before, third)


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
                    kill_second_rank(agent, 9, out)
                assert agent.wait(300) == 0, (tmp_path / "log.txt").read_text()
            finally:
                kill_group(agent)
    (at,) = checkpoint(out)["resumed_from"]
    assert at >= 8
    assert at % 4 == 0
    assert same_run(out, tmp_path / "whole")
    log = (tmp_path / "log.txt").read_text()
    assert "error: communication with another rank failed: " in log
    assert "Traceback" not in log


# At the start of a run, or when it resumes.


def edit_settings(out, **changes):
    written = yaml.safe_load((out / "settings.yaml").read_text()) | changes
    (out / "settings.yaml").write_text(yaml.safe_dump({k: v for k, v in written.items() if v is not None}))


def unreadable_settings(out):
    shutil.rmtree(out / "checkpoints")
    (out / "settings.yaml").write_text("- no\n- mapping\n")


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def other_network(out):
    contents = checkpoint(out)
    contents["stateful"]["segmenter"] = torch.nn.Linear(3, 2).state_dict()
    checkpoints._save(out / NEWEST, contents)


NEWEST = "checkpoints/step-00000004.pt"
REFUSED = {
    "a run without --resume": (lambda out: None, [], ("--out", "--resume")),
    "a file": (lambda out: shutil.rmtree(out) or out.touch(), [], ("--out", "file")),
    "other settings": (lambda out: None, ["--resume", "--labelled", 3], ("labelled 3", "settings.yaml", 2)),
    # The copy for people may have been edited, too.
    "edited": (lambda out: edit_settings(out, labelled=3), ["--resume", "--labelled", 3], ("labelled 3", NEWEST, 2)),
    "another version": (lambda out: edit_settings(out, precision=None), ["--resume"], ("precision", "settings.yaml")),
    "unreadable settings": (unreadable_settings, ["--resume"], ("settings.yaml",)),
    "all damaged": (lambda out: [path.write_bytes(b"") for path in kept(out)], ["--resume"], ("2 damaged",)),
    "code": (lambda out: checkpoints._save(out / NEWEST, {"stateful": Code()}), ["--resume"], (NEWEST, "code")),
    "another network": (other_network, ["--resume"], (NEWEST, "stem.0.weight", [8, 3, 3, 3], "none")),
}


@pytest.mark.parametrize(("damage", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_run_folder_that_is_refused(damage, options, words, out, run, last_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.suffix in (".pt", ".txt", ".yaml")}
    assert run(*options) == 2
    mentions(last_line(), "error", out, *words)
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, so that the folder is somebody else's")
def test_a_folder_that_cannot_be_written(out, run, last_line, config):
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
    mentions(last_line(), "error", "--out", out, "Permission denied")


def test_other_images(folders, last_line, tmp_path, monkeypatch):
    arguments = ["train", *folders, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        assert main(arguments) == 130
    for kind in ("images", "labels"):
        folder = tmp_path / "data/source" / kind
        shutil.copy(folder / "0.png", folder / "9.png")
    last_line()
    assert main([*arguments, "--resume"]) == 2
    mentions(last_line(), "error", "--resume", "images.source 4", "has 3")


def flip(out):
    content = bytearray((out / NEWEST).read_bytes())
    content[len(content) // 2] ^= 4
    (out / NEWEST).write_bytes(content)


def cut_history(out):
    with (out / "history.jsonl").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.truncate()
        file.write(b"\xff\x00")


SURVIVED = {
    "flipped": (flip, (NEWEST, "damaged")),
    "truncated": (lambda out: os.truncate(out / NEWEST, (out / NEWEST).stat().st_size - 1), (NEWEST, "damaged")),
    "zeros": (lambda out: (out / NEWEST).write_bytes(bytes(9999)), (NEWEST, "damaged")),
    "settings": (lambda out: (out / "settings.yaml").write_bytes(b"steps: [\xff"), ("settings.yaml", "damaged")),
    "history": (cut_history, ("history.jsonl", "1 damaged")),
    "before": (lambda out: (out / checkpoints.BEFORE).write_bytes(b""), ("no report", "before.pt")),
    "left over": (lambda out: (out / "checkpoints/.step-00000005.pt.tmp").write_bytes(b"half"), ("ass",)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "words"), SURVIVED.values(), ids=SURVIVED)
def test_damage_that_a_run_survives(damage, words, out, run, capsys, whole):
    damage(out)
    assert run("--resume") == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    mentions(next(line for line in lines if words[0] in line), *words[1:])
    assert same_run(out, whole)
    assert history(out) == history(whole)
    assert (out / "settings.yaml").read_text() == (whole / "settings.yaml").read_text()
    assert not list((out / "checkpoints").glob(".*.tmp"))
    if NEWEST in words:
        # Out of the way of those that are kept, but not deleted.
        assert (out / NEWEST).with_suffix(".damaged").exists()
        assert checkpoint(out)["resumed_from"] == (2,)
    # A finished run resumes too.
    assert run("--resume") == 0
    assert same_run(out, whole)


def test_nothing_to_resume(run, tmp_path):
    assert run("--resume", "--steps", 2) == 0
    assert checkpoint(tmp_path / "run")["resumed_from"] == ()


# Input from the user.


UNUSABLE = {
    "truncated": b"steps: [",
    "no text": b"\xff\xfes\0t\0",
    "code": b"steps: !!python/object/apply:os.mkdir [code-ran]",
    "unknown": b"speed: 9",
}


@pytest.mark.parametrize("text", UNUSABLE.values(), ids=UNUSABLE)
def test_settings_that_cannot_be_used(text, last_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_bytes(text)
    assert main(["train", "--config", "given.yaml", "--out", "run"]) == 2
    mentions(last_line(), "error")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.yaml"]


@pytest.mark.parametrize("folder", ["../outside", "/etc", "source/../../outside", "none"])
def test_a_folder_outside_the_data_root_or_missing(folder, folders, last_line, tmp_path):
    settings = yaml.safe_load(Path(folders[1]).read_text())
    settings["data"]["test"]["images"] = folder
    Path(folders[1]).write_text(yaml.safe_dump(settings))
    assert main(["train", *folders, "--out", str(tmp_path / "run")]) == 2
    mentions(last_line(), "error", tmp_path / "data", folder)


def test_nothing_to_evaluate(out, last_line):
    shutil.rmtree(out / "checkpoints")
    assert main(["evaluate", "--out", str(out)]) == 2
    mentions(last_line(), "error", out / "checkpoints", "none")

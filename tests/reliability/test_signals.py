"""Signals: the step is finished and a checkpoint written before a run obeys; each has a status of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from examples.workbench.training import checkpoints, run_folder as runs, signals
from examples.workbench.training import train as train_module
from tests.errors import mentions
from tests.reliability.tiny import end_all, kill_the_second_rank, rows, same_run, state, steps

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def signal_at(step, signum, monkeypatch):
    """Let the signal arrive while the step is under way."""
    append = run_folder.append_history

    def arrives(out, row):
        append(out, row)
        if row["step"] == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(runs, "append_history", arrives)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_to_stop_finishes_the_step_and_writes(signum, status, run, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)]
    with monkeypatch.context() as patch:
        signal_at(2, signum, patch)
        assert run("--save_every", 100) == status
    out = tmp_path / "run"
    assert state(out)["step"] == 3
    name = signal.Signals(signum).name
    mentions(capsys.readouterr().err.splitlines()[-1], name, out, "step 3", "--resume")
    assert [
        signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)
    ] == before


@pytest.mark.slow
def test_stopped_and_resumed_is_uninterrupted(run, tmp_path, monkeypatch):
    assert run(out=tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        signal_at(2, signal.SIGTERM, patch)
        assert run() == 143
    assert run("--resume") == 0
    assert same_run(tmp_path / "run", tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed_from"] == [3]


@pytest.mark.slow
def test_sent_to_one_rank_all_stop_after_the_same_step(config, tmp_path):
    """Not to the first, which writes. torchrun has a status of its own."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["examples.workbench", "train", "--config", str(config), "--out", str(out)]
    command += ["--steps", "100000", "--save_every", "100000"]
    with (tmp_path / "log.txt").open("w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            kill_the_second_rank(agent, signal.SIGTERM, out)
            assert agent.wait(300) == 1
        finally:
            end_all(agent)
    last = run_folder.read_history(out)[-1]["step"] + 1
    assert state(out)["step"] == last
    log = (tmp_path / "log.txt").read_text()
    assert f"stopped by SIGTERM: {out} has a checkpoint of step {last}, --resume goes on from it" in log
    # torchrun's own, of the status.
    assert log.count("Traceback") == log.count("ChildFailedError:") == 1


def test_usr1_writes_and_goes_on(run, tmp_path, monkeypatch):
    written = []
    save = checkpoints.save_checkpoint

    def noted(out, progress, *arguments):
        written.append(progress.step)
        save(out, progress, *arguments)

    monkeypatch.setattr(checkpoints, "save_checkpoint", noted)
    signal_at(1, signal.SIGUSR1, monkeypatch)
    assert run("--steps", 4, "--save_every", 100) == 0
    assert written == [2, 4]


@pytest.mark.parametrize("at", ["a step", "a checkpoint"])
def test_the_second_stops_at_once(at, run, tmp_path, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    append, flush = run_folder.append_history, checkpoints._flush

    def append_and_stop(out, row):
        append(out, row)
        if row["step"] == 3:
            twice()

    def stop_and_flush(path):
        if "00000004" in path.name:
            twice()
        flush(path)

    if at == "a step":
        monkeypatch.setattr(runs, "append_history", append_and_stop)
    else:
        monkeypatch.setattr(checkpoints, "_flush", stop_and_flush)
    assert run() == 130
    mentions(capsys.readouterr().err.splitlines()[-1].split("\r")[-1], "SIGINT", "--resume")
    assert state(tmp_path / "run")["step"] == 2


def test_before_and_after_the_steps_a_signal_stops_at_once(run, tmp_path, monkeypatch):
    from examples.workbench.training import train as train_module

    evaluate = train_module.evaluate

    def arrives(*arguments, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", arrives)
        assert run("--steps", 2) == 143
    assert state(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "metrics.json").exists()
    # A run whose steps are done goes on with what comes after them.
    assert run("--steps", 2, "--resume") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed_from"] == [2]


def test_signals_that_come_between_two_looks_are_not_lost():
    with signals.defer_signals() as pending:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.agree_on_signals(pending, "cpu") == (True, 0)
        assert signals.agree_on_signals(pending, "cpu") == (False, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agree_on_signals(pending, "cpu") == (True, signal.SIGTERM)


@pytest.mark.slow
def test_sent_to_all_processes_of_a_run_it_still_writes(start, tmp_path):
    """As a scheduler does it: the processes that load images get it too, and end."""
    out = tmp_path / "run"
    process = start("--data.workers", 2, "--steps", 2000, "--save_every", 5000)
    process.until(lambda: steps(out) > 3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 143, process.log.read_text()
    assert state(out)["step"] == steps(out)
    assert "Traceback" not in process.log.read_text()


@pytest.mark.parametrize("error", [ConnectionResetError, RuntimeError])
def test_those_that_load_images_may_be_gone_first(run, tmp_path, monkeypatch, capsys, error):
    batches = train_module.batches

    def broken(*arguments, **named):
        for step, batch in load_batches(*arguments, **named):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                raise error
            yield step, batch

    monkeypatch.setattr(train_module, "batches", broken)
    assert run("--save_every", 100) == 143
    assert state(tmp_path / "run")["step"] == 3
    mentions(capsys.readouterr().err.splitlines()[-1], "SIGTERM")


@pytest.mark.slow
def test_the_command_line_ends_with_these_statuses(config, tmp_path):
    """A process from the shell, once."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "examples.workbench", "train", "--config", str(config), "--out", str(out)]
    with subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True) as process:
        while steps(out) < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        while not checkpoints.has_checkpoint(out):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate()
    assert process.returncode == 143
    assert "Traceback" not in printed
    done = subprocess.run([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    mentions(done.stderr, "error", "--out", "--resume", out)

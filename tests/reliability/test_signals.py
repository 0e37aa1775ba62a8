"""Signals: a run finishes its step and writes a checkpoint before it stops; each signal has its own exit status."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from examples.workbench.training import checkpoints, run_folder, signals
from examples.workbench.training import train as train_module
from tests.errors import mentions
from tests.examples.workbench.tiny import checkpoint, history
from tests.reliability.tiny import at_step, kill_group, kill_second_rank, same_run, steps, wait_until

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)


def send(*signums):
    for signum in signums:
        os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stop_signal_finishes_the_step_and_the_run_resumes(signum, status, run, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(handled) for handled in HANDLED]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: send(signum))
        assert run("--save_every", 100) == status
    assert checkpoint(out)["step"] == 3
    mentions(capsys.readouterr().err.splitlines()[-1], signal.Signals(signum).name, out, "step 3", "--resume")
    assert [signal.getsignal(handled) for handled in HANDLED] == before
    assert run("--resume") == run(out=tmp_path / "whole") == 0
    assert same_run(out, tmp_path / "whole")
    assert history(out) == history(tmp_path / "whole")
    assert json.loads((out / "metrics.json").read_text())["resumed_from"] == [3]


@pytest.mark.parametrize(("signum", "again"), [(signal.SIGINT, "Ctrl-C again"), (signal.SIGTERM, "SIGTERM again")])
def test_a_stop_signal_is_answered_at_once(signum, again, capfd):
    with signals.defer_signals():
        send(signal.SIGUSR1)
        assert capfd.readouterr().err == ""
        send(signum)
        mentions(capfd.readouterr().err.rstrip("\n"), "this step", again, "now")


def test_other_ranks_and_loading_processes_do_not_answer(capfd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        with signals.defer_signals() as pending:
            send(signal.SIGINT)
            assert pending == [signal.SIGINT]
    with signals.defer_signals():
        child = multiprocessing.get_context("fork").Process(target=send, args=(signal.SIGINT,))
        child.start()
        child.join()
    assert child.exitcode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore")
def test_no_message_names_a_checkpoint_that_is_not_there(run, tmp_path, monkeypatch, capsys):
    """Neither while images are listed nor before the first checkpoint; nor outside of training."""
    for where in ("open_images", "build_learners", "load_batches"):
        with monkeypatch.context() as patch:
            patch.setattr(train_module, where, lambda *a, **o: send(signal.SIGINT, signal.SIGINT))
            assert run("--resume") == 130
        line = capsys.readouterr().err.splitlines()[-1]
        mentions(line, "SIGINT", tmp_path / "run", "no checkpoint")
    with signals.stop_at_once(), pytest.raises(signals.Stopped) as stop:
        send(signal.SIGTERM)
    assert "checkpoint" not in str(stop.value)


def test_the_second_stops_while_the_last_checkpoint_is_written(run, tmp_path, monkeypatch):
    """The first has been read by then."""
    save = checkpoints.save_checkpoint

    def stop_and_save(*arguments):
        send(signal.SIGINT)
        save(*arguments)

    at_step(monkeypatch, 2, lambda: send(signal.SIGINT))
    monkeypatch.setattr(checkpoints, "save_checkpoint", stop_and_save)
    assert run("--save_every", 100) == 130
    assert not checkpoints.has_checkpoint(tmp_path / "run")


def test_usr1_writes_a_checkpoint_and_the_run_continues(run, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: send(signal.SIGUSR1))
    assert run("--steps", 4, "--save_every", 100) == 0
    assert [path.name[5:13] for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))] == [
        "00000002",
        "00000004",
    ]


@pytest.mark.parametrize("at", ["a step", "a checkpoint"])
def test_the_second_stops_at_once(at, run, tmp_path, monkeypatch, capsys):
    if at == "a step":
        at_step(monkeypatch, 3, lambda: send(signal.SIGINT, signal.SIGINT))
    else:
        fsync = os.fsync

        def stop_and_flush(descriptor):
            if "00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
                send(signal.SIGINT, signal.SIGINT)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", stop_and_flush)
    assert run() == 130
    mentions(capsys.readouterr().err.splitlines()[-1].split("\r")[-1], "SIGINT", "--resume")
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_after_the_steps_a_signal_stops_at_once(run, tmp_path, monkeypatch):
    evaluate = train_module.evaluate

    def send_and_evaluate(*arguments, **options):
        send(signal.SIGUSR1, signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", send_and_evaluate)
        assert run("--steps", 2) == 143
    assert checkpoint(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert run("--steps", 2, "--resume") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed_from"] == [2]


def test_each_signal_is_read_once():
    with signals.defer_signals() as pending:
        send(signal.SIGUSR1)
        assert signals.agree_on_signals(pending, "cpu") == (True, 0)
        assert signals.agree_on_signals(pending, "cpu") == (False, 0)
        send(signal.SIGUSR1, signal.SIGTERM)
        assert signals.agree_on_signals(pending, "cpu") == (True, signal.SIGTERM)


def test_a_stop_signal_and_the_end_of_a_loading_process_may_come_together(monkeypatch):
    """Python reports a signal that it has noted, but whose handler it then finds to be the default one."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    both = {signal.SIGTERM, signal.SIGCHLD}
    before = signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    try:
        with signals.defer_signals() as pending:
            signal.pthread_sigmask(signal.SIG_BLOCK, both)
            send(*both)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
            assert pending == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not reported


@pytest.mark.parametrize("error", [ConnectionResetError, RuntimeError])
def test_loading_processes_may_end_before_the_run_gets_the_signal(error):
    def broken():
        yield 1
        raise error

    assert list(signals.load_until_stopped(broken(), [signal.SIGTERM])) == [1]
    with pytest.raises(error):
        list(signals.load_until_stopped(broken(), [signal.SIGUSR1]))


def test_sent_to_all_processes_of_a_run_it_still_writes(run, tmp_path, monkeypatch, capsys):
    """Schedulers send it to the processes that load images too, which end in the middle of the step."""

    def send_to_all():
        send(signal.SIGTERM)
        loaders = multiprocessing.active_children()
        assert loaders
        for process in loaders:
            process.kill()
        # PyTorch's handler of their end would break off the step here.
        time.sleep(0.5)

    at_step(monkeypatch, 2, send_to_all)
    assert run("--data.workers", 2, "--steps", 100, "--save_every", 100) == 143
    assert checkpoint(tmp_path / "run")["step"] == 3
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_sent_to_one_rank_all_stop_after_the_same_step(config, tmp_path):
    """Not to the first rank, which writes the files. torchrun has its own exit status."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["examples.workbench", "train", "--config", str(config), "--out", str(out)]
    command += ["--steps", "100000", "--save_every", "100000"]
    with (tmp_path / "log.txt").open("w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            kill_second_rank(agent, signal.SIGTERM, out)
            assert agent.wait(300) == 1
        finally:
            kill_group(agent)
    last = run_folder.read_history(out)[-1]["step"] + 1
    assert checkpoint(out)["step"] == last
    log = (tmp_path / "log.txt").read_text()
    assert f"{out} has a checkpoint of step {last}" in log
    # torchrun's own, of the status.
    assert log.count("Traceback") == log.count("ChildFailedError:") == 1


@pytest.mark.slow
def test_statuses_of_the_command_line(config, tmp_path):
    """A process from the shell, once."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "examples.workbench", "train", "--config", str(config), "--out", str(out)]
    command += ["--steps", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: steps(out) >= 2, process)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: checkpoints.has_checkpoint(out), process)
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate()
    assert process.returncode == 143
    assert "Traceback" not in printed
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    mentions(done.stderr, "error", "--out", "--resume", out)

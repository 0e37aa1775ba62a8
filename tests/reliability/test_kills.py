"""Twenty kills at random moments, some of them while a checkpoint is written."""

import json
import random
import time

import pytest

from tests.examples.workbench.tiny import checkpoint
from tests.reliability.tiny import same_run, steps, wait_until

KILLS = 20
# Every step writes a checkpoint, so that about half of the time one is being written; so many steps that twenty pauses
# do not reach the last of them on a fast machine.
OPTIONS = ("--steps", 500, "--save_every", 1, "--optimiser.batch_size", 1, "--optimiser.unlabelled_batch_size", 1)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_is_uninterrupted(start, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    process = start(*OPTIONS, out=whole, log=tmp_path / "whole.txt")
    process.join(600)
    assert process.exitcode == 0
    draw = random.Random(0)
    unfinished, seen = 0, []
    for kill in range(KILLS):
        resume = ["--resume"] if kill else []
        process = start(*OPTIONS, *resume, "--data.workers", kill % 2, log=tmp_path / f"{kill}.txt")
        # Some steps on, and then at any moment; each third time, the moment that a checkpoint is half written.
        target = (seen[-1] if seen else 0) + draw.randint(2, 5)
        wait_until(lambda target=target: steps(out) >= target, process)
        if kill % 3 == 0:
            wait_until(lambda: list((out / "checkpoints").glob(".*.tmp")), process)
        else:
            time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -9, (tmp_path / f"{kill}.txt").read_text()
        unfinished += bool(list((out / "checkpoints").glob(".*.tmp")))
        seen.append(checkpoint(out)["step"])
    process = start(*OPTIONS, "--resume")
    process.join(600)
    assert process.exitcode == 0
    resumed = json.loads((out / "metrics.json").read_text())["resumed_from"]
    print(f"killed after checkpoints {seen}, {unfinished} of the kills while one was written; resumed from {resumed}")
    assert resumed[-1] == seen[-1]
    assert set(resumed) <= set(seen)
    # How often a kill comes before the file has its name depends on the machine.
    assert unfinished > 0
    assert same_run(out, whole)

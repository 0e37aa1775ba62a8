"""Twenty kills without warning, at random moments, while a checkpoint is being written among them."""

import json
import random
import time

import pytest

from tests.reliability.tiny import same_run, state, steps

KILLS = 20
# Every step writes a checkpoint, so that about half of the time one is being written; so many steps that twenty pauses
# do not reach the last of them on a fast machine.
OPTIONS = ("--steps", 500, "--save_every", 1, "--optimiser.images", 1, "--optimiser.unlabelled", 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ass"])
def test_killed_twenty_times_and_resumed_is_uninterrupted(method, start, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert start("--method", method, *OPTIONS, out=whole, log=tmp_path / "whole.txt").wait() == 0
    draw = random.Random(0)
    writing, seen, workers = 0, [], 0
    for kill in range(KILLS):
        resume = ["--resume"] if kill else []
        process = start("--method", method, *OPTIONS, *resume, "--data.workers", workers, log=tmp_path / f"{kill}.txt")
        begun = state(out)["step"] if kill else 0
        # Some steps on, and then at any moment; each third time, the moment that a checkpoint is half written.
        target = begun + draw.randint(2, 5)
        process.until(lambda target=target: steps(out) >= target)
        if kill % 3 == 0:
            process.until(lambda: list((out / "checkpoints").glob(".*.tmp")))
        else:
            time.sleep(draw.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -9, (tmp_path / f"{kill}.txt").read_text()
        writing += bool(list((out / "checkpoints").glob(".*.tmp")))
        seen.append(state(out)["step"])
        workers = 1 - workers
    assert start("--method", method, *OPTIONS, "--resume").wait() == 0
    resumed = json.loads((out / "metrics.json").read_text())["resumed_from"]
    print(f"killed after a checkpoint of {seen}, {writing} of them within writing one; resumed from {resumed}")
    assert len(seen) == KILLS
    assert min(resumed) > 0
    assert resumed[-1] == seen[-1]
    assert set(resumed) <= set(seen)
    # How often a kill comes before the file has its name depends on the machine.
    assert writing > 0
    assert same_run(out, whole)

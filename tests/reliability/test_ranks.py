"""Two ranks train as one process does, whatever the images of one rank lack."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from examples.workbench.__main__ import main
from examples.workbench.data.loading import TrainingSet
from examples.workbench.data_settings import Data, SceneSettings
from examples.workbench.errors import InputError
from examples.workbench.networks.build import build_segmenter
from examples.workbench.settings import (
    GlobalSettings,
    NetworkSettings,
    OptimiserSettings,
    SelfTraining,
    SemanticSettings,
    Settings,
)
from examples.workbench.training import step as step_module
from examples.workbench.training.learners import build_learners
from examples.workbench.training.ranks import launch_fabric, run_on_first_rank, synchronise_batch_norm
from examples.workbench.training.train import train
from tests.errors import mentions, refuses
from tests.examples.workbench.tiny import checkpoint, history
from tests.reliability.tiny import same_run

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
WORLD, IMAGES, SIZE = 2, 4, (32, 48)
PIXELS = IMAGES * SIZE[0] * SIZE[1]
EPS = torch.finfo(torch.float64).eps
SETTINGS = Settings(
    method="ass-plus",
    precision="64-true",
    steps=6,
    labelled=4,
    log_every=1,
    save_every=3,
    data=Data(size=SIZE, scenes=SceneSettings(source=7, target=6, validation=2, test=3)),
    network=NetworkSettings(width=8),
    optimiser=OptimiserSettings(batch_size=IMAGES, unlabelled_batch_size=IMAGES),
    self_training=SelfTraining(start=0.0, threshold=0.2, strong=0.5, contrast_weight=0.5),
)


def spawn(work, folder):
    """Run `work(rank, folder)` as two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work_as_rank, (work, port, str(folder)), nprocs=WORLD)


def work_as_rank(rank, work, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    work(rank, Path(folder))
    dist.destroy_process_group()


# One step, whose losses are those of the whole batch.


def batch(case):
    """A step's images and labels; the second half is the second rank's."""
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for domain, shift in (("source", 0.0), ("labelled", 0.5), ("unlabelled", 0.5)):
        images = torch.randn(IMAGES, 3, *SIZE, generator=generator, dtype=torch.float64) + shift
        labels = torch.randint(0, 5, (IMAGES, SIZE[0] // 8, SIZE[1] // 8), generator=generator)
        labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
        parts[domain] = {"image": images, "label": labels}
    parts["unlabelled"]["inside"] = parts["unlabelled"].pop("label") != 255
    first, second = slice(IMAGES // 2), slice(IMAGES // 2, None)
    source, labelled = parts["source"]["label"], parts["labelled"]["label"]
    if case == "a class on one rank":
        labelled[second][labelled[second] == 2] = 3
        source[first][source[first] == 2] = 3
    elif case == "no labelled pixel on a rank":
        labelled[second] = 255
    elif case == "no labelled pixel at all":
        source[:] = labelled[:] = 255
    return parts


CASES = ["plain", "a class on one rank", "no labelled pixel on a rank", "no labelled pixel at all"]
VARIANTS = {
    "per image": {
        "semantic_alignment": SemanticSettings(r1=0.5),
        "global_alignment": GlobalSettings(r1=0.5, against="both"),
    },
    "per batch": {
        "semantic_alignment": SemanticSettings(per_image=False, r1=0.5),
        "global_alignment": GlobalSettings(inputs="balanced"),
    },
    "class and domain": {
        "semantic_alignment": SemanticSettings(per_image=False, conditioning="class-and-domain"),
        "global_alignment": GlobalSettings(inputs="entropy", r1=0.5),
    },
}


def one_step(case, variant, fabric):
    """The row and the gradients of a step, from a rank's share of the images."""
    settings = dataclasses.replace(SETTINGS, **VARIANTS[variant])
    rank, ranks = fabric.global_rank, fabric.world_size
    mine = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    parts = {name: {key: value[mine] for key, value in part.items()} for name, part in batch(case).items()}
    learners = build_learners(settings, build_segmenter(settings).double())
    row = step_module.learn(5, parts, learners, settings, fabric, log=True)
    networks = {"segmenter": learners.segmenter, **learners.alignments}
    gradients = {
        f"{module}.{name}": parameter.grad
        for module, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    return {"row": row, "gradients": gradients, "counts": learners.class_counts.counts}


def all_steps(rank, folder):
    fabric = launch_fabric(SETTINGS)
    torch.save([one_step(*key, fabric) for key in STEPS], folder / f"{rank}.pt")


STEPS = [(case, variant) for case in CASES for variant in VARIANTS]


@pytest.fixture(scope="module")
def steps_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(all_steps, folder)
    return [dict(zip(STEPS, torch.load(folder / f"{rank}.pt", weights_only=True))) for rank in range(WORLD)]


def assert_close(found, expected, layers):
    """Within what rounding can do: each layer sums at most the pixels of the batch, of the largest magnitude."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = torch.as_tensor(value, dtype=torch.float64)
        # Shares such as an accuracy are float32, and NaN where there is nothing to count.
        eps = torch.finfo(torch.float32).eps if name.startswith("accuracy/") else layers * PIXELS * EPS
        bound = eps * max(value.nan_to_num().abs().max().item(), 1e-3)
        torch.testing.assert_close(
            torch.as_tensor(found[name], dtype=torch.float64),
            value,
            rtol=0,
            atol=bound,
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_two_ranks_is_that_of_one(case, variant, steps_of_ranks):
    whole = one_step(case, variant, launch_fabric(SETTINGS))
    for steps in steps_of_ranks:
        found = steps[case, variant]
        assert torch.equal(found["counts"], whole["counts"])
        for prefix, layers in (("loss/", 1), ("", 20)):
            ours, theirs = (
                {name: value for name, value in of["row"].items() if name.startswith(prefix)} for of in (found, whole)
            )
            assert_close(ours, theirs, layers)
        assert_close(found["gradients"], whole["gradients"], layers=20)
        assert all(torch.tensor(v).isfinite() for n, v in found["row"].items() if not n.startswith("accuracy/"))
        if case == "no labelled pixel at all":
            assert found["row"]["loss/segmentation"] == 0


# Whole runs.


def histories_agree(a, b, rtol):
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for x, y in zip(a, b):
        for name in x:
            # Accuracies are float32.
            rel = max(rtol, torch.finfo(torch.float32).eps if name.startswith("accuracy/") else 0)
            assert y[name] == pytest.approx(x[name], rel=rel, abs=1e-12, nan_ok=True), name


@pytest.mark.slow
def test_torchrun_equals_one_process(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=30, save_every=30)
    alone = train(settings, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command += ["-m", "examples.workbench", "train", "--config", str(tmp_path / "one" / "settings.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two"), "--save-predictions"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in history(tmp_path / "two")] == list(range(30))
    histories_agree(history(tmp_path / "one"), history(tmp_path / "two"), rtol=1e-5)
    # The first rank alone writes and prints.
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1
    assert done.stdout.count("mean over all classes") == 1
    assert len(list((tmp_path / "two" / "predictions").glob("*.png"))) == settings.data.scenes.test
    assert f"{100 * alone['miou']:6.1f}" in done.stdout


class StopError(Exception):
    """Raised by the test to end a run."""


def recorded_run(out, *, stop_at=None, resume=False):
    """Train, perhaps up to a step; every key that the training set was asked for."""
    keys = []
    get, seed_step = TrainingSet.__getitem__, step_module.seed_step

    def recorded(self, key):
        keys.append(key)
        return get(self, key)

    def stopping(seed, step, rank):
        if step == stop_at:
            raise StopError
        seed_step(seed, step, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSet, "__getitem__", recorded)
        patch.setattr(step_module, "seed_step", stopping)
        try:
            train(SETTINGS, out, resume=resume)
        except StopError:
            assert stop_at is not None
    return keys


def run_ranks(rank, folder):
    found = {
        "one then two": recorded_run(folder / "one then two", resume=True),
        "two then one": recorded_run(folder / "two then one", stop_at=4),
        "two": recorded_run(folder / "two"),
    }
    recorded_run(folder / "two then two", stop_at=4)
    recorded_run(folder / "two then two", resume=True)
    with refuses(InputError, "--out", "--resume", folder / "two"):
        train(SETTINGS, folder / "two")
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(tmp_path):
    whole = recorded_run(tmp_path / "one")
    before = recorded_run(tmp_path / "one then two", stop_at=4)
    spawn(run_ranks, tmp_path)
    after = recorded_run(tmp_path / "two then one", resume=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]

    def counted(*parts, last=SETTINGS.steps):
        return sorted(key for part in parts for key in part if key[0] < last)

    # What was loaded ahead of the stop is loaded again.
    assert counted(before, last=3) + counted(*(found["one then two"] for found in ranks)) == counted(whole)
    assert counted(*(found["two then one"] for found in ranks), last=3) + counted(after) == counted(whole)
    assert counted(*(found["two"] for found in ranks)) == counted(whole)
    assert len(set(whole)) == len(whole) == SETTINGS.steps * 3 * IMAGES
    assert checkpoint(tmp_path / "two then two")["resumed_from"] == (3,)
    assert same_run(tmp_path / "two", tmp_path / "two then two")
    for name in ("one then two", "two then one", "two"):
        histories_agree(history(tmp_path / "one"), history(tmp_path / name), rtol=1e-9)
        ours, theirs = (checkpoint(tmp_path / run)["stateful"] for run in (name, "one"))
        for part in ("segmenter", "teacher", "global alignment", "semantic alignment"):
            torch.testing.assert_close(dict(ours[part]), dict(theirs[part]), rtol=1e-9, atol=1e-12)


# The share of each rank, and settings that several ranks refuse.


def test_one_process_is_the_first_rank():
    def refuse():
        raise InputError("refused")

    fabric = launch_fabric(SETTINGS)
    assert (fabric.global_rank, fabric.world_size, fabric.is_global_zero) == (0, 1, True)
    with refuses(InputError, "refused"):
        run_on_first_rank(fabric, refuse)


class SeveralRanks:
    world_size, device = 2, torch.device("cpu")


def test_batch_norm_that_learns_is_refused_on_the_cpu():
    with refuses(InputError, "batch norm", "network.frozen_batch_norm", "cpu"):
        synchronise_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(4)), SeveralRanks)
    synchronise_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(4).eval(), torch.nn.GroupNorm(2, 4)), SeveralRanks)


@pytest.mark.parametrize("command", ["evaluate", "study"])
def test_only_train_runs_on_several_ranks(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    mentions(capsys.readouterr().err, "error", "train", "ranks", command)

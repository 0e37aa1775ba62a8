"""The trainer on two ranks: what one process does with the same settings, whatever a rank's share of a step lacks."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

import semshift
from examples.workbench.training import step as step_module
from examples.workbench.training import train as train_module
from examples.workbench.__main__ import main
from examples.workbench.networks.build import build_segmenter
from examples.workbench.training.learners import build_discriminator
from examples.workbench.data.loading import TrainingSet
from examples.workbench.errors import InputError
from examples.workbench.training.ranks import run_on_first_rank, norm_over_ranks, share, start, synchronise_batch_norm
from examples.workbench.training.self_training import soft_weights, taught, taught_cross_entropy
from examples.workbench.settings import Data, NetworkSettings, OptimiserSettings, SceneSettings, SelfTraining, SemanticSettings, Settings
from examples.workbench.training.views import count_pixels, global_view, gradient_penalty, semantic_view, supervised_loss
from tests.errors import mentions, refuses
from tests.reliability.tiny import rows, same_run, state

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
WORLD, IMAGES, SIZE = 2, 4, (32, 48)
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
    optimiser=OptimiserSettings(images=IMAGES, unlabelled=IMAGES),
    self_training=SelfTraining(start=0.0, threshold=0.2),
)


# --- One step's losses, whose denominators are of all ranks.


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
    second = slice(IMAGES // 2, None)
    if case == "a class on one rank":
        parts["labelled"]["label"][second][parts["labelled"]["label"][second] == 2] = 3
        parts["source"]["label"][: IMAGES // 2][parts["source"]["label"][: IMAGES // 2] == 2] = 3
    elif case == "no labelled pixel on a rank":
        parts["labelled"]["label"][second] = 255
    elif case == "no labelled pixel at all":
        parts["source"]["label"][:] = parts["labelled"]["label"][:] = 255
    return parts


CASES = ["plain", "a class on one rank", "no labelled pixel on a rank", "no labelled pixel at all"]
SEMANTIC = {
    "per image": SemanticSettings(),
    "per batch": SemanticSettings(per_image=False),
    "class and domain": SemanticSettings(per_image=False, conditioning="class-and-domain"),
}


def one_step(case, semantic, rank=0, ranks=1):
    """Every term of a step with its gradients, from a rank's share of the images."""
    settings = dataclasses.replace(SETTINGS, semantic_alignment=SEMANTIC[semantic])
    mine = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    parts = {name: {key: value[mine] for key, value in part.items()} for name, part in batch(case).items()}
    segmenter = build_segmenter(settings).double()
    discriminators = {name: build_discriminator(name, settings, segmenter).double() for name in ("global", "semantic")}
    banks = {name: semshift.PrototypeBank(segmenter.feature_channels, 8).double() for name in ("source", "labelled")}
    outputs = {name: segmenter(part["image"]) for name, part in parts.items()}
    pixels = {name: count_pixels(parts[name]["label"], 8) for name in ("source", "labelled")}
    teacher_logits = outputs["unlabelled"].logits.detach() * 3
    grid = outputs["unlabelled"].features.shape[-2:]
    soft = soft_weights(teacher_logits, parts["unlabelled"]["inside"], tuple(grid), threshold=0.2)
    mixed = taught(parts, teacher_logits, settings, 5, rank=rank)
    terms = {
        "source": supervised_loss(outputs["source"], parts["source"]["label"], settings),
        "labelled": supervised_loss(outputs["labelled"], parts["labelled"]["label"], settings),
        "self-training": taught_cross_entropy(segmenter(mixed.image).logits, mixed),
    }
    views = {
        "global": global_view(outputs, pixels, settings),
        "semantic": semantic_view(outputs, parts, pixels, settings, banks=banks, soft_weights=soft),
    }
    found = {"pixels": pixels, "banks": {name: dict(bank.state_dict()) for name, bank in banks.items()}, "norms": {}}
    for name, view in views.items():
        terms[name] = view.confusion_loss(
            semshift.frozen(discriminators[name])(view.target), weight=view.confusion_weight
        )
        norm = semshift.gradient_norm(terms[name], outputs["labelled" if name == "semantic" else "unlabelled"].features)
        found["norms"][name] = norm_over_ranks(norm, ranks)
    sum(terms.values()).backward()
    semshift.average_gradients(segmenter.parameters())
    found["gradients"] = {"segmenter": {name: p.grad for name, p in segmenter.named_parameters()}}
    for name, view in views.items():
        source = view.source.detach().requires_grad_()
        logits = discriminators[name](source), discriminators[name](view.target.detach())
        weighted = {"source_weight": view.source_weight, "target_weight": view.target_weight}
        terms[f"{name} discriminator"] = view.discriminator_loss(*logits, **weighted)
        loss = terms[f"{name} discriminator"]
        if semantic != "class and domain" or name == "global":
            terms[f"{name} penalty"] = gradient_penalty(logits[0], source, view)
            loss = loss + terms[f"{name} penalty"]
        loss.backward()
        semshift.average_gradients(discriminators[name].parameters())
        found["gradients"][name] = {key: p.grad for key, p in discriminators[name].named_parameters()}
        found[f"{name} accuracy"] = torch.stack(view.accuracy(*logits, **weighted))
    found["mixed"] = mixed.label
    found["terms"] = {name: term.detach() for name, term in terms.items()}
    return found


def all_steps(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {f"{case}, {semantic}": one_step(case, semantic, rank, WORLD) for case in CASES for semantic in SEMANTIC}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(all_steps, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_close(found, expected, layers=1):
    """Within what rounding can do: each layer sums at most the pixels of the batch, of the largest magnitude."""
    for name, value in expected.items():
        n = IMAGES * SIZE[0] * SIZE[1]
        bound = layers * n * EPS * max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("semantic", SEMANTIC)
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_two_ranks_is_that_of_one(case, semantic, steps_of_ranks):
    whole = one_step(case, semantic)
    for rank, every in enumerate(steps_of_ranks):
        found = every[f"{case}, {semantic}"]
        assert all(torch.equal(found["pixels"][name], counts) for name, counts in whole["pixels"].items())
        assert torch.equal(found["mixed"], whole["mixed"][rank * 2 : rank * 2 + 2])
        assert_close(found["terms"], whole["terms"])
        assert_close(found["norms"], whole["norms"], layers=20)
        for name in ("global accuracy", "semantic accuracy"):
            torch.testing.assert_close(found[name], whole[name], rtol=EPS, atol=0, equal_nan=True)
        for domain, bank in whole["banks"].items():
            assert_close(found["banks"][domain], bank)
        for module, gradients in whole["gradients"].items():
            assert_close(found["gradients"][module], gradients, layers=20)
        if case == "no labelled pixel at all":
            for name in ("source", "labelled"):
                assert found["terms"][name] == 0
        assert all(term.isfinite() for term in found["terms"].values())


# --- Whole runs.


def histories_agree(a, b, rtol):
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for x, y in zip(a, b):
        assert y == pytest.approx(x, rel=rtol, abs=1e-12, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps"), [("ass", 50), ("ass-plus", 20)])
def test_torchrun_equals_one_process(method, steps, tmp_path):
    settings = dataclasses.replace(SETTINGS, method=method, steps=steps, save_every=steps)
    alone = train_module.train(settings, tmp_path / "one")
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
    assert [row["step"] for row in rows(tmp_path / "two")] == list(range(steps))
    histories_agree(rows(tmp_path / "one"), rows(tmp_path / "two"), rtol=1e-5)
    # The first rank alone writes and prints.
    assert len(list((tmp_path / "two" / "tensorboard").glob("events*"))) == 1
    assert done.stdout.count("mean over all classes") == 1
    assert done.stderr.count("memory of a step, estimated") == 1
    assert len(list((tmp_path / "two" / "predictions").glob("*.png"))) == settings.data.scenes.test
    assert f"{100 * alone['miou']:6.1f}" in done.stdout


class StopError(Exception):
    """What ends a run for the test."""


def recorded_run(settings, out, *, stop_at=None, resume=False):
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
            train_module.train(settings, out, resume=resume)
        except StopError:
            assert stop_at is not None
    return keys


def run_ranks(rank, port, folder):
    """Two ranks go on with what one process began, and begin what one process goes on with."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    folder = Path(folder)
    found = {
        "one then two": recorded_run(SETTINGS, folder / "one then two", resume=True),
        "two then one": recorded_run(SETTINGS, folder / "two then one", stop_at=4),
        "two": recorded_run(SETTINGS, folder / "two"),
    }
    recorded_run(SETTINGS, folder / "two then two", stop_at=4)
    recorded_run(SETTINGS, folder / "two then two", resume=True)
    with refuses(InputError, "--out", "--resume", folder / "two"):
        train_module.train(SETTINGS, folder / "two")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    whole = recorded_run(SETTINGS, tmp_path / "one")
    before = recorded_run(SETTINGS, tmp_path / "one then two", stop_at=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_ranks, (port, str(tmp_path)), nprocs=WORLD)
    after = recorded_run(SETTINGS, tmp_path / "two then one", resume=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]

    def counted(*parts, first=0, last=SETTINGS.steps):
        return sorted(key for part in parts for key in part if first <= key[0] < last)

    # What was loaded ahead of the stop is loaded again.
    assert counted(before, last=3) + counted(*(found["one then two"] for found in ranks)) == counted(whole)
    assert counted(*(found["two then one"] for found in ranks), last=3) + counted(after) == counted(whole)
    assert counted(*(found["two"] for found in ranks)) == counted(whole)
    assert len(set(whole)) == len(whole) == SETTINGS.steps * 3 * IMAGES
    assert state(tmp_path / "two then two")["resumed_from"] == (3,)
    assert same_run(tmp_path / "two", tmp_path / "two then two")
    for name in ("one then two", "two then one", "two"):
        histories_agree(rows(tmp_path / "one"), rows(tmp_path / name), rtol=1e-9)
        ours, theirs = (state(tmp_path / run)["stateful"] for run in (name, "one"))
        for part in ("segmenter", "teacher", "source bank", "labelled bank", "global alignment", "semantic alignment"):
            torch.testing.assert_close(dict(ours[part]), dict(theirs[part]), rtol=1e-9, atol=1e-12)


# --- What each rank takes on.


def test_shares():
    whole = dataclasses.replace(SETTINGS, optimiser=OptimiserSettings(images=6, unlabelled=12))
    assert share(whole, 1) == whole
    assert share(whole, 3).optimiser == dataclasses.replace(whole.optimiser, images=2, unlabelled=4)
    with refuses(InputError, "optimiser.batch_size", "4 ranks", 6):
        share(whole, 4)
    with refuses(InputError, "optimiser.unlabelled_batch_size", "3 ranks", 4):
        share(dataclasses.replace(SETTINGS, optimiser=OptimiserSettings(images=3, unlabelled=4)), 3)


def test_one_process_is_the_first_and_only_rank():
    fabric = start(SETTINGS)
    assert (fabric.global_rank, fabric.world_size, fabric.is_global_zero) == (0, 1, True)
    norm = torch.tensor(3.0)
    assert norm_over_ranks(norm, 1) is norm
    with pytest.raises(InputError, match=r"^refused$"):
        run_on_first_rank(fabric, functools.partial(refuse, "refused"))


def refuse(message):
    raise InputError(message)


class SeveralRanks:
    world_size, device = 2, torch.device("cpu")


def test_batch_norm_that_learns_has_no_whole_batch_statistics_on_the_cpu():
    with refuses(InputError, "batch norm", "network.frozen_batch_norm", "cpu"):
        synchronise_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(4)), SeveralRanks)
    synchronise_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(4).eval(), torch.nn.GroupNorm(2, 4)), SeveralRanks)


@pytest.mark.parametrize("command", ["demo", "evaluate", "compare", "study"])
def test_only_train_takes_several_ranks(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command]) == 2
    mentions(capsys.readouterr().err, "error", "train", "ranks", command)

"""Batches: functions of seed, step and place, for any number of workers and ranks."""

import pytest
import torch

import semshift
from examples.workbench.data.folders import FolderPair
from examples.workbench.data.loading import TrainingSet, load_batches
from examples.workbench.data_settings import Augmentation, Folder
from examples.workbench.errors import InputError
from tests.errors import refuses
from tests.examples.workbench.data.formats import random_sample, save

DOMAINS = {
    "source": [random_sample(seed=i) for i in range(5)],
    "unlabelled": [random_sample(seed=10 + i) for i in range(3)],
}


def load(per_batch=(2, 1), *, first_step=0, workers=0, **ranks):
    training = TrainingSet(DOMAINS, dict.fromkeys(DOMAINS, (32, 32)), Augmentation(), 0)
    sizes = {domain: len(samples) for domain, samples in DOMAINS.items()}
    draws = dict(zip(DOMAINS, per_batch))
    sampler = semshift.MixedBatchSampler(sizes, draws, seed=0, first_step=first_step, steps=4 - first_step, **ranks)
    return list(load_batches(training, sampler, workers=workers))


def same(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    for (_, left), (_, right) in zip(a, b):
        assert all(torch.equal(left[domain][key], right[domain][key]) for domain in left for key in left[domain])


def test_batches():
    batches = load()
    assert [step for step, _ in batches] == [0, 1, 2, 3]
    batch = batches[0][1]
    keys = {"source": {"image", "label"}, "unlabelled": {"image", "inside"}}
    assert {domain: part.keys() for domain, part in batch.items()} == keys
    assert batch["source"]["image"].shape == (2, 3, 32, 32)
    assert batch["source"]["label"].dtype == torch.int64
    assert not torch.equal(batch["source"]["image"], batches[1][1]["source"]["image"])
    same(batches[2:], load(first_step=2))


def test_an_image_depends_on_seed_step_and_place():
    first, again, *others = (
        TrainingSet(DOMAINS, dict.fromkeys(DOMAINS, (32, 32)), Augmentation(), seed)[step, place, 0]["image"]
        for seed, step, place in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    assert torch.equal(first, again)
    assert not any(torch.equal(first, other) for other in others)


def test_no_label_of_an_unlabelled_image_is_used():
    for scale, inside in ((1.0, True), (0.5, False)):
        training = TrainingSet(DOMAINS, dict.fromkeys(DOMAINS, (32, 32)), Augmentation((scale, scale)), 0)
        assert bool(training[0, 0, 5]["inside"].all()) == inside


def test_two_ranks_equal_one():
    for (_, whole), (_, one), (_, two) in zip(load((4, 2)), *(load(rank=rank, world_size=2) for rank in range(2))):
        for domain, part in whole.items():
            for key, value in part.items():
                assert torch.equal(value, torch.cat([one[domain][key], two[domain][key]]))


@pytest.mark.slow
def test_batches_do_not_depend_on_workers():
    same(load(), load(workers=2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_file_is_named_in_one_line(tmp_path, workers):
    for folder in ("img", "lbl"):
        save(random_sample().label, tmp_path / folder / "1.png")
    (tmp_path / "img/1.png").write_bytes(b"")
    samples = FolderPair(tmp_path, Folder("img", "lbl"), classes=["a", "b", "c"])
    training = TrainingSet({"source": samples}, {"source": (32, 32)}, Augmentation(), 0)
    sampler = semshift.MixedBatchSampler({"source": 1}, {"source": 1}, seed=0, steps=1)
    with refuses(InputError, tmp_path / "img/1.png", "whole"):
        list(load_batches(training, sampler, workers=workers))

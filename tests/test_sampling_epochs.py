"""Epochs of the mixed sampler, and the frameworks that set them or share batches out."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.errors import refuses
from tests.test_sampling import GOLDEN, PER_BATCH, make


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_epochs_are_one_stream():
    sampler, whole = make(first_step=2, steps=7), list(make(first_step=2, steps=21))
    assert list(sampler) == whole[:7]
    assert [epoch_of(sampler, epoch) for epoch in (0, 1, 2)] == [whole[:7], whole[7:14], whole[14:]]
    # In any order, and again without a call.
    assert epoch_of(sampler, np.int64(1)) == list(sampler) == whole[7:14]
    assert len(sampler) == 7
    assert epoch_of(sampler, 0) == whole[:7]
    # Fourteen batches of two images of seven: each is seen four times.
    batches = [batch for epoch in (0, 1) for batch in epoch_of(make(steps=7), epoch)]
    assert sorted(index for batch in batches for index in batch[:2]) == sorted([*range(7)] * 4)
    assert epoch_of(make(steps=0), 3) == []


def test_an_epoch_that_is_set_does_not_move_a_running_iteration():
    sampler = make()
    running = iter(sampler)
    batches = [next(running)]
    sampler.set_epoch(1)
    assert batches + list(running) == list(make())


def test_an_epoch_is_part_of_the_value():
    sampler, later = make(steps=7), make(steps=7)
    later.set_epoch(2)
    assert later != sampler
    assert pickle.loads(pickle.dumps(later)) == later
    assert hash(pickle.loads(pickle.dumps(later))) == hash(later)
    assert epoch_of(pickle.loads(pickle.dumps(later)), 3) == list(make(first_step=21, steps=7))
    assert "first_step=14, steps=7, epoch=<2>)" in repr(later)
    # The same batches now, others later.
    assert later != make(first_step=14, steps=7)
    later.set_epoch(0)
    assert (later, repr(later)) == (sampler, repr(sampler))


def test_resume_in_an_epoch():
    sampler = make(steps=7)
    sampler.set_epoch(2)
    resumed = sampler.resume(16, rank=0, world_size=1, per_batch=PER_BATCH)
    assert resumed.epoch == 2
    for _ in range(2):
        # A loop sets the epoch that it is in, which changes nothing.
        assert epoch_of(resumed, 2) == list(make(first_step=16, steps=5))
    assert epoch_of(resumed, 3) == list(make(first_step=21, steps=7))
    assert epoch_of(resumed, 2) == list(make(first_step=14, steps=7))
    for step in (13, 22):
        with refuses(ValueError, "first_step", step):
            sampler.resume(step, rank=0, world_size=1, per_batch=PER_BATCH)


@pytest.mark.parametrize(
    ("epoch", "error", "says"), [(-1, ValueError, ("epoch", 0, -1)), (1.0, TypeError, ("epoch", 1.0))]
)
def test_bad_epochs(epoch, error, says):
    with refuses(error, *says):
        make().set_epoch(epoch)


def test_an_endless_sampler_has_one_epoch():
    sampler = make(steps=None)
    sampler.set_epoch(0)
    with refuses(ValueError, "epoch", 0, 1, "steps"):
        sampler.set_epoch(1)
    assert next(iter(sampler)) == GOLDEN[0]


def loader(**changes):
    return DataLoader(list(range(10)), batch_sampler=make(**changes), collate_fn=list)


@pytest.mark.slow
@pytest.mark.parametrize("even", [True, False])
def test_accelerate_shares_the_batches_out(even):
    """Of one sampler for all processes: the batches of a step go to the processes in order, epoch after epoch."""
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    options = {"num_processes": 2, "put_on_device": False, "rng_types": [], "even_batches": even}
    for process in range(2):
        prepared = prepare(loader(steps=6), process_index=process, **options)
        batches = [batch for _ in range(3) for batch in prepared]
        assert batches == list(make(steps=18))[process::2]
        with refuses(ValueError, "world_size", 2, "rank=0", "world_size=1", "steps"):
            prepare(loader(rank=process, world_size=2), process_index=process, **options)


@pytest.mark.slow
def test_accelerate_and_fabric_in_one_process_set_epochs():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    for prepared in (
        fabric.setup_dataloaders(loader(), move_to_device=False),
        accelerator.prepare_data_loader(loader(), device_placement=False),
    ):
        assert [batch for _ in range(3) for batch in prepared] == list(make(steps=18))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_sets_epochs(workers):
    lightning = pytest.importorskip("lightning")
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, _):
            seen.append(batch)
            return self.weight.square()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = DataLoader(
        list(range(10)), batch_sampler=make(), collate_fn=list, num_workers=workers, persistent_workers=workers > 0
    )
    lightning.Trainer(accelerator="cpu", devices=1, max_epochs=3, barebones=True).fit(Module(), data)
    assert seen == list(make(steps=18))

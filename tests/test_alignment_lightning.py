"""Alignment over two ranks in Lightning's own loop."""

import importlib.util
import os

import pytest
import torch
from torch import distributed as dist

from tests.alignment_cases import CASES, IN_LIGHTNING, LR, STEPS, WORLD, Both, share
from tests.alignment_ranks import (
    assert_same_training,
    gradients_of,
    modules,
    run_ranks,
    start_group,
    task_loss,
    weight_of,
)


def work_in_lightning(rank, folder, names):
    """One rank of Lightning's own loop: automatic optimisation, and one optimiser for segmenter and discriminator."""
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Adapting(lightning.LightningModule):
        def __init__(self, case):
            super().__init__()
            self.case = case
            segmenter, align = modules(case)
            self.both = Both(segmenter, align)

        def training_step(self, batch):
            images, labels, coarse, divide_by, sources = batch
            _, logits, losses = self.both(images, labels, sources)
            task = task_loss(logits, coarse, divide_by, WORLD)
            return task + weight_of(self.case) * losses.confusion + losses.discriminator

        def configure_optimizers(self):
            groups = [{"params": self.both.segmenter.parameters()}, {"params": self.both.align.parameters(), "lr": LR}]
            return torch.optim.SGD(groups, lr=LR, momentum=0.9)

    torch.set_num_threads(1)
    # As torchrun does, so that Lightning starts no process of its own.
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for number, name in enumerate(names):
        start_group(f"{folder}/store {number}", rank)
        model = Adapting(CASES[name])
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=DDPStrategy(process_group_backend="gloo"),
            max_epochs=1,
            barebones=True,
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
        steps = [share(CASES[name], step, rank) for step in range(STEPS)]
        trainer.fit(model, torch.utils.data.DataLoader(steps, batch_size=None))
        assert trainer.global_step == STEPS
        found[name] = {
            "segmenter": model.both.segmenter.state_dict(),
            "alignment": model.both.align.state_dict(),
            "gradients": gradients_of(model.both.align),
        }
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")
def test_lightning_with_automatic_optimisation(tmp_path):
    ranks = run_ranks(work_in_lightning, tmp_path, IN_LIGHTNING, 240)
    for name in IN_LIGHTNING:
        for every in ranks:
            assert_same_training(CASES[name], every[name])
            assert all(map(torch.equal, every[name]["gradients"], ranks[0][name]["gradients"]))

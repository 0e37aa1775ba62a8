"""Several processes as one: how they find each other, what each of them takes on, and what the first does alone."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from examples.workbench.errors import InputError, MachineError
from examples.workbench.settings import Settings

__all__ = [
    "run_on_first_rank",
    "seed_step",
    "split_batch",
    "check_accelerator",
    "launch_fabric",
    "synchronise_batch_norm",
]


def check_accelerator(settings: Settings) -> None:
    """Refuse an accelerator that this machine lacks, or that cannot compute in the settings' precision.

    Raises:
        InputError: naming it.
    """
    name = settings.accelerator
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"expected an accelerator that this machine has, such as --accelerator cpu, got {name}")
    if name == "mps" and settings.precision == "64-true":
        raise InputError("expected precision 32-true or bf16-mixed on mps, got 64-true")


def launch_fabric(settings: Settings, *, loggers: Any = None) -> Fabric:
    """Join the other processes that torchrun has started; without it, this one is all there is."""
    check_accelerator(settings)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        fabric = Fabric(accelerator=settings.accelerator, devices=1, precision=settings.precision, loggers=loggers)
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if not dist.is_initialized():
            # torchrun keeps one store over its restarts, in which the addresses of processes that are gone still stand.
            store, rank, _ = next(rendezvous("env://"))
            store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            cuda = settings.accelerator in ("auto", "cuda") and torch.cuda.is_available()
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
        # The strategy sets up devices and the process group; gradients are averaged by a call in the trainer.
        fabric = Fabric(
            accelerator=settings.accelerator,
            strategy="ddp",
            devices=here,
            num_nodes=ranks // here,
            precision=settings.precision,
            plugins=[TorchElasticEnvironment()],
            loggers=loggers,
        )
    fabric.launch()
    return fabric


def split_batch(settings: Settings, ranks: int) -> Settings:
    """The settings of one rank, which takes an equal share of the images of each step.

    Raises:
        InputError: they do not divide by the number of ranks.
    """
    how = settings.optimiser
    for name, images in (("batch_size", how.batch_size), ("unlabelled_batch_size", how.unlabelled_batch_size)):
        if images % ranks:
            raise InputError(f"expected optimiser.{name} to be a multiple of the {ranks} ranks, got {images}")
    optimiser = dataclasses.replace(
        how, batch_size=how.batch_size // ranks, unlabelled_batch_size=how.unlabelled_batch_size // ranks
    )
    return dataclasses.replace(settings, optimiser=optimiser)


def synchronise_batch_norm(segmenter: nn.Module, fabric: Fabric) -> None:
    """Let batch norm that learns take its statistics from the images of all ranks.

    Raises:
        InputError: on a device for which PyTorch has no such layer.
    """
    norms = [module for module in segmenter.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if fabric.world_size == 1 or not any(norm.training for norm in norms):
        return
    if fabric.device.type != "cuda":
        raise InputError(
            "expected batch norm on several ranks with network.frozen_batch_norm or on cuda, where its statistics are "
            f"those of all ranks, got it on {fabric.device.type}"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)  # type: ignore[no-untyped-call]


def run_on_first_rank(fabric: Fabric, work: Callable[[], Any]) -> None:
    """Have the first rank do something while the others wait; where it fails, every rank fails alike.

    Raises:
        InputError, MachineError: as `work` does.
    """
    if fabric.world_size == 1:
        work()
        return
    failed: Exception | None = None
    if fabric.is_global_zero:
        try:
            work()
        except (InputError, MachineError) as error:
            failed = type(error)(str(error))
    failed = fabric.broadcast(failed)
    if failed is not None:
        raise failed


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make what is drawn within a step, of a network with dropout, a function of the seed, the step and the rank."""
    # The first rank draws what one process would.
    key = (seed, step, rank) if rank else (seed, step)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

"""Ranks: several processes that train one network together."""

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

__all__ = ["check_accelerator", "launch_fabric", "run_on_first_rank", "seed_step"]
__all__ += ["synchronise_batch_norm"]


def check_accelerator(settings: Settings) -> None:
    """Check that this machine has the accelerator, and that the accelerator supports the settings' precision."""
    name = settings.accelerator
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"this machine has no {name}; choose a different device, such as --accelerator cpu")
    if name == "mps" and settings.precision == "64-true":
        raise InputError("on mps, precision must be 32-true or bf16-mixed, got 64-true")


def launch_fabric(settings: Settings, *, loggers: Any = None) -> Fabric:
    """Start Lightning Fabric for all processes that torchrun started, or for this process alone."""
    check_accelerator(settings)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    options: dict[str, Any] = {"devices": here, "num_nodes": ranks // here}
    if ranks > 1:
        # The strategy only chooses devices: gradients are averaged by `semshift.average_gradients`.
        options |= {"strategy": "ddp", "plugins": [TorchElasticEnvironment()]}
        if not dist.is_initialized():
            # torchrun keeps its store over restarts, and the store still lists the addresses of ended processes.
            store, rank, _ = next(rendezvous("env://"))
            store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            cuda = settings.accelerator in ("auto", "cuda") and torch.cuda.is_available()
            dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
    fabric = Fabric(accelerator=settings.accelerator, precision=settings.precision, loggers=loggers, **options)
    fabric.launch()
    return fabric


def synchronise_batch_norm(segmenter: nn.Module, fabric: Fabric) -> None:
    """Compute batch norm's statistics over the images of all ranks. PyTorch has a layer for this on CUDA only."""
    norms = [module for module in segmenter.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if fabric.world_size == 1 or not any(norm.training for norm in norms):
        return
    if fabric.device.type != "cuda":
        raise InputError(
            f"batch norm on several ranks needs cuda or network.frozen_batch_norm true, got {fabric.device.type}"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(segmenter)  # type: ignore[no-untyped-call]


def run_on_first_rank(fabric: Fabric, work: Callable[[], Any]) -> None:
    """Run `work` on the first rank while the others wait. Its InputError or MachineError is raised on all ranks."""
    error: Exception | None = None
    if fabric.is_global_zero:
        try:
            work()
        except (InputError, MachineError) as caught:
            error = caught
    error = fabric.broadcast(error)
    if error is not None:
        raise error


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's generator, which dropout uses, with the run's seed, the step and the rank."""
    # The first rank draws the same numbers as a single process.
    key = (seed, step, rank) if rank else (seed, step)
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

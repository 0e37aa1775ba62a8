"""Whether `torch.distributed` is in use."""

from torch import distributed as dist

__all__ = ["initialised"]


def initialised() -> bool:
    """Whether a process group is initialised; some builds of torch have no `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()

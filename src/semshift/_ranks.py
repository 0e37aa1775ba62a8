"""Whether this process is one of a group."""

from torch import distributed as dist

__all__ = ["initialised"]


def initialised() -> bool:
    """Whether there is a process group; some builds of torch have no `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()

"""Errors: which end a command with a line, and which with their traceback."""

import pytest
import torch
from torch.utils.data import DataLoader

from examples.workbench.errors import MachineError, describe_machine_error


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MachineError("no disk"), "no disk"),
        (FileNotFoundError(2, "No such file", "a.png"), "No such file: a.png"),
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "CUDA"),
    ],
)
def test_failures_of_the_machine(error, words):
    line = describe_machine_error(raised(error))
    assert words in line
    assert len(line.splitlines()) == 1


class Broken:
    """A data set with an error in it."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_ours_show_their_traceback(workers):
    assert describe_machine_error(raised(RuntimeError("DataLoader, gloo, can't allocate memory"))) is None
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert describe_machine_error(caught.value) is None

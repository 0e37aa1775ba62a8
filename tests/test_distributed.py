"""Sums over ranks: nothing in one process; over two, values, gradients, and prototypes equal to one process's."""

import re

import pytest
import torch

from semshift.distributed import all_reduce_sum
from semshift.pooling import ClassSums, class_sums


def test_does_nothing_in_one_process():
    tensor = torch.randn(3, requires_grad=True)
    assert all_reduce_sum(tensor) is tensor
    with pytest.raises(TypeError, match="^" + re.escape("expected tensor to be a torch.Tensor, got list") + "$"):
        all_reduce_sum([1.0])


def batch():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, 5, 6, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (4, 5, 6), generator=generator)
    labels[2:][labels[2:] == 3] = 255  # the second rank has no pixel of class 3
    return features, labels


def loss_of(pooled):
    return (pooled.means - 1).pow(3).sum()


def one_rank(rank, meet):
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    try:
        mine = torch.tensor([1.0, 10.0]) * (rank + 1)
        mine = mine.requires_grad_()
        total = all_reduce_sum(mine)
        assert total.tolist() == [3.0, 30.0]
        assert mine.tolist() == [rank + 1, 10 * (rank + 1)]
        # Each rank weighs the sum by its own factor: every input gets the factors of all ranks.
        (total * (rank + 2)).sum().backward()
        assert mine.grad.tolist() == [5.0, 5.0]
        assert all_reduce_sum(torch.tensor([2**40 + rank])).tolist() == [2**41 + 1]
        expanded = torch.ones(1).expand(3).T
        assert all_reduce_sum(expanded).tolist() == [2.0] * 3

        features, labels = batch()
        half = slice(2 * rank, 2 * rank + 2)
        part = features[half].requires_grad_()
        pooled = class_sums(part, labels[half], 4)
        pooled = ClassSums(all_reduce_sum(pooled.sums), all_reduce_sum(pooled.mass))
        whole = features.clone().requires_grad_()
        expected = class_sums(whole, labels, 4)
        assert torch.equal(pooled.mass, expected.mass)
        torch.testing.assert_close(pooled.means, expected.means)
        loss_of(pooled).backward()
        loss_of(expected).backward()
        # Both ranks have the same loss, so the gradient comes twice; DDP's mean over ranks takes that back.
        torch.testing.assert_close(part.grad / 2, whole.grad[half])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    torch.multiprocessing.spawn(one_rank, (tmp_path / "meet",), nprocs=2)

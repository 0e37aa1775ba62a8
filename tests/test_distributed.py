"""Sums over ranks: nothing in one process, and with two the same numbers and gradients as one process has."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import semshift
from tests.errors import refuses

WORLD = 2
EPS = torch.finfo(torch.float64).eps
# Class 0 is on both ranks, 1 and 2 on one each, 3 on neither; 255 is ignored.
LABELS = torch.tensor([[[0, 0, 1], [255, 0, 1]], [[1, 0, 255], [0, 0, 0]], [[2, 2, 0], [2, 255, 0]], [[0, 0, 2]] * 2])
NUM_CLASSES = 4


def segmenter():
    torch.manual_seed(1)
    return nn.Conv2d(3, 5, 1).double()


def images():
    return torch.randn(4, 3, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss_of(means):
    """Any loss that tells classes and channels apart."""
    weight = torch.arange(1.0, 21, dtype=torch.float64).reshape(NUM_CLASSES, 5)
    return (weight * means).sin().sum()


def sent_by(rank):
    """The gradient that a rank receives from its losses."""
    return torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) * (rank + 1)


def work(rank, folder):
    """One rank; what it finds goes to a file, and the tests look at it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {}
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 10 * rank
    x.requires_grad_()
    total = semshift.all_reduce_sum(x)
    total.backward(sent_by(rank))
    found |= {"total": total.detach(), "input": x.detach(), "gradient": x.grad}
    found["counts"] = semshift.all_reduce_sum(torch.tensor([2**53 + rank, rank]))
    # The same matrix, which lies otherwise in each rank's memory.
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found["strided"] = semshift.all_reduce_sum(matrix if rank == 0 else matrix.T.contiguous().T)
    found["expanded"] = semshift.all_reduce_sum(torch.full((1, 1), rank + 1.0).expand(3, 2))
    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    found["alone"] = semshift.all_reduce_sum(x, group=alone).detach()
    # Of (sum x)^3 on each rank: the first derivative is W 3 s^2, the second of its sum over ranks W^2 6 s.
    y = torch.tensor(1.0 + rank, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(semshift.all_reduce_sum(y).pow(3), y, create_graph=True)
    (second,) = torch.autograd.grad(first, y)
    found |= {"first": first.detach(), "second": second}
    gather_and_average(rank, found)

    network = DistributedDataParallel(segmenter())
    mine = slice(2 * rank, 2 * rank + 2)
    part = semshift.class_sums(network(images()[mine]), LABELS[mine], NUM_CLASSES)
    pooled = semshift.ClassSums(semshift.all_reduce_sum(part.sums), semshift.all_reduce_sum(part.mass))
    loss_of(pooled.means).backward()
    found |= {"means": pooled.means.detach(), "mass": pooled.mass}
    found |= {"weight": network.module.weight.grad, "bias": network.module.bias.grad}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def gather_and_average(rank, found):
    x = (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 10 * rank).T.requires_grad_()
    rows = semshift.all_gather(x)
    (found["gathered_gradient"],) = torch.autograd.grad(rows, x, torch.stack([sent_by(rank), 10 * sent_by(rank)]))
    found |= {
        "rows": rows.detach(),
        "flags": semshift.all_gather(torch.tensor([rank == 0, True])),
        "scalars": semshift.all_gather(y(rank)),
    }
    found["counted"] = semshift.all_gather(torch.tensor(2**53 + rank))
    # A weighted mean whose elements lie on both ranks, to the third power: its second derivative by an element.
    (first,) = torch.autograd.grad(semshift.all_gather(z := y(rank)).mean().pow(3), z, create_graph=True)
    (found["gathered_second"],) = torch.autograd.grad(first, z)

    learning = [torch.zeros(2, 3, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float64)]
    lies_otherwise = torch.zeros(2, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    without, still = torch.zeros(2, requires_grad=True), torch.zeros(3)
    for parameter in learning:
        parameter.grad = torch.full_like(parameter, 1.0 + 2 * rank)
    lies_otherwise.grad = (torch.arange(36.0).reshape(2, 2, 3, 3) * (rank + 1)).to(memory_format=torch.channels_last)
    if rank == 1:
        without.grad = torch.tensor([4.0, 6.0])
    semshift.average_gradients(iter([learning[0], still, lies_otherwise, learning[1], without]))
    found["averaged"] = [parameter.grad for parameter in (*learning, lies_otherwise, without)]
    half = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    half.grad = torch.full_like(half, 40000.0)
    semshift.average_gradients([half])
    found["half"] = half.grad
    alone = dist.new_group([0])
    if rank == 1:
        with refuses(ValueError, "group", "rank"):
            semshift.average_gradients([half], group=alone)
    found["still"] = still.grad is None
    found["strides"] = lies_otherwise.grad.stride() == lies_otherwise.stride()


def y(rank):
    return torch.tensor(1.0 + rank, dtype=torch.float64, requires_grad=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_group_it_is_the_tensor_itself():
    x = torch.randn(3, requires_grad=True)
    assert semshift.all_reduce_sum(x) is x


def test_without_a_group_there_is_one_row_and_gradients_stay():
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(semshift.all_gather(x), x[None])
    assert semshift.all_gather(torch.tensor(True)).tolist() == [True]
    semshift.average_gradients([x])
    assert x.grad is None


def test_a_group_of_one(one_rank):
    x = torch.randn(4, 3, dtype=torch.float64).T.requires_grad_()
    total = semshift.all_reduce_sum(x)
    assert torch.equal(total, x)
    assert total.data_ptr() != x.data_ptr()
    assert torch.autograd.gradcheck(semshift.all_reduce_sum, (x,))
    assert torch.autograd.gradgradcheck(semshift.all_reduce_sum, (x,))
    counts = semshift.all_reduce_sum(torch.tensor([2**53 + 1]))
    assert counts.item() == 2**53 + 1
    assert not counts.requires_grad
    assert torch.equal(semshift.all_gather(x), x[None])
    assert torch.autograd.gradcheck(semshift.all_gather, (x,))
    assert torch.autograd.gradgradcheck(semshift.all_gather, (x,))
    assert semshift.all_gather(torch.ones(0, 2)).shape == (1, 0, 2)
    x.grad = torch.ones_like(x)
    semshift.average_gradients([x])
    assert torch.equal(x.grad, torch.ones_like(x))
    semshift.average_gradients([])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: semshift.all_reduce_sum(1.0), ("tensor", "float")),
        (lambda: semshift.all_reduce_sum(torch.ones(2, dtype=torch.bool)), ("tensor", torch.bool)),
        (lambda: semshift.all_gather([1.0]), ("tensor", "list")),
        (lambda: semshift.average_gradients(["weight"]), ("parameters", "str")),
        (lambda: semshift.average_gradients(torch.zeros(2, 3)), ("parameters", "single", "[parameter]")),
    ],
)
def test_it_wants_tensors_of_numbers(call, says):
    with refuses(TypeError, *says):
        call()


@pytest.mark.slow
class TestTwoRanks:
    def test_values(self, ranks):
        for found in ranks:
            assert torch.equal(found["total"], torch.tensor([[12.0, 14.0], [16.0, 18.0]], dtype=torch.float64))
            assert torch.equal(found["counts"], torch.tensor([2**54 + 1, 1]))
            assert torch.equal(found["strided"], torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
            assert torch.equal(found["expanded"], torch.full((3, 2), 3.0))

    def test_the_input_is_left_alone_and_a_group_of_one_adds_nothing(self, ranks):
        for rank, found in enumerate(ranks):
            expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 10 * rank
            assert torch.equal(found["input"], expected)
            assert torch.equal(found["alone"], expected)

    def test_gradient_is_the_adjoint(self, ranks):
        """`<all_reduce(x), g> = <x, adjoint(g)>`, summed over ranks; small integers, so exact."""
        for found in ranks:
            assert torch.equal(found["gradient"], sent_by(0) + sent_by(1))
        forward = sum((found["total"] * sent_by(rank)).sum() for rank, found in enumerate(ranks))
        backward = sum((found["input"] * found["gradient"]).sum() for found in ranks)
        assert forward == backward

    def test_second_order(self, ranks):
        for found in ranks:
            assert found["first"].item() == WORLD * 3 * 3.0**2
            assert found["second"].item() == WORLD**2 * 6 * 3.0

    def test_gathered(self, ranks):
        base = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        for rank, found in enumerate(ranks):
            assert torch.equal(found["rows"], torch.stack([base.T, base.T + 10]))
            assert found["flags"].tolist() == [[True, True], [False, True]]
            assert found["scalars"].tolist() == [1.0, 2.0]
            assert found["counted"].tolist() == [2**53, 2**53 + 1]
            assert torch.equal(found["gathered_gradient"], (sent_by(0) + sent_by(1)) * 10**rank)
            # The derivative of m^3 by z is 3 m^2 / 2 on each of two ranks, m = 3 / 2; of both by z, 2 * 2 * 6 m / 4.
            assert found["gathered_second"].item() == 2 * 2 * 6 * 1.5 / 4

    def test_averaged(self, ranks):
        for found in ranks:
            single, double, lies_otherwise, without = found["averaged"]
            assert torch.equal(single, torch.full((2, 3), 2.0))
            assert torch.equal(double, torch.full((2, 3), 2.0, dtype=torch.float64))
            assert torch.equal(lies_otherwise, torch.arange(36.0).reshape(2, 2, 3, 3) * 1.5)
            assert torch.equal(without, torch.tensor([2.0, 3.0]))
            assert torch.equal(found["half"], torch.full((2,), 40000.0, dtype=torch.float16))
            assert found["still"]
            assert found["strides"]

    def test_pooled_prototypes_are_those_of_one_process(self, ranks):
        network = segmenter()
        whole = semshift.class_sums(network(images()), LABELS, NUM_CLASSES)
        loss_of(whole.means).backward()
        assert whole.present.tolist() == [True, True, True, False]
        # 24 pixels, each a sum of 4 products; the loss's 20 weights of at most 20 magnify what the means are off by.
        features = network(images()).abs().max().item()
        bound = (24 + 4) * EPS * features
        bound_of_gradient = 2 * 20**3 * (bound + 24 * EPS) * images().abs().max().item()
        for found in ranks:
            assert torch.equal(found["mass"], whole.mass)
            torch.testing.assert_close(found["means"], whole.means.detach(), rtol=0, atol=bound)
            torch.testing.assert_close(found["weight"], network.weight.grad, rtol=0, atol=bound_of_gradient)
            torch.testing.assert_close(found["bias"], network.bias.grad, rtol=0, atol=bound_of_gradient)

"""The bank: against a loop in rational numbers, absent classes bit for bit, resumed, compiled, and on two ranks."""

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist
from torch import nn

import semshift
from tests.errors import mentions, refuses

# While compiling on Python 3.13.0, torch warns that it is slow there.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")

K, C = 3, 2
WORLD = 2
UNIT = torch.finfo(torch.float32).eps / 2


@st.composite
def updates(draw):
    """A momentum, and batches with and without images of their own, counts or weights, in either precision."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    batches = []
    for _ in range(draw(st.integers(0, 5))):
        shape = [draw(st.integers(0, 3))] * draw(st.booleans()) + [K]
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        mass = torch.randint(0, 4, shape, generator=generator)
        sums = torch.randn(*shape, C, generator=generator, dtype=dtype) * 100 * (mass > 0)[..., None]
        batches.append(semshift.ClassSums(sums, mass.to(dtype) / 3 if draw(st.booleans()) else mass))
    return draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1 - 2**-20])), batches


def bank_of(momentum, batches, bank=None):
    bank = semshift.PrototypeBank(C, K, momentum=momentum) if bank is None else bank
    for pooled in batches:
        bank.update(pooled)
    return bank


def definition(momentum, batches):
    """For each class the mean by the weights of the docstring, and the mean of what its parts are in size."""
    means, sizes = torch.zeros(K, C, dtype=torch.float64), torch.zeros(K, C, dtype=torch.float64)
    for k in range(K):
        rows = []
        for pooled in batches:
            sums, mass = pooled.sums.reshape(-1, K, C)[:, k].tolist(), pooled.mass.reshape(-1, K)[:, k].tolist()
            if sum(mass) > 0:
                rows.append((sums, mass))
        total = Fraction(0)
        above, size = [Fraction(0)] * C, [Fraction(0)] * C
        for age, (sums, mass) in enumerate(reversed(rows)):
            weight = Fraction(momentum) ** age
            total += weight * sum(Fraction(m) for m in mass)
            for row in sums:
                above = [a + weight * Fraction(x) for a, x in zip(above, row)]
                size = [a + weight * abs(Fraction(x)) for a, x in zip(size, row)]
        if rows:
            means[k] = torch.tensor([float(a / total) for a in above], dtype=torch.float64)
            sizes[k] = torch.tensor([float(a / total) for a in size], dtype=torch.float64)
    return means, sizes


@given(updates())
def test_it_is_its_definition(case):
    momentum, batches = case
    bank = bank_of(momentum, batches)
    expected, sizes = definition(momentum, batches)
    # An update rounds its images' sum 2 times, then the cast, two factors as float32 and their products, and the sum:
    # 8 units of what was added up, in the sums and in the mass, and the division one more.
    bound = (2 * 8 * max(len(batches), 1) + 2) * UNIT * sizes
    assert bank.means.dtype == torch.float32
    assert ((bank.means - expected).abs() <= bound).all()
    held = [pooled.mass.reshape(-1, K).sum(0) > 0 for pooled in batches]
    assert bank.present.tolist() == [any(bool(row[k]) for row in held) for k in range(K)]
    assert bank.means[~bank.present].eq(0).all()


@given(updates())
def test_without_momentum_it_is_the_last_batch_of_each_class(case):
    _, batches = case
    bank = bank_of(0.0, batches)
    for pooled in batches:
        whole = pooled if pooled.sums.dim() == 2 else semshift.ClassSums(pooled.sums.sum(0), pooled.mass.sum(0))
        last = semshift.ClassSums(
            whole.sums.float(), whole.mass.float() if whole.mass.is_floating_point() else whole.mass
        )
        before = bank.means
        bank.update(pooled)
        assert torch.equal(bank.means, torch.where(last.present[:, None], last.means, before))


@given(updates(), st.integers(0, 5))
def test_resumed_equals_uninterrupted(case, cut):
    momentum, batches = case
    whole = bank_of(momentum, batches)
    first = bank_of(momentum, batches[:cut])
    resumed = semshift.PrototypeBank(C, K, momentum=momentum)
    resumed.load_state_dict(first.state_dict())
    for bank in (resumed, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        bank_of(momentum, batches[cut:], bank)
        assert bank.momentum == momentum
        assert torch.equal(bank.sums, whole.sums)
        assert torch.equal(bank.mass, whole.mass)


def test_an_absent_class_keeps_its_bits_whatever_its_sums_hold():
    bank = bank_of(0.9, [semshift.ClassSums(torch.tensor([[1.1, 2.3]] * K), torch.tensor([7, 7, 7]))])
    before = copy.deepcopy(bank.state_dict())
    sums = torch.tensor([[5.0, 5.0], [math.nan, math.inf], [0.0, 0.0]])
    bank.update(semshift.ClassSums(sums, torch.tensor([1, 0, 0])))
    assert torch.equal(bank.sums[1:], before["sums"][1:])
    assert torch.equal(bank.mass[1:], before["mass"][1:])
    assert not torch.equal(bank.sums[0], before["sums"][0])


def test_a_constant_domain_is_found_at_once():
    # No bias of the start at 0, and none towards a batch with few pixels.
    bank = semshift.PrototypeBank(1, 1, momentum=0.99)
    for pixels in (2, 4096, 1):
        bank.update(semshift.ClassSums(torch.tensor([[3.0 * pixels]]), torch.tensor([pixels])))
        assert abs(bank.means.item() - 3.0) <= 4 * 8 * 3 * UNIT * 3


def test_fill():
    bank = bank_of(
        0.5, [semshift.ClassSums(torch.tensor([[2.0, 4.0], [9.0, 3.0], [0.0, 0.0]]), torch.tensor([2, 3, 0]))]
    )
    sums = torch.tensor([[[8.0, 4.0], [5.0, 5.0], [0.0, 0.0]]] * 2, dtype=torch.float64, requires_grad=True)
    pooled = semshift.ClassSums(sums, torch.tensor([[4, 0, 0], [0, 5, 0]]))
    filled = bank(pooled)
    assert filled.means.dtype == torch.float64
    assert filled.means.tolist() == [[[2, 1], [3, 1], [0, 0]], [[1, 2], [1, 1], [0, 0]]]
    assert filled.present.tolist() == [[True, True, False]] * 2
    # The bank may move on before the backward.
    before = filled.means.tolist()
    bank.update(pooled)
    assert filled.means.tolist() == before
    filled.means.sum().backward()
    assert sums.grad.tolist() == [[[0.25, 0.25], [0, 0], [0, 0]], [[0, 0], [0.2, 0.2], [0, 0]]]
    assert not bank.sums.requires_grad
    one = bank(semshift.ClassSums(sums[1], pooled.mass[1]))
    assert one.means.shape == (K, C)
    assert one.means[1].tolist() == [1, 1]
    assert not bank(semshift.ClassSums(torch.zeros(K, C), torch.zeros(K))).means.requires_grad


def test_it_is_a_module_of_two_buffers():
    bank = semshift.PrototypeBank(C, K, momentum=0.5)
    assert repr(bank) == "PrototypeBank(2, 3, momentum=0.5)"
    assert list(bank.state_dict()) == ["sums", "mass"]
    assert list(bank.parameters()) == []
    assert semshift.PrototypeBank(C, K).momentum == 0.99
    assert (bank.in_channels, bank.num_classes) == (C, K)
    assert (bank.means.shape, bank.present.shape) == ((K, C), (K,))
    pooled = semshift.ClassSums(torch.ones(K, C), torch.ones(K, dtype=torch.int64))
    parent = nn.ModuleDict({"bank": bank}).double()
    bank.update(pooled)
    assert bank.means.dtype == torch.float64
    assert bank(pooled).means.dtype == torch.float32
    parent.half()
    for call in (lambda: bank.update(pooled), lambda: bank(pooled), lambda: bank.means, lambda: bank.present):
        with refuses(TypeError, "bank", "float32", torch.float16, ".float()"):
            call()


def test_autocast_changes_nothing():
    pooled = semshift.ClassSums(torch.randn(K, C), torch.tensor([3, 1, 0]))
    plain, cast = bank_of(0.9, [pooled] * 2), semshift.PrototypeBank(C, K, momentum=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank_of(0.9, [pooled] * 2, cast)
        filled = cast(pooled)
    assert torch.equal(cast.sums, plain.sums)
    assert torch.equal(filled.means, plain(pooled).means)


def test_compiled_equals_eager():
    def step(bank, sums, mass):
        pooled = semshift.ClassSums(sums, mass)
        bank.update(pooled)
        return bank(pooled)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    banks = semshift.PrototypeBank(C, K, momentum=0.9), semshift.PrototypeBank(C, K, momentum=0.9)
    for mass in (torch.tensor([3, 1, 0]), torch.tensor([0, 2, 0])):
        data = torch.randn(K, C)
        results = []
        for bank, run in zip(banks, (step, compiled)):
            sums = data.clone().requires_grad_()
            filled = run(bank, sums, mass)
            filled.means.square().sum().backward()
            results.append([filled.means, filled.present, sums.grad, bank.sums, bank.mass])
        for eager, traced in zip(*results):
            assert torch.equal(eager, traced)


def test_where_values_are_not_looked_at_a_bad_class_keeps_its_value(monkeypatch):
    # As on CUDA, where a check would force a device sync.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    good = semshift.ClassSums(torch.tensor([[1.0, 2.0]] * K), torch.tensor([1.0, 1.0, 1.0]))
    bank, one = bank_of(0.9, [good]), bank_of(0.9, [good])
    bad = torch.tensor([[3.0, math.nan], [4.0, 5.0], [3.0, 3.0]])
    bank.update(semshift.ClassSums(bad, torch.tensor([2.0, 2.0, math.inf])))
    bank.update(semshift.ClassSums(bad, torch.tensor([0.0, 0.0, -2.0])))
    one.update(semshift.ClassSums(bad, torch.tensor([0.0, 2.0, 0.0])))
    assert torch.equal(bank.sums, one.sums)
    assert torch.equal(bank.mass, one.mass)


@pytest.mark.parametrize(
    ("pooled", "error", "says"),
    [
        (torch.ones(K, C), TypeError, ("pooled", "ClassSums", "Tensor")),
        (semshift.ClassSums(torch.ones(K, C).half(), torch.ones(K)), TypeError, ("pooled.sums", torch.float16)),
        (semshift.ClassSums(torch.ones(C, K), torch.ones(C)), ValueError, ("pooled.sums", [3, 2], [2, 3])),
        (
            semshift.ClassSums(torch.ones(1, 1, K, C), torch.ones(1, 1, K)),
            ValueError,
            ("pooled.sums", [3, 2], [1, 1, 3, 2]),
        ),
        (semshift.ClassSums(torch.ones(4, K, C), torch.ones(K)), ValueError, ("pooled.mass", [4, 3], [4, 3, 2], [3])),
        (
            semshift.ClassSums(torch.ones(K, C, device="meta"), torch.ones(K)),
            ValueError,
            ("pooled.sums", "bank", "meta", "cpu"),
        ),
        (
            semshift.ClassSums(torch.ones(K, C), torch.ones(K, device="meta")),
            ValueError,
            ("pooled.mass", "bank", "meta", "cpu"),
        ),
    ],
)
def test_errors(pooled, error, says):
    bank = semshift.PrototypeBank(C, K)
    for call in (bank.update, bank):
        with refuses(error, *says):
            call(pooled)


@pytest.mark.parametrize(
    ("value", "dtype", "mass", "says"),
    [
        (math.nan, torch.float32, 1.0, ("pooled.sums", torch.float32, "nan")),
        (-math.inf, torch.float32, 1.0, ("pooled.sums", torch.float32, "-inf")),
        (1e39, torch.float64, 1.0, ("pooled.sums", torch.float32, "inf")),
        (1.0, torch.float32, -1.0, ("pooled.mass", -1.0)),
        (1.0, torch.float32, math.nan, ("pooled.mass", "nan")),
        (1.0, torch.float32, math.inf, ("pooled.mass", "inf")),
    ],
)
def test_values_that_would_poison_it(value, dtype, mass, says):
    bank = bank_of(0.9, [semshift.ClassSums(torch.ones(K, C), torch.ones(K))])
    before = copy.deepcopy(bank.state_dict())
    sums = torch.ones(K, C, dtype=dtype)
    sums[1, 1] = value
    with refuses(ValueError, *says, "class 1"):
        bank.update(semshift.ClassSums(sums, torch.tensor([1.0, mass, 1.0])))
    for name, tensor in bank.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_classes": 0}, ValueError, ("num_classes", 1, 0)),
        ({"in_channels": 0}, ValueError, ("in_channels", 1, 0)),
        ({"in_channels": 2.0}, TypeError, ("in_channels", 2.0)),
        ({"momentum": 1.0}, ValueError, ("momentum", "[0, 1)", 1.0)),
        ({"momentum": math.nan}, ValueError, ("momentum", "[0, 1)", "nan")),
        ({"momentum": -0.1}, ValueError, ("momentum", "[0, 1)", -0.1)),
        ({"momentum": "0.9"}, TypeError, ("momentum", "'0.9'")),
        ({"momentum": False}, TypeError, ("momentum", False)),
    ],
)
def test_errors_of_the_constructor(arguments, error, says):
    with refuses(error, *says):
        semshift.PrototypeBank(**{"in_channels": C, "num_classes": K, **arguments})


def batch(step):
    """Features in eighths, of which every sum is exact; class 2 is on the second rank alone, and then on none."""
    generator = torch.Generator().manual_seed(step)
    features = torch.randint(-99, 100, (4, C, 3, 2), generator=generator).float() / 8
    labels = torch.randint(0, 2, (4, 3, 2), generator=generator)
    if step == 0:
        labels[3, 0] = 2
    return features, labels


def work(rank, folder):
    """One rank's half of each batch; what its bank holds goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    bank = semshift.PrototypeBank(C, K, momentum=0.75)
    for step in range(3):
        features, labels = (part[2 * rank : 2 * rank + 2] for part in batch(step))
        bank.update(semshift.class_sums(features, labels, K, per_image=step == 1))
    try:
        bad = torch.full((K, C), math.nan if rank == 0 else 1.0)
        bank.update(semshift.ClassSums(bad, torch.ones(K, dtype=torch.int64)))
        error = None
    except ValueError as caught:
        error = str(caught)
    torch.save({"state": bank.state_dict(), "error": error}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORLD)
    whole = semshift.PrototypeBank(C, K, momentum=0.75)
    for step in range(3):
        whole.update(semshift.class_sums(*batch(step), K))
    assert whole.present.all()
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["state"]["sums"], whole.sums)
        assert torch.equal(found["state"]["mass"], whole.mass)
        # Both ranks refuse, or the other one would wait for ever.
        mentions(found["error"], "pooled.sums", torch.float32, "nan", "class 0")

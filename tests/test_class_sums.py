"""`ClassSums` as a value: it adds, moves, collates, saves, and divides at the end."""

import copy
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

import semshift
from tests.errors import refuses
from tests.test_pooling import batch

pytestmark = pytest.mark.usefixtures("few_or_many")


def test_class_sums_is_a_value():
    one, other = (semshift.class_sums(*batch(), 4) for _ in range(2))
    merged = sum([one, other])
    assert torch.equal(merged.sums, one.sums + other.sums)
    assert torch.equal(merged.mass, one.mass + other.mass)
    assert one.__radd__(0) is one
    leaves, spec = pytree.tree_flatten(one)
    assert leaves[0] is one.sums
    assert leaves[1] is one.mass
    assert isinstance(pytree.tree_unflatten(leaves, spec), semshift.ClassSums)
    assert one == one
    assert one != semshift.ClassSums(one.sums, one.mass)


def test_class_sums_moves():
    """As a tensor does; counts stay int64."""
    counted = semshift.class_sums(*batch(dtype=torch.float32), 4)
    weighed = semshift.weighted_class_sums(torch.randn(2, 3, 5, requires_grad=True), torch.rand(2, 4, 5))
    for pooled, mass in ((counted, torch.int64), (weighed, torch.float64)):
        for wide in (
            pooled.to(torch.float64),
            pooled.to(device="cpu", dtype=torch.float64),
            pooled.to(torch.zeros(1).double()),
        ):
            assert (wide.sums.dtype, wide.mass.dtype) == (torch.float64, mass)
            assert torch.equal(wide.sums.float(), pooled.sums)
            assert torch.equal(wide.mass.to(pooled.mass.dtype), pooled.mass)
        away = pooled.to("meta", non_blocking=True)
        assert (away.sums.device.type, away.mass.device.type) == ("meta", "meta")
        copied = pooled.to("cpu", copy=True)
        assert copied.sums.data_ptr() != pooled.sums.data_ptr()
        assert copied.mass.data_ptr() != pooled.mass.data_ptr()
        with refuses(TypeError, "sums", torch.int32):
            pooled.to(torch.int32)
    detached = weighed.detach()
    assert weighed.sums.requires_grad
    assert not detached.sums.requires_grad
    assert detached.sums.data_ptr() == weighed.sums.data_ptr()
    assert not detached.mass.requires_grad


def test_class_sums_collate_and_copy():
    one, other = (semshift.class_sums(*batch(), 4) for _ in range(2))
    both = torch.utils.data.default_collate([{"pooled": one}, {"pooled": other}])["pooled"]
    assert torch.equal(both.sums, torch.stack([one.sums, other.sums]))
    assert torch.equal(both.mass, torch.stack([one.mass, other.mass]))
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert copied != one
        assert torch.equal(copied.sums, one.sums)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_class_sums_are_pinned():
    pinned = torch.utils.data._utils.pin_memory.pin_memory([semshift.class_sums(*batch(), 4)])[0]
    assert pinned.sums.is_pinned()
    assert pinned.mass.is_pinned()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_class_sums_in_other_peoples_loops(tmp_path):
    """Fabric, Lightning and Accelerate move, gather and save them inside a batch."""
    fabric_module = pytest.importorskip("lightning.fabric")
    lightning = pytest.importorskip("lightning.pytorch")
    accelerate = pytest.importorskip("accelerate")
    pooled = semshift.class_sums(*batch(), 4)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "sums.ckpt", {"pooled": pooled})
    module = lightning.LightningModule()
    for found in (
        fabric.to_device({"pooled": pooled}),
        fabric.all_gather({"pooled": pooled}),
        fabric.load(tmp_path / "sums.ckpt"),
        module.transfer_batch_to_device({"pooled": pooled}, torch.device("cpu"), 0),
        accelerate.utils.send_to_device({"pooled": pooled}, "cpu"),
    ):
        assert isinstance(found["pooled"], semshift.ClassSums)
        assert torch.equal(found["pooled"].sums, pooled.sums)
        assert torch.equal(found["pooled"].mass, pooled.mass)
    for found in (
        module.transfer_batch_to_device([pooled], torch.device("meta"), 0),
        accelerate.utils.send_to_device([pooled], "meta"),
    ):
        assert found[0].sums.device.type == found[0].mass.device.type == "meta"


@pytest.mark.parametrize("stranger", [1, 0.0, None, torch.zeros(4, 3), (), (1,)])
def test_class_sums_adds_to_its_kind_alone(stranger):
    one = semshift.class_sums(*batch(), 4)
    with pytest.raises(TypeError):
        one + stranger
    with pytest.raises(TypeError):
        stranger + one


@pytest.mark.parametrize(
    ("sums", "mass", "says"),
    [
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), ("sums", [4, 2], [3, 2])),
        (torch.zeros(4, 2).double(), torch.zeros(4).long(), ("sums", torch.float32, torch.float64)),
        (torch.zeros(4, 2), torch.zeros(4), ("mass", [4], torch.int64, torch.float32)),
        (torch.zeros(1, 4, 2), torch.zeros(1, 4), ("sums", [4, 2], [1, 4, 2])),
    ],
)
def test_unlike_sums_are_not_added(sums, mass, says):
    one = semshift.ClassSums(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with refuses(ValueError, *says):
        one + semshift.ClassSums(sums, mass)


def test_means_shield_an_absent_class_from_what_its_sums_hold():
    """A product on CUDA may leave NaN there; neither the means nor the gradients may see it."""
    sums = torch.tensor([[torch.nan, torch.inf], [2.0, 4.0]], requires_grad=True)
    mass = torch.tensor([0.0, 2.0], requires_grad=True)
    means = semshift.ClassSums(sums, mass).means
    assert means.tolist() == [[0, 0], [1, 2]]
    means.sum().backward()
    assert sums.grad.tolist() == [[0, 0], [0.5, 0.5]]
    assert mass.grad.tolist() == [0, -1.5]

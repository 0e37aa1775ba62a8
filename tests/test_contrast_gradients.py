"""The prototype contrast's gradients of both orders, in compiled graphs, under transforms, and over two ranks."""

import itertools

import pytest
import torch
from torch import distributed as dist

import semshift
from tests.test_contrast import MODES, C, K, drawn, loss_and_gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lacking", [False, True])
def test_gradients(mode, lacking):
    features, labels, prototypes = drawn(size=(8, 10))
    features, labels = features[:1, :3, :, :4].contiguous(), labels[:1, :, :8]
    prototypes = prototypes[..., :3].contiguous()
    if lacking:
        prototypes[0, 1] = 0
    # A class that is absent has no derivative: its row would make it present.
    there = (prototypes != 0).any(-1)

    def loss(features, rows):
        return semshift.prototype_contrast_loss(
            features, labels, prototypes.masked_scatter(there[..., None], rows), temperature=0.5, resample=mode
        )

    leaves = features.requires_grad_(), prototypes[there].requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    if lacking:
        assert torch.autograd.gradgradcheck(loss, leaves)


def test_a_bank_is_constant():
    bank = semshift.PrototypeBank(C, K)
    features, labels, _ = drawn(dtype=torch.float32)
    bank.update(semshift.class_sums(features, labels, K))
    features.requires_grad_()
    semshift.prototype_contrast_loss(features, labels, torch.stack([bank.means, bank.means])).backward()
    assert features.grad.abs().sum() > 0


def test_descent_draws_pixels_to_their_class():
    features, labels, prototypes = drawn(size=(4, 5))
    found = []
    for _ in range(20):
        loss, gradient, _ = loss_and_gradients(features, labels, prototypes)
        features = features - gradient
        found.append(loss.item())
    assert all(after < before for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("mode", [None, "bilinear"])
def test_full_graph(mode):
    features, labels, prototypes = drawn(size=(4, 5) if mode is None else (16, 20))
    prototypes[0, 1] = 0
    torch._dynamo.reset()

    def run(loss):
        leaf = features.clone().requires_grad_()
        value = loss(leaf, labels, prototypes, resample=mode)
        return value.detach(), *torch.autograd.grad(value, leaf)

    compiled = run(torch.compile(semshift.prototype_contrast_loss, fullgraph=True, backend="aot_eager"))
    for found, want in zip(compiled, run(semshift.prototype_contrast_loss)):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


# Of what torch loads for its forward mode.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_transforms():
    features, labels, prototypes = drawn()
    direction = torch.randn_like(features)

    def loss(features):
        return semshift.prototype_contrast_loss(features, labels, prototypes)

    _, gradient, _ = loss_and_gradients(features, labels, prototypes)
    torch.testing.assert_close(torch.func.grad(loss)(features), gradient)
    _, tangent = torch.func.jvp(loss, (features,), (direction,))
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    batch = torch.stack([features, features.flip(0)])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(one) for one in batch]))


# Ranks.

WORLD = 2


def on_rank(step, rank):
    """One rank's batch. Ranks have different numbers of images; first one rank has no labelled pixel, then neither."""
    features, labels, prototypes = drawn(step, dtype=torch.float64)
    mine = slice(0, 2) if rank == 0 else slice(1, 2)
    features, labels = features[mine] + rank, labels[mine].clone()
    if (step == 1 and rank == 0) or step == 2:
        labels.fill_(255)
    return features.clone(), labels, prototypes, ("bilinear", "bilinear", "bilinear", "area")[step]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = []
    for step in range(4):
        *arguments, mode = on_rank(step, rank)
        loss, gradient, _ = loss_and_gradients(*arguments, resample=mode)
        found.append((loss, gradient))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for step in range(4):
        held = [on_rank(step, rank) for rank in range(WORLD)]
        features, labels = (torch.cat([of_rank[part] for of_rank in held]) for part in range(2))
        loss, gradient, _ = loss_and_gradients(features, labels, held[0][2], resample=held[0][3])
        assert (loss == 0) == (step == 2)
        for (theirs, of_theirs), part in zip((of_rank[step] for of_rank in found), gradient.split([2, 1])):
            torch.testing.assert_close(theirs, loss, rtol=1e-13, atol=1e-13)
            # Gradients are averaged over ranks afterwards.
            torch.testing.assert_close(of_theirs / WORLD, part, rtol=1e-12, atol=1e-13)

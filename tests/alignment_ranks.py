"""Training of a case of alignment in one process or in two, and how the two compare."""

import dataclasses
import functools
import time
import traceback
import warnings

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

import semshift
from tests.alignment_cases import (
    CASES,
    LR,
    MODULES,
    NUM_CLASSES,
    SIZE,
    STEPS,
    WAIT,
    WORLD,
    WRAPPERS,
    Both,
    Segmenter,
    share,
)


def task_loss(logits, coarse, divide_by, world):
    """Cross-entropy of the whole batch; times the ranks, since gradients are averaged over them."""
    pixels = F.cross_entropy(logits, coarse, ignore_index=255, reduction="none").flatten(1).sum(1)
    return world * (pixels / divide_by).sum()


def modules(case):
    torch.manual_seed(1)
    return Segmenter().to(case.dtype), MODULES[case.module]().to(case.dtype)


def weight_of(case):
    """Of the confusion: so much that it shows after three steps."""
    return {"global": 500.0, "global spectral": 100.0}.get(case.module, 5.0)


def sums_apart(case, features, labels, sources):
    pooled = functools.partial(semshift.class_sums, num_classes=NUM_CLASSES, per_image=case.module == "per image")
    features = features.detach()
    return pooled(features[:sources], labels[:sources]), pooled(features[sources:], labels[sources:])


def train(case, rank=None, aligned=True):
    """Three steps, on a rank's share of the batch or, without one, on the whole."""
    segmenter, align = modules(case)
    model = Both(segmenter, align if aligned else None)
    if rank is not None:
        model.segmenter, model.align = WRAPPERS[case.segmenter](segmenter), WRAPPERS[case.align](align)
        model = WRAPPERS[case.together](model)
    # Not Adam, which hides a gradient that is too large by a factor.
    step_segmenter, step_discriminator = (
        torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9) for module in (segmenter, align)
    )
    found = {name: [] for name in ("gradients", "same again", "losses", "figures", "seen", "weight")}
    for step in range(STEPS):
        images, labels, coarse, divide_by, sources = share(case, step, rank)
        features, logits, losses = model(images, labels, sources)
        task = task_loss(logits, coarse, divide_by, 1 if rank is None else WORLD)
        step_segmenter.zero_grad()
        step_discriminator.zero_grad()
        if not aligned:
            task.backward()
            step_segmenter.step()
            continue
        weight = torch.tensor(weight_of(case))
        if case.weight == "balanced":
            weight = semshift.balanced_weight(task, losses.confusion, features, 0.5)
        loss = task + weight * losses.confusion
        if case.backward == "one":
            (loss + losses.discriminator).backward()
        elif case.backward == "discriminator first":
            losses.discriminator.backward()
            gradients = gradients_of(align)
            step_discriminator.step()
            loss.backward()
        else:
            loss.backward()
            if case.backward == "alternating":
                # A wrapper of DDP passes on the call alone; `compare` is the module's.
                losses = align.compare(*sums_apart(case, features, labels, sources))
            losses.discriminator.backward()
        if case.segmenter == "by hand":
            semshift.average_gradients(segmenter.parameters())
        step_segmenter.step()
        if case.backward != "discriminator first":
            gradients = gradients_of(align)
            if case.align != "fsdp":
                found["same again"].append(all(map(torch.equal, gradients, averaged(gradients))))
            step_discriminator.step()
        found["gradients"].append(gradients)
        found["losses"].append(torch.stack([losses.confusion.detach(), losses.discriminator.detach()]))
        found["figures"].append(losses.figures)
        found["seen"].append(align.seen.clone() if hasattr(align, "seen") else torch.empty(0))
        found["weight"].append(weight)
    return found | {
        name: {key: whole(value.detach()) for key, value in module.state_dict().items()}
        for name, module in (("segmenter", segmenter), ("alignment", align))
    }


def averaged(gradients):
    """Gradients averaged over ranks, without a change to the module's own."""
    parameters = [torch.empty_like(gradient).requires_grad_() for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    semshift.average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def gradients_of(module):
    return [whole(parameter.grad).clone() for parameter in module.parameters()]


def whole(tensor):
    """A tensor that ranks share, put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank, folder, names):
    """One rank; what it finds goes to a file, and the tests look at it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("error")
    found = {}
    for number, name in enumerate(names):
        # Shown where a process dies or hangs.
        print(f"rank {rank}: {name}", flush=True)
        start_group(f"{folder}/store {number}", rank)
        try:
            found[name] = train(CASES[name], rank)
        except Exception:
            found[name] = traceback.format_exc()
        # Kept for one case more: before torch 2.8 a group that goes at once may wait for ever for a thread of its own,
        # which waits for the interpreter to let go of a tensor (github.com/pytorch/pytorch/issues/56297).
        _kept = dist.group.WORLD
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def start_group(store, rank, world=WORLD):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=WAIT)


def run_ranks(function, folder, names, seconds):
    """The results of two processes; a failure if they take longer."""
    context = torch.multiprocessing.spawn(function, (str(folder), names), nprocs=WORLD, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                pytest.fail(f"the ranks were not done after {seconds} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@functools.cache
def alone(case, aligned=True):
    """One process on the whole batch, with one backward."""
    threads = torch.get_num_threads()
    # Tensors so small are slower on several.
    torch.set_num_threads(1)
    found = train(dataclasses.replace(case, backward="one"), aligned=aligned)
    torch.set_num_threads(threads)
    return found


def bound_of(case):
    """The bound on rounding: in each step, four sums add means over all pixels of the batch."""
    pixels = 8 * ((32 // 2) ** 2 if case.module.startswith("global") else (SIZE // 2) ** 2)
    return STEPS * 4 * pixels * torch.finfo(case.dtype).eps


def assert_close(found, expected, bound):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=bound, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def farthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_same_training(case, found):
    """Two processes find the same as one process on the whole batch, and the alignment has an effect."""
    assert not isinstance(found, str), found
    expected, bound = alone(case), bound_of(case)
    assert_close(found["segmenter"], expected["segmenter"], bound)
    assert_close(found["alignment"], expected["alignment"], bound)
    for step in range(STEPS if "losses" in found else 0):
        assert torch.equal(found["seen"][step], expected["seen"][step])
        assert_close(found["figures"][step], expected["figures"][step], bound)
        for key in ("losses", "weight"):
            torch.testing.assert_close(found[key][step], expected[key][step], rtol=bound, atol=bound)
    without = farthest(alone(case, aligned=False)["segmenter"], expected["segmenter"])
    assert without == 0 if case.labels == "nothing in common" else without > 10 * bound

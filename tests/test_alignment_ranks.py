"""Alignment over two ranks: parameters, losses and figures are those of one process on the whole batch.

One pair of processes runs all quick cases. Each case has a process group of its own, so a case that fails leaves the
others alone, and a collective that one rank misses is an error after a while, not a wait for ever.
"""

import dataclasses
import datetime
import functools
import importlib.util
import os
import time
import traceback
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import semshift

WORLD, STEPS, LR = 2, 3, 0.2
NUM_CLASSES, CHANNELS, SIZE = 4, 6, 16
WAIT = datetime.timedelta(seconds=30)


class Segmenter(nn.Module):
    """Features at half the images' size, and logits."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)
        self.head = nn.Conv2d(CHANNELS, NUM_CLASSES, 1)

    def forward(self, images):
        # Smooth, so that rounding never changes a sign.
        features = self.backbone(images).tanh()
        return features, self.head(features)


def semantic(**options):
    return semshift.SemanticAlignment(CHANNELS, NUM_CLASSES, hidden_channels=(16,), **options)


def output_maps(**options):
    return semshift.GlobalAlignment(NUM_CLASSES, base_channels=4, **options)


MODULES = {
    "per image": semantic,
    "per batch": functools.partial(semantic, per_image=False),
    "class and domain": functools.partial(semantic, conditioning="class-and-domain"),
    "spectral": functools.partial(semantic, spectral_norm=True, objective="hinge"),
    "global": output_maps,
    "global spectral": functools.partial(output_maps, spectral_norm=True, inputs="entropy"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of training; `segmenter` and `align` say how each is wrapped."""

    module: str = "per image"
    segmenter: str = "ddp"
    align: str = "plain"
    together: str = "plain"
    dtype: torch.dtype = torch.float64
    # Source and target images of each rank.
    images: tuple = ((2, 2), (2, 2))
    labels: str = "random"
    backward: str = "one"
    weight: str = "fixed"
    # Of the task loss: "whole" divides by the pixels of the whole batch; "local" by each rank's, as most loops do.
    task: str = "whole"


UNEQUAL = ((3, 1), (1, 3))
ABSENT = ("a rank without a common class", "nothing on a rank", "nothing in common", "come and go")
SHARDED = {"segmenter": "fsdp", "align": "fsdp"}
QUICK = {
    # Modules and wrappers.
    **{
        f"{module}, {align} module": Case(module, align=align)
        for module in ("per image", "per batch", "global")
        for align in ("plain", "ddp")
    },
    "per image, fsdp segmenter": Case(segmenter="fsdp"),
    **{f"{module}, fsdp both": Case(module, **SHARDED) for module in ("per image", "global")},
    "class and domain, plain module": Case("class and domain"),
    "spectral, ddp module": Case("spectral", align="ddp"),
    **{
        f"float32, {module}, {align} module": Case(module, align=align, dtype=torch.float32)
        for module, align in (("per image", "plain"), ("per batch", "ddp"), ("global", "plain"))
    },
    # What ranks hold need not be alike.
    **{f"per image, {labels}": Case(labels=labels) for labels in ABSENT},
    **{f"per batch, {labels}": Case("per batch", labels=labels) for labels in ABSENT[:2]},
    **{f"{module}, unequal": Case(module, images=UNEQUAL) for module in ("per image", "per batch", "global")},
    # Two optimisers have two backwards, in either order; or the discriminator's step has sums of its own.
    "plain module, confusion first": Case(backward="confusion first"),
    "ddp module, discriminator first": Case("per batch", align="ddp", backward="discriminator first"),
    "ddp module, alternating": Case(align="ddp", backward="alternating"),
    **{
        f"balanced, {name}": Case(weight="balanced", **options)
        for name, options in {
            "per image": {},
            "per batch, unequal": {"module": "per batch", "images": UNEQUAL},
            "local means": {"images": ((3, 1), (1, 2)), "task": "local"},
        }.items()
    },
}
SLOW = {
    **{f"{module}, fsdp segmenter": Case(module, segmenter="fsdp") for module in ("per batch", "global")},
    **{
        f"{module}, fsdp both": Case(module, **SHARDED)
        for module in ("per batch", "class and domain", "spectral", "global spectral")
    },
    **{
        f"{module}, {align} module": Case(module, align=align)
        for module, align in (
            ("class and domain", "ddp"),
            ("spectral", "plain"),
            ("global spectral", "plain"),
            ("global spectral", "ddp"),
        )
    },
    "averaged by hand": Case(segmenter="by hand"),
    "ddp that looks for unused parameters": Case(align="ddp unused"),
    "both in one ddp": Case(segmenter="plain", together="ddp"),
    "both in one fsdp": Case(**SHARDED, together="fsdp"),
    **{f"per batch, {labels}": Case("per batch", labels=labels) for labels in ABSENT[2:]},
    **{f"class and domain, {labels}": Case("class and domain", labels=labels) for labels in ABSENT},
    **{f"ddp module, {labels}": Case(align="ddp", labels=labels) for labels in ABSENT},
    "class and domain, unequal": Case("class and domain", images=UNEQUAL),
    "ddp module, unequal": Case(align="ddp", images=UNEQUAL),
    "fsdp both, unequal": Case(**SHARDED, images=UNEQUAL),
    **{
        f"{module}, a rank without source images": Case(module, images=((4, 1), (0, 3)))
        for module in ("per image", "per batch", "global")
    },
    "per batch, ddp module, confusion first": Case("per batch", align="ddp", backward="confusion first"),
    "per image, plain module, discriminator first": Case(backward="discriminator first"),
    "per batch, plain module, alternating": Case("per batch", backward="alternating"),
    **{
        f"fsdp both, {backward}": Case(**SHARDED, backward=backward)
        for backward in ("confusion first", "discriminator first", "alternating")
    },
    "global, confusion first": Case("global", backward="confusion first"),
    "global, ddp module, discriminator first": Case("global", align="ddp", backward="discriminator first"),
    **{
        f"balanced, {name}": Case(weight="balanced", **options)
        for name, options in {
            "global": {"module": "global"},
            "ddp module": {"align": "ddp"},
            "fsdp both": SHARDED,
            "nothing on a rank": {"labels": "nothing on a rank"},
            "nothing in common": {"labels": "nothing in common"},
        }.items()
    },
}
CASES = QUICK | SLOW
IN_LIGHTNING = ("per image, plain module", "global, plain module")


def rows_of(case, rank):
    """The rows of `batch` that a rank holds."""
    (first, second), (third, fourth) = zip(*case.images)
    sources = [range(first), range(first, first + second)][rank]
    targets = [range(third), range(third, third + fourth)][rank]
    return list(sources), [first + second + row for row in targets]


def batch(case, step):
    """Images and labels of the whole batch, source first."""
    sources = sum(source for source, _ in case.images)
    count = sources + sum(target for _, target in case.images)
    generator = torch.Generator().manual_seed(10 + step)
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    images[sources:] += 0.5
    labels = torch.randint(0, NUM_CLASSES, (count, 4, 4), generator=generator)
    labels = labels.repeat_interleave(SIZE // 4, 1).repeat_interleave(SIZE // 4, 2)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    (source_0, target_0), (source_1, target_1) = rows_of(case, 0), rows_of(case, 1)

    def relabel(rows, *table):
        for row in rows:
            labels[row] = semshift.remap_labels(labels[row], dict(enumerate(table)) | {255: 255})

    if case.labels == "a rank without a common class":
        # The second rank's source has class 2, which the first rank's target has; its target has 3, which none has.
        relabel(source_0, 0, 1, 0, 1)
        relabel(source_1, 2, 2, 2, 2)
        relabel(target_0, 0, 1, 2, 2)
        relabel(target_1, 3, 3, 3, 3)
    elif case.labels == "nothing on a rank":
        labels[source_1 + target_1] = 255
    elif case.labels == "nothing in common":
        relabel(source_0 + source_1, 0, 1, 1, 0)
        relabel(target_0 + target_1, 2, 3, 2, 3)
    elif case.labels == "come and go":
        # Class 3: the second rank's target in the first step, then the first's source, then the first's target.
        with_3 = [target_1, source_0, target_0][step]
        relabel([row for row in range(count) if row not in with_3], 0, 1, 2, 2)
    return images.to(case.dtype), labels


class Both(nn.Module):
    """Segmenter and alignment, one forward for both."""

    def __init__(self, segmenter, align):
        super().__init__()
        self.segmenter, self.align = segmenter, align

    def forward(self, images, labels, sources):
        features, logits = self.segmenter(images)
        if self.align is None:
            return features, logits, None
        if isinstance(getattr(self.align, "module", self.align), semshift.GlobalAlignment):
            losses = self.align(logits[:sources], logits[sources:], size=(32, 32))
        else:
            losses = self.align(features[:sources], labels[:sources], features[sources:], labels[sources:])
        return features, logits, losses


def fully_sharded(module):
    fsdp.fully_shard(module)
    if hasattr(module, "compare"):
        # FSDP gathers the parameters for calls of the module itself; for other methods it has to know.
        fsdp.register_fsdp_forward_method(module, "compare")
    return module


WRAPPERS = {
    "plain": lambda module: module,
    "by hand": lambda module: module,
    "ddp": DistributedDataParallel,
    "ddp unused": functools.partial(DistributedDataParallel, find_unused_parameters=True),
    "fsdp": fully_sharded,
}


def share(case, step, rank):
    """The batch of one step, all of it or a rank's share, and what divides each image's sum of pixel losses."""
    images, labels = batch(case, step)
    coarse = labels[:, ::2, ::2]
    counts = (coarse != 255).flatten(1).sum(1)
    divide_by = counts.sum().expand(len(counts)).clone()
    if case.task == "local":
        for source_rows, target_rows in (rows_of(case, rank) for rank in range(WORLD)):
            rows = source_rows + target_rows
            divide_by[rows] = WORLD * counts[rows].sum()
    if rank is None:
        return images, labels, coarse, divide_by, sum(source for source, _ in case.images)
    source_rows, target_rows = rows_of(case, rank)
    rows = source_rows + target_rows
    return images[rows], labels[rows], coarse[rows], divide_by[rows], len(source_rows)


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
    """What each of two processes found; a failure if they take longer."""
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


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """What both ranks found in the cases that this run of pytest asks for."""
    tests = [item for item in request.session.items if "ranks" in getattr(item, "fixturenames", ())]
    names = list(dict.fromkeys(item.callspec.params["name"] for item in tests if item.path == request.path))
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), names, 240)


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
    """What rounding can do: in each step four sums are over all pixels of the batch, of numbers that are means."""
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
    """What was found is what one process finds on the whole batch, and the alignment has a say in it."""
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


def marked(name):
    marks = [pytest.mark.slow] if name in SLOW else []
    if "fsdp" in (CASES[name].segmenter, CASES[name].align):
        marks.append(pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="needs torch 2.6"))
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
class TestTwoRanks:
    def test_three_steps_are_those_of_one_process(self, name, ranks):
        case = CASES[name]
        for every in ranks:
            assert_same_training(case, every[name])
            for key in ("losses", "weight"):
                assert torch.equal(torch.stack(every[name][key]), torch.stack(ranks[0][name][key]))

    def test_every_rank_holds_the_whole_gradient_of_the_discriminator(self, name, ranks):
        case = CASES[name]
        expected = alone(case)["gradients"]
        for found in (every[name] for every in ranks):
            assert not isinstance(found, str), found
            assert all(found["same again"])
            for step in range(STEPS):
                mine, theirs = found["gradients"][step], ranks[0][name]["gradients"][step]
                assert all(map(torch.equal, mine, theirs))
                for gradient, whole_gradient in zip(mine, expected[step]):
                    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=bound_of(case))
        if case.labels == "nothing in common":
            assert not any(gradient.any() for step in expected for gradient in step)


@pytest.mark.parametrize("name", [marked(f"{module}, come and go") for module in ("per image", "per batch")])
def test_seen_is_the_union_over_ranks(name, ranks):
    """Class 3 is in the second rank's target at first, and in the first rank's source after that."""
    for found in (every[name] for every in ranks):
        assert found["seen"][0].tolist() == [[True, True, True, False], [True] * 4]
        assert found["seen"][1].all()


@pytest.mark.parametrize("module", MODULES)
def test_a_group_of_one_rank_changes_nothing(module, tmp_path):
    cases = [Case(module), Case(module, weight="balanced")]
    for case in cases:
        alone(case)
    start_group(tmp_path / "store", rank=0, world=1)
    try:
        for case in cases:
            assert_same_training(case, train(case))
    finally:
        dist.destroy_process_group()


def work_in_lightning(rank, folder, names):
    """One rank of Lightning's own loop: automatic optimisation, and one optimiser for segmenter and discriminator."""
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Adapting(lightning.LightningModule):
        def __init__(self, case):
            super().__init__()
            self.case = case
            segmenter, align = modules(case)
            self.both = Both(segmenter, align)

        def training_step(self, batch):
            images, labels, coarse, divide_by, sources = batch
            _, logits, losses = self.both(images, labels, sources)
            task = task_loss(logits, coarse, divide_by, WORLD)
            return task + weight_of(self.case) * losses.confusion + losses.discriminator

        def configure_optimizers(self):
            groups = [{"params": self.both.segmenter.parameters()}, {"params": self.both.align.parameters(), "lr": LR}]
            return torch.optim.SGD(groups, lr=LR, momentum=0.9)

    torch.set_num_threads(1)
    # As torchrun does, so that Lightning starts no process of its own.
    os.environ["LOCAL_RANK"] = str(rank)
    found = {}
    for number, name in enumerate(names):
        start_group(f"{folder}/store {number}", rank)
        model = Adapting(CASES[name])
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=DDPStrategy(process_group_backend="gloo"),
            max_epochs=1,
            barebones=True,
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
        steps = [share(CASES[name], step, rank) for step in range(STEPS)]
        trainer.fit(model, torch.utils.data.DataLoader(steps, batch_size=None))
        assert trainer.global_step == STEPS
        found[name] = {
            "segmenter": model.both.segmenter.state_dict(),
            "alignment": model.both.align.state_dict(),
            "gradients": gradients_of(model.both.align),
        }
        dist.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")
def test_lightning_with_automatic_optimisation(tmp_path):
    ranks = run_ranks(work_in_lightning, tmp_path, IN_LIGHTNING, 240)
    for name in IN_LIGHTNING:
        for every in ranks:
            assert_same_training(CASES[name], every[name])
            assert all(map(torch.equal, every[name]["gradients"], ranks[0][name]["gradients"]))

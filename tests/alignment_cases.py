"""Cases of alignment over ranks: the batch, what each rank holds of it, and how it is wrapped."""

import dataclasses
import datetime
import functools

import torch
from torch import nn
from torch.distributed import fsdp
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

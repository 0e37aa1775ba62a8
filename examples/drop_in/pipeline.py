"""A `DataLoader` pipeline of three data sets, with `MixedBatchSampler` in place of cycled loaders.

The program shows that a resumed run ends with the same weights as an uninterrupted one. Lines that end in `# +` are
added. Comments that begin with `# - ` are the lines that they replace.
"""

# - from itertools import chain, islice, repeat
import functools  # +
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import data

import semshift  # +

CLASSES = 4
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
SIZES = {"source": 100, "labelled": 8, "unlabelled": 50}
PER_BATCH = {"source": 2, "labelled": 1, "unlabelled": 2}


class Blocks(data.Dataset[dict[str, Any]]):
    """Images of coloured blocks, with labels. An image's number is the seed that draws it."""

    def __init__(self, domain: str, count: int) -> None:
        self.domain, self.count = domain, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An image and its number, and its labels except in the unlabelled domain."""
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, CLASSES, (4, 6), generator=generator)
        labels = labels.repeat_interleave(8, 0).repeat_interleave(8, 1)
        image = COLOURS[labels].movedim(-1, 0) + 0.2 * torch.randn(3, 32, 48, generator=generator)
        if self.domain != "source":
            image = 0.6 * image.roll(1, 0) + 0.4 * image
        sample = {"image": image, "number": index}
        return sample if self.domain == "unlabelled" else sample | {"labels": labels}


def batches(step: int, left: int) -> Iterable[dict[str, Any]]:
    """The next `left` batches `{domain: its images}` from `step` on, with two workers."""
    domains = {name: Blocks(name, size) for name, size in SIZES.items()}
    # - options = {"shuffle": True, "num_workers": 2}
    # - loaders = [data.DataLoader(d, PER_BATCH[n], **options) for n, d in domains.items()]
    # - endless = (chain.from_iterable(repeat(loader)) for loader in loaders)
    # - return (dict(zip(domains, parts)) for parts in islice(zip(*endless), left))
    images: data.ConcatDataset[Any] = data.ConcatDataset(domains.values())  # +
    sampler = semshift.MixedBatchSampler(SIZES, PER_BATCH, seed=0, first_step=step, steps=left)  # +
    collate = functools.partial(semshift.collate_by_domain, per_batch=PER_BATCH)  # +
    return data.DataLoader(images, batch_sampler=sampler, num_workers=2, collate_fn=collate)  # +


def train(steps: int = 100, checkpoint: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train from a checkpoint or from scratch. Returns a checkpoint, and how often each image was seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    seen = {name: torch.zeros(size) for name, size in SIZES.items()}
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
    first = 0 if checkpoint is None else checkpoint["step"]
    for batch in batches(first, steps - first):
        loss = torch.zeros(())
        for domain, part in batch.items():
            seen[domain][part["number"]] += 1
            logits = model(part["image"])
            if domain == "unlabelled":
                loss = loss - 0.01 * (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            else:
                loss = loss + F.cross_entropy(logits, part["labels"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": steps}, seen


if __name__ == "__main__":
    whole, seen = train()
    resumed, _ = train(checkpoint=train(60)[0])
    for domain, times in seen.items():
        print(f"{domain}: each image was seen {int(times.min())} to {int(times.max())} times")
    same = all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    print(f"resumed at step 60, the weights are {'the same' if same else 'different'}")

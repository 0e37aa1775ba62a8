"""A pipeline of three data sets with worker processes, moved to `MixedBatchSampler`, and resumed.

Lines that end in `# +` are added, comments that begin with `# - ` are the lines that they replace.
"""

# - import itertools
import functools  # +
from collections.abc import Iterator
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
    """Images of coloured blocks and labels, as from a folder; the number of an image is its seed."""

    def __init__(self, domain: str, count: int) -> None:
        self.domain, self.count = domain, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An image and its number; its labels too, except in the unlabelled domain."""
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, CLASSES, (4, 6), generator=generator)
        labels = labels.repeat_interleave(8, 0).repeat_interleave(8, 1)
        image = COLOURS[labels].movedim(-1, 0) + 0.2 * torch.randn(3, 32, 48, generator=generator)
        if self.domain != "source":
            image = 0.6 * image.roll(1, 0) + 0.4 * image
        sample = {"image": image, "number": index}
        return sample if self.domain == "unlabelled" else sample | {"labels": labels}


def batches(step: int, steps: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Batches `{domain: its images}` from `step` on, by a pool of two processes."""
    domains = {name: Blocks(name, size) for name, size in SIZES.items()}
    # - loaders = [data.DataLoader(d, PER_BATCH[n], shuffle=True, num_workers=2) for n, d in domains.items()]
    # - parts = zip(*(itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders))
    # - return (dict(zip(domains, part)) for part in itertools.islice(parts, steps - step))
    everything: data.ConcatDataset[Any] = data.ConcatDataset(domains.values())  # +
    sampler = semshift.MixedBatchSampler(SIZES, PER_BATCH, seed=seed, first_step=step, steps=steps - step)  # +
    collate = functools.partial(semshift.collate_by_domain, per_batch=PER_BATCH)  # +
    return iter(data.DataLoader(everything, batch_sampler=sampler, num_workers=2, collate_fn=collate))  # +


def train(steps: int = 100, checkpoint: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train from a checkpoint or from scratch; returns a checkpoint, and how often each image was seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 1))
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    seen = {name: torch.zeros(size) for name, size in SIZES.items()}
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimiser.load_state_dict(checkpoint["optimiser"])
    for batch in batches(checkpoint["step"] if checkpoint is not None else 0, steps):
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

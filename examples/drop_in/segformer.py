"""Hugging Face's SegFormer under Accelerate, with semantic-level alignment added.

The model is `SegformerForSemanticSegmentation` with a tiny configuration and random weights. The features are the
encoder's last hidden states. One backward and one optimiser serve the segmenter and the discriminator. Lines that end
in `# +` are added. The line that ends in `# check` logs the figures.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import semshift  # +

CLASSES = 4
COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


def load(domain: str, count: int = 1) -> tuple[Tensor, Tensor]:
    """Blocks of colours `[B, 3, 32, 48]` with labels `[B, 32, 48]`; the target's colours are mixed."""
    labels = torch.randint(0, CLASSES, (count, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


def loader(domain: str, count: int) -> DataLoader[dict[str, Tensor]]:
    """Batches as from an image processor: `pixel_values` and `labels`."""
    images, labels = load(domain, count)
    return DataLoader([{"pixel_values": i, "labels": y} for i, y in zip(images, labels)], batch_size=4)  # type: ignore[arg-type]  # a list is a data set too


def train(steps: int = 100, **options: Any) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Train. Returns the network and the alignment's figures at every step."""
    torch.manual_seed(0)
    log: list[dict[str, Tensor]] = []
    accelerator = Accelerator(cpu=True, **options)
    config = SegformerConfig(
        num_labels=CLASSES,  # type: ignore[call-arg]  # the base class takes it
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    config.output_hidden_states = True  # +
    model = SegformerForSemanticSegmentation(config)
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    loaders = loader("source", 4 * steps), loader("target", 8)
    model, adam, *loaders = accelerator.prepare(model, adam, *loaders)
    align = accelerator.prepare(semshift.SemanticAlignment(32, CLASSES, spectral_norm=True))  # +
    adam.add_param_group({"params": align.parameters(), "lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0})  # +
    few = list(loaders[1])
    for step, batch_s in enumerate(loaders[0]):
        batch_t = few[step % len(few)]
        labels_s, labels_t = batch_s["labels"], batch_t["labels"]
        out_s, out_t = model(**batch_s), model(**batch_t)
        loss = out_s.loss + out_t.loss
        losses = align(out_s.hidden_states[-1], labels_s, out_t.hidden_states[-1], labels_t)  # +
        loss = loss + semshift.Sigmoid(0.0, 0.3, 50)(step) * losses.confusion + losses.discriminator  # +
        adam.zero_grad()
        accelerator.backward(loss)
        adam.step()

        log.append(losses.figures)  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """The features that were aligned."""
    result: Tensor = model(pixel_values=images, output_hidden_states=True).hidden_states[-1]
    return result


def report(log: list[dict[str, Tensor]]) -> None:
    """Print the mean of each figure over every twenty steps."""
    for step in range(0, len(log), 20):
        rows = log[step : step + 20]
        means = {name: torch.stack([row[name] for row in rows]).nanmean().item() for name in rows[0]}
        print(f"steps {step:2} on: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))


if __name__ == "__main__":
    report(train()[1])

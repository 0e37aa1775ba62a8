"""Hugging Face's SegFormer under Accelerate, with semantic-level alignment added.

`SegformerForSemanticSegmentation` from a tiny random configuration; the features are the encoder's last hidden states.
The gradient is turned round at the target's prototypes, so one backward and one optimiser serve both players. Lines
that end in `# +` are added, `# check` watches them.
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
    semshift.labels.check_labels(labels, CLASSES)  # +
    images = COLOURS[labels].movedim(-1, 1) + 0.2 * torch.randn(count, 3, 32, 48)
    return (images if domain == "source" else 0.6 * images.roll(1, 1) + 0.4 * images), labels


def loader(domain: str, count: int) -> DataLoader[dict[str, Tensor]]:
    """What a processor gives: `pixel_values` and `labels`."""
    images, labels = load(domain, count)
    return DataLoader([{"pixel_values": i, "labels": y} for i, y in zip(images, labels)], batch_size=4)  # type: ignore[arg-type]  # because a list will do


def train(steps: int = 100, **options: Any) -> tuple[nn.Module, list[tuple[float, float, float]]]:
    """Train; returns the network, and step by step the critic's accuracy on both domains and their distance."""
    torch.manual_seed(0)
    log: list[tuple[float, float, float]] = []
    accelerator = Accelerator(cpu=True, **options)
    config = SegformerConfig(
        num_labels=CLASSES,  # type: ignore[call-arg]  # because it goes to the base class
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
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    loaders = loader("source", 4 * steps), loader("target", 8)
    model, optimiser, *loaders = accelerator.prepare(model, optimiser, *loaders)
    critic = accelerator.prepare(semshift.discriminators.PrototypeDiscriminator(32, CLASSES, spectral_norm=True))  # +
    optimiser.add_param_group({"params": critic.parameters(), "lr": 1e-2})  # +
    few = list(loaders[1])
    for step, batch_s in enumerate(loaders[0]):
        batch_t = few[step % len(few)]
        labels_s, labels_t = batch_s["labels"], batch_t["labels"]
        out_s, out_t = model(**batch_s), model(**batch_t)
        loss = out_s.loss + out_t.loss
        source = semshift.pooling.class_sums(out_s.hidden_states[-1], labels_s, CLASSES, resample="bilinear")  # +
        target = semshift.pooling.class_sums(out_t.hidden_states[-1], labels_t, CLASSES, resample="bilinear")  # +
        both = source.present & target.present  # +
        logits = critic(source.means.detach()), critic(semshift.losses.reverse_gradient(target.means, scale=3.0))  # +
        loss = loss + semshift.losses.discriminator_loss(*logits, source_weight=both, target_weight=both)  # +
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()

        accuracy = semshift.health.domain_accuracy(*logits, source_weight=both, target_weight=both)  # check
        distance = semshift.health.prototype_distance(source.means, target.means, weight=both).nanmean()  # check
        log.append((accuracy.source.item(), accuracy.target.item(), distance.item()))  # check
    return model, log


def features(model: Any, images: Tensor) -> Tensor:
    """What was aligned."""
    result: Tensor = model(pixel_values=images, output_hidden_states=True).hidden_states[-1]
    return result


if __name__ == "__main__":
    _, log = train()
    for step in range(0, len(log), 20):
        right_s, right_t, apart = torch.tensor(log[step : step + 20]).nanmean(0).tolist()
        print(f"steps {step:2} on: critic right on {right_s:.2f} of source, {right_t:.2f} of target; {apart:.2f} apart")

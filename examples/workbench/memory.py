"""How much memory a step of training will take, before it is taken."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from examples.workbench.domains import segments_unlabelled
from examples.workbench.settings import METHODS, Settings

__all__ = ["Memory", "estimate_memory"]


class Memory(NamedTuple):
    """Bytes of a step, by what they are for."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    """Of the parameters that learn."""
    optimisers: int
    """One tensor of a parameter's size for SGD with momentum, two for Adam."""
    activations: int
    """What autograd keeps from the forward for the backward, with the copies of weights that it keeps: those of the
    frozen discriminators, and under autocast the segmenter's."""

    def __str__(self) -> str:
        """In GiB, the sum first."""
        parts = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in self._asdict().items())
        return f"memory of a step, estimated: {sum(self) / 2**30:.2f} GiB ({parts})"


def estimate_memory(settings: Settings, segmenter: nn.Module, discriminators: Mapping[str, nn.Module]) -> Memory:
    """Estimate the memory of a step from the tensors that a forward without data, on the meta device, keeps.

    An estimate: the images of every domain, and once more the unlabelled ones that a teacher has labelled, go through
    the segmenter, the up-sampled logits into the loss and the global discriminator. It leaves out prototypes, the
    gradient penalty, spectral norm's copies of weights, the workspace of convolutions, tensors that live within one
    operation, and what an allocator holds in reserve; and it counts activations and gradients as if all were there at
    once, while a backward frees the ones as it makes the others. The tests hold it within an eighth of the largest sum
    of tensors that live at once in a run on the CPU; leave room above it on a GPU.

    Args:
        settings: of the run.
        segmenter: the run's, on any device; it is neither copied nor changed.
        discriminators: the run's, by name.
    """
    half = settings.precision == "bf16-mixed"
    dtype = {"64-true": torch.float64, "32-true": torch.float32, "bf16-mixed": torch.bfloat16}[settings.precision]
    data, how = settings.data, settings.optimiser
    uses = METHODS[settings.method]
    taught = "self-training" in uses
    domains: dict[str, int] = {domain: how.images for domain in ("source", "labelled") if domain in uses}

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Held, so that no two storages get one address.
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    stand_in = _on_meta(segmenter, dtype)
    of_discriminators = {
        name: _on_meta(discriminators[name], torch.promote_types(dtype, torch.float32))
        for name in discriminators
        if name != "semantic"
    }
    domains |= {"unlabelled": how.unlabelled} if segments_unlabelled(settings, discriminators) else {}
    domains |= {"mixed": how.unlabelled} if taught and settings.self_training.weight > 0 else {}
    outputs = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for domain, images in domains.items():
            size = data.source_size if domain == "source" and data.source_size else data.size
            batch = torch.empty(images, 3, *size, device="meta", dtype=dtype)
            output = functional_call(segmenter, stand_in, (batch,))
            for name, logits in (("global", output.logits), ("auxiliary", output.auxiliary)):
                if logits is None or (name == "auxiliary" and domain == "mixed"):
                    continue
                logits = F.interpolate(
                    logits.to(torch.promote_types(dtype, torch.float32)),
                    size=size,
                    mode="bilinear",
                    align_corners=False,
                )
                if domain != "unlabelled":
                    labels = torch.empty(images, *size, device="meta", dtype=torch.int64)
                    outputs.append(F.cross_entropy(logits, labels, ignore_index=data.ignore_index))
                if (
                    name in of_discriminators
                    and settings.global_adversary.against in (domain, "both")
                    and domain in uses
                ):
                    outputs.append(logits.softmax(1))
                if name in of_discriminators and domain == "unlabelled":
                    outputs.append(functional_call(discriminators[name], of_discriminators[name], (logits.softmax(1),)))
    for tensor in (*stand_in.values(), *(tensor for of in of_discriminators.values() for tensor in of.values())):
        kept.pop(tensor.untyped_storage()._cdata, None)

    learning = _bytes(parameter for parameter in segmenter.parameters() if parameter.requires_grad)
    discriminators_learning = _bytes(parameter for each in discriminators.values() for parameter in each.parameters())
    # The teacher has the segmenter's tensors once more.
    everything = [segmenter, *discriminators.values(), *([segmenter] if taught else [])]
    return Memory(
        weights=_bytes(tensor for module in everything for tensor in (*module.parameters(), *module.buffers())),
        gradients=learning + discriminators_learning,
        optimisers=learning * (2 if how.name == "adamw" else 1) + 2 * discriminators_learning,
        activations=sum(storage.nbytes() for storage in kept.values())
        + discriminators_learning
        + (_bytes(segmenter.parameters()) // 2 if half else 0),
    )


def _on_meta(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors without memory in the place of a module's own."""

    def like(tensor: Tensor) -> Tensor:
        meta = torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        return meta.requires_grad_(tensor.requires_grad)

    return {name: like(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

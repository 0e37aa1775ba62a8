"""Which settings no run could honour."""

import math

import torch

from examples.workbench.data import InputError
from examples.workbench.settings import Network, Settings

__all__ = ["check", "check_accelerator"]


def check(settings: Settings) -> None:
    """Refuse settings that no run could honour.

    Raises:
        InputError: naming the setting, the rule and the value.
    """
    data, scenes = settings.data, settings.data.scenes
    counts = {
        "labelled": settings.labelled,
        "steps": settings.steps,
        "log_every": settings.log_every,
        "save_every": settings.save_every,
        "data.scenes.source": scenes.source,
        "data.scenes.target": scenes.target,
        "data.scenes.validation": scenes.validation,
        "data.scenes.test": scenes.test,
        "optimiser.images": settings.optimiser.images,
        "optimiser.unlabelled": settings.optimiser.unlabelled,
        "global_adversary.every": settings.global_adversary.every,
        "global_adversary.base_channels": settings.global_adversary.base_channels,
        "semantic_adversary.every": settings.semantic_adversary.every,
        "semantic_adversary.hidden_channels": min(settings.semantic_adversary.hidden_channels, default=1),
    }
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"expected {name} of at least 1, got {value}")
    amounts = {
        "seed": settings.seed,
        "validate_every": settings.validate_every,
        "data.workers": data.workers,
        "data.timeout": data.timeout,
        "optimiser.weight_decay": settings.optimiser.weight_decay,
        "optimiser.auxiliary_weight": settings.optimiser.auxiliary_weight,
        "optimiser.power": settings.optimiser.power,
        "global_adversary.power": settings.global_adversary.power,
        "semantic_adversary.power": settings.semantic_adversary.power,
        "global_adversary.weight": settings.global_adversary.weight,
        "global_adversary.auxiliary_weight": settings.global_adversary.auxiliary_weight,
        "global_adversary.r1": settings.global_adversary.r1,
        "semantic_adversary.weight": settings.semantic_adversary.weight,
        "self_training.weight": settings.self_training.weight,
        "semantic_adversary.r1": settings.semantic_adversary.r1,
    }
    for name, amount in amounts.items():
        if not (math.isfinite(amount) and amount >= 0):
            raise InputError(f"expected {name} to be finite and not negative, got {amount}")
    rates = {
        "optimiser.learning_rate": settings.optimiser.learning_rate,
        "optimiser.classifier_factor": settings.optimiser.classifier_factor,
        "global_adversary.learning_rate": settings.global_adversary.learning_rate,
        "semantic_adversary.learning_rate": settings.semantic_adversary.learning_rate,
        "self_training.rare_class_temperature": settings.self_training.rare_class_temperature,
    }
    for name, rate in rates.items():
        if not (math.isfinite(rate) and rate > 0):
            raise InputError(f"expected {name} to be finite and positive, got {rate}")
    shares = {
        "global_adversary.start": settings.global_adversary.start,
        "global_adversary.ramp": settings.global_adversary.ramp,
        "semantic_adversary.start": settings.semantic_adversary.start,
        "semantic_adversary.ramp": settings.semantic_adversary.ramp,
        "self_training.start": settings.self_training.start,
        "self_training.source_fade": settings.self_training.source_fade,
        "self_training.ramp": settings.self_training.ramp,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"expected {name} to be a share of the steps in [0, 1], got {share}")
    plus = settings.self_training
    for name, factor in (("momentum", plus.momentum), ("threshold", plus.threshold)):
        if not 0 <= factor < 1:
            raise InputError(f"expected self_training.{name} in [0, 1), got {factor}")
    _check_network(settings.network)
    check_accelerator(settings)
    for name, size in (("size", data.size), ("source_size", data.source_size)):
        if size is not None and min(size) < 32:
            raise InputError(f"expected data.{name} of at least 32 each way, got {list(size)}")
    if data.source is None and data.source_size is not None:
        raise InputError(f"expected data.source_size with data.source only, got {list(data.source_size)}")
    if settings.global_adversary.against == "both" and data.source_size not in (None, data.size):
        raise InputError(
            "expected data.source_size as data.size with global_adversary.against both, "
            f"got {list(data.source_size)} and {list(data.size)}"
        )
    decay = settings.optimiser.decay_steps
    if decay is not None and decay < settings.steps:
        raise InputError(f"expected optimiser.decay_steps of at least the {settings.steps} steps, got {decay}")
    if not 2 <= len(data.classes) <= 255 or len(set(data.classes)) < len(data.classes):
        raise InputError(f"expected data.classes to be 2 to 255 different names, got {data.classes}")
    if not len(data.classes) <= data.ignore_index <= 255:
        raise InputError(
            f"expected data.ignore_index between the number of classes, {len(data.classes)}, and 255, "
            f"got {data.ignore_index}"
        )
    for name, members in data.subsets.items():
        unknown = [member for member in members if member not in data.classes]
        if unknown or not members:
            raise InputError(f"expected data.subsets.{name} to list names of data.classes, got {members}")
    semantic = settings.semantic_adversary
    if semantic.conditioning == "class-and-domain" and (semantic.objective != "bce" or semantic.r1 > 0):
        raise InputError(
            "expected semantic_adversary.objective bce and r1 0 with semantic_adversary.conditioning class-and-domain, "
            f"got {semantic.objective} and {semantic.r1}"
        )


def check_accelerator(settings: Settings) -> None:
    """Refuse an accelerator that there is not, or that cannot do what the settings want.

    Raises:
        InputError: it is none of those known, this machine has none, or it does not know float64.
    """
    name = settings.accelerator
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"expected accelerator to be one of auto, cpu, cuda, mps, got {name}")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"expected an accelerator that this machine has, such as --accelerator cpu, got {name}")
    if name == "mps" and settings.precision == "64-true":
        raise InputError("expected precision 32-true or bf16-mixed on mps, got 64-true")


def _check_network(network: Network) -> None:
    if network.width < 8 or network.width % 8:
        raise InputError(f"expected network.width to be a positive multiple of 8, got {network.width}")
    if not network.aspp_dilations or min(network.aspp_dilations) < 1:
        raise InputError(
            f"expected network.aspp_dilations to be one or more of at least 1, got {list(network.aspp_dilations)}"
        )
    if network.name == "small" and network.init is not None:
        raise InputError(f"expected network.init with deeplab-v2 and segformer only, got {network.init} with small")
    for name in ("frozen_batch_norm", "auxiliary"):
        if network.name != "deeplab-v2" and getattr(network, name):
            raise InputError(f"expected network.{name} with deeplab-v2 only, got it with {network.name}")
    if network.config is not None and (network.name != "segformer" or network.init is not None):
        raise InputError(
            f"expected network.config with segformer and without network.init only, got {network.config} with "
            f"{network.name} and {network.init or 'none'}"
        )
    if network.name == "deeplab-v2" and network.feature_layer != "encoder":
        raise InputError(f"expected network.feature_layer encoder of deeplab-v2, got {network.feature_layer}")
    if network.frozen_batch_norm and network.init is None:
        raise InputError("expected network.init, whose statistics network.frozen_batch_norm would keep, got none")

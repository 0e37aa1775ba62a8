"""Discriminators of source against target: over output maps, over class prototypes, and over classes of pixels.

All return logits, never probabilities. A single output is positive for source. Of 2K outputs, the first K are the
source's classes and the other K the target's classes. All discriminators stay in float32, whatever the precision around
them: they cast half-precision inputs and switch autocast off inside. A discriminator that was itself cast to half
precision raises an error. None has batch norm: a discriminator sees source and target one after the other, so running
statistics would fit neither.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as _spectral_norm

from semshift._checks import check_bool, check_device, check_floating, check_int, check_option

__all__ = ["ClassPixelDiscriminator", "FCDiscriminator", "PrototypeDiscriminator", "frozen"]

# On devices without autocast, switching it off is an error: "mps" before torch 2.5. Checked at import, since torch 2.4
# does not trace the check.
_WITHOUT_AUTOCAST = frozenset(device for device in ("meta", "mps") if not torch.amp.is_autocast_available(device))


class FCDiscriminator(nn.Module):
    """Fully-convolutional discriminator of source against target over output maps: five strided convolutions.

    An output map holds class probabilities, or their entropies, at each pixel. The layers are those of AdaptSegNet
    (Tsai et al. 2018, section 5.1), with 4 x 4 kernels and stride 2. Their output channels are `base_channels` times 1,
    2, 4 and 8, then 1. Between the layers is a leaky ReLU of slope 0.2.

    Args:
        in_channels: channels of the maps; for class probabilities, the number of classes; at least 1.
        base_channels: channels of the first layer, at least 1.
        spectral_norm: divide each kernel by its largest singular value (Miyato et al. 2018).

    Raises:
        TypeError: a count that is not an int, or a spectral_norm that is not a bool.
        ValueError: a count below 1.

    Example:
        >>> semshift.FCDiscriminator(19)(torch.rand(1, 19, 64, 96)).shape
        torch.Size([1, 1, 2, 3])
    """

    def __init__(self, in_channels: int, *, base_channels: int = 64, spectral_norm: bool = False) -> None:
        super().__init__()
        self.in_channels = in_channels = check_int("in_channels", in_channels, 1)
        self.base_channels = base_channels = check_int("base_channels", base_channels, 1)
        self.spectral_norm = spectral_norm
        widths = [in_channels, *(base_channels * factor for factor in (1, 2, 4, 8)), 1]
        layers = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:])]
        self.layers = _leaky_stack(layers, spectral_norm)

    def forward(self, maps: Tensor) -> Tensor:
        """Classify maps as source or target.

        Args:
            maps: `[B, in_channels, H, W]`, floating point, H and W at least 32.

        Returns:
            Logits `[B, 1, H // 32, W // 32]` float32, positive for source.

        Raises:
            TypeError: maps that are not a floating-point tensor, or a discriminator in half precision.
            ValueError: a wrong shape or device, or a map below 32 x 32.
        """
        check_floating("maps", maps)
        if maps.dim() != 4 or maps.shape[1] != self.in_channels:
            raise ValueError(f"expected maps [B, {self.in_channels}, H, W], got {list(maps.shape)}")
        if min(maps.shape[2:]) < 32:
            raise ValueError(f"expected maps of at least 32 x 32, got {maps.shape[2]} x {maps.shape[3]}")
        return _in_float32(self.layers, "maps", maps)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.in_channels}, base_channels={self.base_channels}, spectral_norm={self.spectral_norm}"


class PrototypeDiscriminator(nn.Module):
    """Discriminator of source against target over class prototypes: a multi-layer perceptron shared by all classes.

    A class prototype is the mean feature of a class. This is the semantic-level discriminator of Wang et al. 2020
    (arXiv 2004.00794), section 3. The discriminator's widths, and how it knows the class of a prototype, were not
    published; we chose both.

    Args:
        in_channels: C, the length of a prototype; at least 1.
        num_classes: K, at least 1.
        hidden_channels: widths of the hidden layers.
        conditioning: how the discriminator knows the class of a prototype. `"per-class"`: one output per class. Row k
            of the prototypes uses output k, so each class has its own decision boundary over shared layers. `"none"`:
            one output for all classes. `"class-and-domain"`: 2K outputs, source classes then target classes, for the
            losses `class_discriminator_loss` and `class_confusion_loss` (FADA, Wang et al. 2020, arXiv 2007.09222).
        spectral_norm: divide each matrix by its largest singular value.

    Raises:
        TypeError: a count that is not an int, widths that are not a sequence, or a spectral_norm that is not a bool.
        ValueError: a count below 1, or an unknown conditioning.

    Example:
        >>> semshift.PrototypeDiscriminator(2048, 19)(torch.rand(19, 2048)).shape
        torch.Size([19])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: Sequence[int] = (256, 256),
        conditioning: Literal["none", "per-class", "class-and-domain"] = "per-class",
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = check_int("in_channels", in_channels, 1)
        self.num_classes = num_classes = check_int("num_classes", num_classes, 1)
        self.hidden_channels = _check_widths(hidden_channels)
        outputs = {"none": 1, "per-class": num_classes, "class-and-domain": 2 * num_classes}
        check_option("conditioning", conditioning, list(outputs))
        self.conditioning = conditioning
        self.spectral_norm = spectral_norm
        widths = [in_channels, *self.hidden_channels, outputs[conditioning]]
        self.layers = _leaky_stack([nn.Linear(a, b) for a, b in zip(widths, widths[1:])], spectral_norm)

    def forward(self, prototypes: Tensor) -> Tensor:
        """Classify prototypes as source or target.

        Args:
            prototypes: `[..., K, C]`, floating point; row k is class k.

        Returns:
            Logits `[..., K]` float32, positive for source; `[..., K, 2K]` with `"class-and-domain"`.

        Raises:
            TypeError: prototypes that are not a floating-point tensor, or a discriminator in half precision.
            ValueError: a wrong shape or device.
        """
        check_floating("prototypes", prototypes)
        if prototypes.dim() < 2 or prototypes.shape[-2:] != (self.num_classes, self.in_channels):
            raise ValueError(
                f"expected prototypes [..., {self.num_classes}, {self.in_channels}], got {list(prototypes.shape)}"
            )
        logits = _in_float32(self.layers, "prototypes", prototypes)
        if self.conditioning == "none":
            return logits.squeeze(-1)
        return logits.diagonal(dim1=-2, dim2=-1) if self.conditioning == "per-class" else logits

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.in_channels}, {self.num_classes}, hidden_channels={self.hidden_channels}, "
            f"conditioning={self.conditioning!r}, spectral_norm={self.spectral_norm}"
        )


class ClassPixelDiscriminator(nn.Module):
    """Discriminator of class and domain at every pixel of a feature map, with 2K outputs.

    This is the fine-grained discriminator of FADA (Wang et al. 2020, arXiv 2007.09222), section 3.2. The first K
    outputs are the source's classes, the other K the target's classes.

    Args:
        in_channels: C, channels of the features; at least 1.
        num_classes: K, at least 1.
        hidden_channels: widths of the hidden layers, which are 3 x 3 convolutions.
        spectral_norm: divide each kernel by its largest singular value.

    Raises:
        TypeError: a count that is not an int, widths that are not a sequence, or a spectral_norm that is not a bool.
        ValueError: a count below 1.

    Example:
        >>> semshift.ClassPixelDiscriminator(64, 19)(torch.rand(1, 64, 8, 12)).shape
        torch.Size([1, 38, 8, 12])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden_channels: Sequence[int] = (256, 128),
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = check_int("in_channels", in_channels, 1)
        self.num_classes = num_classes = check_int("num_classes", num_classes, 1)
        self.hidden_channels = _check_widths(hidden_channels)
        self.spectral_norm = spectral_norm
        widths = [in_channels, *self.hidden_channels, 2 * num_classes]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:])]
        self.layers = _leaky_stack(layers, spectral_norm)

    def forward(self, features: Tensor) -> Tensor:
        """Classify every pixel of feature maps by class and domain.

        Args:
            features: `[B, C, H, W]`, floating point.

        Returns:
            Logits `[B, 2K, H, W]` float32; pass them to the losses as `logits.movedim(1, -1)`.

        Raises:
            TypeError: features that are not a floating-point tensor, or a discriminator in half precision.
            ValueError: a wrong shape or device.
        """
        check_floating("features", features)
        if features.dim() != 4 or features.shape[1] != self.in_channels:
            raise ValueError(f"expected features [B, {self.in_channels}, H, W], got {list(features.shape)}")
        return _in_float32(self.layers, "features", features)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"{self.in_channels}, {self.num_classes}, hidden_channels={self.hidden_channels}, "
            f"spectral_norm={self.spectral_norm}"
        )


def frozen(module: nn.Module) -> Callable[..., Any]:
    """Frozen call of a module, with its parameters detached: gradients reach the inputs but no parameter.

    Use it for the segmenter's adversarial loss. You can train the same module in the same step. Each call runs on
    copies of the parameters and buffers, so the module does not change and its optimiser may step before the backward.
    Activation checkpointing recomputes with the same copies, unless it runs a closure that was created outside the
    module's methods. The wrappers `DistributedDataParallel`, `DataParallel` and `torch.compile` are bypassed, also
    where they are inside the module. No other thread may run the module during the call.

    Args:
        module: any module.

    Returns:
        A callable that takes the module's arguments and keywords and returns its results.

    Raises:
        TypeError: not a module, or a scripted module.
        ValueError: `fully_shard` was called on the module or on a part of it. Calling `fully_shard` only on a larger
            module that contains it is fine.

    Example:
        >>> discriminator = semshift.FCDiscriminator(2)
        >>> maps = torch.rand(1, 2, 32, 32, requires_grad=True)
        >>> semshift.frozen(discriminator)(maps).sum().backward()
        >>> maps.grad is not None, any(p.grad is not None for p in discriminator.parameters())
        (True, False)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected module to be a torch.nn.Module, got {type(module).__name__}")
    if not torch.compiler.is_compiling():
        _check_copies(module)
    inner = _unwrapped(module)

    def run(*arguments: Any, **keywords: Any) -> Any:
        tensors = _tensors(inner)
        # Copies, since an optimiser steps in place and FSDP frees the weights that it gathered.
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if torch.compiler.is_compiling():
            return torch.func.functional_call(inner, copies, arguments, keywords, tie_weights=False)
        both = _Twin(inner, {id(tensor): copies[name] for name, tensor in tensors.items()})
        # A closure may still refer to the module itself, so during the call the module holds the copies too.
        copies = {f"module.{name}": copy for name, copy in copies.items()}
        return torch.func.functional_call(both, copies, arguments, keywords, tie_weights=False)

    return run


def _check_copies(module: nn.Module) -> None:
    """Refuse a module that cannot run on copies of its parameters."""
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        raise TypeError("expected a Python module, got a torch.jit.ScriptModule; pass the module it was scripted from")
    # Compared by name, since torch 2.4 has the class in a different module. FSDP's hooks would replace the copies by
    # other parameters.
    if any(base.__name__ == "FSDPModule" for each in module.modules() for base in type(each).__mro__):
        raise ValueError(
            "expected a module without sharded parameters, got one that fully_shard has split: shard the alignment "
            "module around the discriminator instead, or do not shard it"
        )


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers of data parallelism and compilation."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif (compiled := module._modules.get("_orig_mod")) is not None:
            # A module that torch 2.4 compiled would use the parameters that it was compiled with.
            module = compiled
        else:
            return module


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each module under one name: if swapped under two names, it would keep a copy."""
    tensors: dict[str, Tensor] = {}
    for prefix, each in module.named_modules():
        tensors |= dict(each.named_parameters(prefix, recurse=False, remove_duplicate=False))
        tensors |= dict(each.named_buffers(prefix, recurse=False, remove_duplicate=False))
    return tensors


class _Twin(nn.Module):
    """A module and its twin, which holds the copies. The twin runs, and keeps the copies for a later recomputation."""

    def __init__(self, module: nn.Module, copies: dict[int, Any]) -> None:
        super().__init__()
        self.module = module
        modules = [each for each in module.modules() if _unwrapped(each) is each]
        twins = {id(each): object.__new__(type(each)) for each in modules}
        twins = copies | {id(each): twins[id(_unwrapped(each))] for each in module.modules()}
        for each in modules:
            vars(twins[id(each)]).update({name: _moved(value, twins) for name, value in vars(each).items()})
        # In a list, so that it is not registered as a submodule.
        self.twin = [twins[id(module)]]

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.twin[0](*arguments, **keywords)


def _moved(value: Any, twins: dict[int, Any]) -> Any:
    """An attribute of a twin: the module's own modules, tensors and methods become the twin's, also in containers."""
    if isinstance(value, MethodType):
        return MethodType(value.__func__, twins.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        return functools.partial(_moved(value.func, twins), *_moved(value.args, twins), **_moved(value.keywords, twins))
    if type(value) in (list, tuple):
        return type(value)(_moved(each, twins) for each in value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _moved(each, twins)) for key, each in value.items())
    return twins.get(id(value), value)


def _leaky_stack(layers: Sequence[nn.Module], spectral_norm: bool) -> nn.Sequential:
    check_bool("spectral_norm", spectral_norm)
    stack: list[nn.Module] = []
    for layer in layers:
        stack += [_spectral_norm(layer) if spectral_norm else layer, nn.LeakyReLU(0.2)]
    return nn.Sequential(*stack[:-1])


def _in_float32(layers: nn.Sequential, name: str, inputs: Tensor) -> Tensor:
    # The bias, since reading a spectrally normalised weight would run a power iteration.
    bias: Tensor = layers[0].bias  # type: ignore[assignment]  # because nn.Module types no attribute
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the discriminator must stay in float32, got {bias.dtype}; call its .float()")
    check_device(name, inputs, "the discriminator", bias)
    device = inputs.device.type
    with nullcontext() if device in _WITHOUT_AUTOCAST else torch.autocast(device, enabled=False):
        result: Tensor = layers(inputs.to(bias.dtype))
    return result


def _check_widths(hidden_channels: Sequence[int]) -> tuple[int, ...]:
    # A generator would be used up by the check and leave no hidden layer.
    if not isinstance(hidden_channels, Sequence) or isinstance(hidden_channels, str):
        raise TypeError(f"expected hidden_channels to be a sequence of ints, got {hidden_channels!r}")
    return tuple(check_int("hidden_channels", width, 1) for width in hidden_channels)

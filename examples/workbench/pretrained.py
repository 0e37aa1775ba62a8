"""Loading a file of trained weights into DeepLab-v2, with an account of every key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from examples.workbench.data import InputError
from examples.workbench.deeplab import BACKBONE, DeepLabV2, Origin

__all__ = ["Pretrained", "load_pretrained"]

_PREFIXES = ("module.", "Scale.")
_COUNTER = ".num_batches_tracked"


class Pretrained(NamedTuple):
    """What became of a file of weights; every key is that of the model."""

    file: str
    origin: Origin | Literal["segformer"]
    """What the weights were taken for; it cannot be seen in them."""
    prefix: str
    """What all the file's keys began with, and was taken off."""
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the model and not loaded: these are as they were before."""
    left_over: tuple[str, ...]
    """In the file and not used."""

    def __str__(self) -> str:
        """A line about what was loaded and how it is used, then the keys that are missing and left over."""
        how = {"torchvision": "RGB, stride in the 3x3", "caffe": "BGR, stride in the 1x1", "segformer": "RGB"}[
            self.origin
        ]
        prefix = f", without the prefix {self.prefix}" if self.prefix else ""
        first = f"{self.file}: {len(self.loaded)} tensors loaded as {self.origin} weights ({how}){prefix}"
        return "\n".join([first, f"missing: {_listed(self.missing)}", f"left over: {_listed(self.left_over)}"])


def load_pretrained(model: DeepLabV2, file: Path, *, classifier: bool = True) -> Pretrained:
    """Load a state dict of torchvision's ResNet, or of a DeepLab-v2 with its names, taken for the model's origin.

    All or nothing: a file that is refused leaves the model as it was. No code in the file is run. A prefix `module.`,
    `Scale.` or both that every key has is taken off. A file without a classifier leaves the model's as it is, as is
    batch norm's `num_batches_tracked`, which plays no part; both are reported as missing.

    Args:
        model: of the file's depth and origin.
        file: written by `torch.save`.
        classifier: load the classifiers too where the file has them; else they are left over.

    Raises:
        InputError: the file is no state dict, a weight of the backbone or a part of a classifier is missing, the
            backbone is a larger one, or a shape is another.
    """
    weights, prefix = _read(file)
    own = model.state_dict()
    wanted = [name for name in own if classifier or name.startswith(BACKBONE)]
    missing = [name for name in own if name not in weights or name not in wanted]
    backbone = [name for name in missing if name.startswith(BACKBONE) and not name.endswith(_COUNTER)]
    if backbone:
        raise InputError(
            f"expected {file} to hold all of the backbone of depth {model.depth}, got no {_some(backbone)}"
        )
    left_over = [name for name in weights if name not in wanted]
    unknown = [name for name in left_over if name.startswith(BACKBONE)]
    if unknown:
        raise InputError(
            f"expected {file} to hold the backbone of depth {model.depth} and no more of it, got {_some(unknown)}"
        )
    for name in wanted:
        if name in weights and weights[name].shape != own[name].shape:
            hint = "" if name.startswith(BACKBONE) else "; network.init_classifier false takes the backbone alone"
            raise InputError(
                f"expected {name} in {file} of shape {list(own[name].shape)}, got {list(weights[name].shape)}{hint}"
            )
    for head in ("layer5.", "layer6."):
        parts = [name for name in wanted if name.startswith(head)]
        absent = [name for name in missing if name in parts]
        if 0 < len(absent) < len(parts):
            raise InputError(
                f"expected {file} to hold all of the classifier {head[:-1]} or none, got no {_some(absent)}"
            )
    loaded = [name for name in own if name not in missing]
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    return Pretrained(str(file), model.origin, prefix, tuple(loaded), tuple(missing), tuple(left_over))


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict, and the prefix that was taken off its keys."""
    if not file.is_file():
        raise InputError(f"expected network.init to be a file of weights, got no file {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types, for a damaged file and for one with code
        raise InputError(f"expected {file} to hold weights and no code, got a file that does not load so") from error
    if not isinstance(state, dict) or not all(_is_entry(*item) for item in state.items()):
        raise InputError(f"expected {file} to be a state dict, names to tensors, got {_contents(state)}")
    prefix = ""
    for part in _PREFIXES:
        if state and all(name.startswith(prefix + part) for name in state):
            prefix += part
    return {name[len(prefix) :]: tensor for name, tensor in state.items()}, prefix


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _contents(state: object) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    name, value = next(item for item in state.items() if not _is_entry(*item))
    return f"a {type(value).__name__} under {name!r}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _listed(names: Sequence[str]) -> str:
    weights = [name for name in names if not name.endswith(_COUNTER)]
    counters = [f"{len(names) - len(weights)} x {_COUNTER[1:]}"] if len(weights) < len(names) else []
    return ", ".join(weights + counters) or "nothing"

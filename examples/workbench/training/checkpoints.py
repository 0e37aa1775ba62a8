"""Checkpoints of a run: each written whole or not at all, the last three kept, a damaged one passed over."""

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from examples.workbench.errors import InputError
from examples.workbench.files import write_whole
from examples.workbench.settings import MAY_CHANGE

__all__ = [
    "BEFORE",
    "BEST",
    "KEPT",
    "Progress",
    "Stateful",
    "has_checkpoint",
    "load_checkpoint",
    "load_weights",
    "newest_checkpoint",
    "check_same_run",
    "check_weights_fit",
    "save_checkpoint",
    "save_weights",
    "set_aside_damaged",
]

BEFORE = Path("checkpoints/before.pt")
"""The segmenter before any confusion loss reaches it, for the report."""
BEST = Path("checkpoints/best.pt")
"""The networks of the step that was best on the validation images, where `validate_every` looks at them."""
KEPT = 3
"""Checkpoints of the last steps that are kept."""

# What the parts of a checkpoint raise that were given another's, or something else.
_UNFIT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Stateful(Protocol):
    """What a checkpoint saves: modules and optimisers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    """The next one."""
    resumed_from: tuple[int, ...] = ()
    """The steps at which it went on after it had been ended."""
    best: tuple[float, int] | None = None
    """Largest mIoU on the validation images so far, and after how many steps."""


def save_checkpoint(
    out: Path,
    progress: Progress,
    stateful: Mapping[str, Stateful],
    run: Mapping[str, Any],
) -> None:
    """Save all that a run needs to go on; loads with `weights_only=True`.

    Args:
        out: the run folder; of its checkpoints the last `KEPT` stay.
        progress: how far the run has come.
        stateful: networks and optimisers by name.
        run: what must be the same when the run goes on, such as its settings.

    Raises:
        InputError: a network holds a number that is not finite, which would take the good checkpoints' place.
        MachineError: it could not be written; the checkpoints before it are kept.
    """
    states = {name: part.state_dict() for name, part in stateful.items()}
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise InputError(
                    f"expected finite weights, got others in {key} of the {name} after step {progress.step - 1}: lower "
                    f"the learning rate or the weights of the adversarial losses; {out} keeps its last checkpoint"
                )
    state = {**progress._asdict(), "run": dict(run), "stateful": states}
    _save(out / f"checkpoints/step-{progress.step:08d}.pt", state)
    for path in _newest_first(out)[KEPT:]:
        path.unlink(missing_ok=True)


def save_weights(path: Path, networks: Mapping[str, Stateful], **more: Any) -> None:
    """Save networks for `load_weights`, with more about them."""
    _save(path, {**more, "stateful": {name: part.state_dict() for name, part in networks.items()}})


def has_checkpoint(out: Path) -> bool:
    """Whether there is a checkpoint, be it damaged."""
    return bool(_newest_first(out))


def load_checkpoint(out: Path, stateful: Mapping[str, Stateful], run: Mapping[str, Any]) -> Progress:
    """Go on from the newest checkpoint that is whole, if there is any.

    Raises:
        InputError: there are checkpoints, none of them whole, or they are of another run.
    """
    if not has_checkpoint(out):
        return Progress()
    path = newest_checkpoint(out)
    state = _read(path)
    try:
        check_same_run(state["run"], run, path)
        check_weights_fit(stateful["segmenter"].state_dict(), state["stateful"]["segmenter"], path)
        for name, part in stateful.items():
            part.load_state_dict(state["stateful"][name])
        best = state["best"] and (state["best"][0], state["best"][1])
        if not isinstance(state["step"], int):
            raise TypeError(f"its step is {state['step']!r}")
        return Progress(state["step"], (*state["resumed_from"], state["step"]), best)
    except InputError:
        raise
    except _UNFIT as error:
        why = f"{type(error).__name__} {error!s}".splitlines()[0]
        raise InputError(f"expected {path} to be a checkpoint of this run, got one that does not fit: {why}") from error


def newest_checkpoint(out: Path) -> Path:
    """The newest checkpoint of a run that is whole; damaged ones are told in a line.

    Raises:
        InputError: there is none.
    """
    paths = _newest_first(out)
    for path in paths:
        if _is_whole(path):
            return path
        tqdm.write(f"{path} is damaged, and passed over for the one before it", file=sys.stderr)
    found = f"{len(paths)} damaged" if paths else "none"
    raise InputError(f"expected a whole checkpoint in {out / 'checkpoints'}, got {found}")


def set_aside_damaged(out: Path) -> None:
    """Rename damaged checkpoints that are newer than the newest whole one, so that they are not among those kept.

    Raises:
        InputError: there are checkpoints, and none of them is whole.
    """
    if not has_checkpoint(out):
        return
    whole = newest_checkpoint(out)
    for path in _newest_first(out):
        if path == whole:
            return
        # Not deleted: a disk that fails to read it today may read it tomorrow.
        path.replace(path.with_suffix(".damaged"))


def load_weights(path: Path, *, teacher: bool = False) -> dict[str, Tensor]:
    """The segmenter's weights in a checkpoint, or their running mean, the teacher's.

    Raises:
        InputError: the file is missing or damaged.
    """
    state = _read(path)
    try:
        stateful = state["stateful"]
        if not teacher:
            weights: dict[str, Tensor] = stateful["segmenter"]
            return weights
        return {key.removeprefix("module."): value for key, value in stateful["teacher"].items() if key != "n_averaged"}
    except _UNFIT as error:
        raise InputError(f"expected {path} to be a checkpoint of this trainer, got other contents") from error


def check_weights_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: Path) -> None:
    """Refuse a checkpoint's weights that do not agree with the segmenter's own, name by name and shape by shape.

    Raises:
        InputError: naming the first that does not fit, such as a classifier of other classes.
    """
    for name in [*own, *weights]:
        wanted, found = (list(of[name].shape) if name in of else "none" for of in (own, weights))
        if wanted != found:
            raise InputError(f"expected {name} in {where} of shape {wanted}, as the settings have it, got {found}")


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with a run as another one.

    Raises:
        InputError: naming the first thing that differs.
    """
    written, given = _flat(before), _flat(now)
    for name in [*given, *written]:
        if name in MAY_CHANGE or (name.startswith("images.") and name not in written):
            continue
        if name not in written or name not in given:
            raise InputError(
                f"expected --resume with the version of the trainer that began the run, got {name}, which {where} "
                f"{'has' if name in written else 'lacks'}"
            )
        if written[name] != given[name]:
            raise InputError(
                f"expected --resume with the settings of the run, got {name} {given[name]} where {where} has "
                f"{written[name]}"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _newest_first(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*.pt"), reverse=True)


class _Summed:
    """A file, and the checksum of what has been written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum = file, 0

    def write(self, data: bytes) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _save(path: Path, state: Mapping[str, Any]) -> None:
    """What torch.save writes, and after it a checksum of all of it, which torch.load passes over."""

    def write(to: Path) -> None:
        # Of a file that it opens itself, torch.save does not say why it cannot be written.
        with to.open("wb") as file:
            summed = _Summed(file)
            torch.save(state, summed)  # type: ignore[arg-type]
            file.write(summed.sum.to_bytes(4, "little"))

    write_whole(path, write)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"expected a checkpoint, got no file {path}")
    if not _is_whole(path):
        raise InputError(f"expected {path} to be a whole checkpoint, got a damaged one")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types
        raise InputError(f"expected {path} to be a checkpoint without code, got a file that does not load") from error
    return state


def _is_whole(path: Path) -> bool:
    """Is the checksum right? torch.load looks at none, and takes a changed byte for a number."""
    found = 0
    try:
        left = path.stat().st_size - 4
        with path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, 2**20))):
                found, left = zlib.crc32(block, found), left - len(block)
            # Where a file is nothing but zeros, they are not the checksum of nothing.
            return found != 0 and file.read() == found.to_bytes(4, "little")
    except OSError:
        return False

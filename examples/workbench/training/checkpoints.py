"""Checkpoints of a run. Each is complete or absent, the last three are kept, and damaged ones are skipped."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.workbench.errors import InputError
from examples.workbench.files import write_whole
from examples.workbench.plain import check_same_run
from examples.workbench.progress import say

__all__ = ["BEFORE", "BEST", "KEPT", "Progress", "Stateful", "check_weights_fit", "describe_kept", "has_checkpoint"]
__all__ += ["load_checkpoint", "load_weights", "newest_checkpoint", "save_checkpoint", "save_weights"]
__all__ += ["set_aside_damaged"]

BEFORE = Path("checkpoints/before.pt")
"""The segmenter before any confusion loss acts on it, for the report."""
BEST = Path("checkpoints/best.pt")
"""The networks at the step with the highest mIoU on the validation images."""
KEPT = 3

Stateful = nn.Module | torch.optim.Optimizer

# Errors that occur when wrong contents are loaded into networks and optimisers.
_UNFIT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Progress(NamedTuple):
    """Progress of a run: its next step, the steps at which it resumed, and the best validation mIoU with its step."""

    step: int = 0
    resumed_from: tuple[int, ...] = ()
    best: tuple[float, int] | None = None


def save_checkpoint(out: Path, progress: Progress, stateful: Mapping[str, Stateful], run: Mapping[str, Any]) -> None:
    """Save everything that a run needs to resume, and delete all but the last `KEPT` checkpoints.

    `run` holds the values that must be the same when the run resumes. Weights that are not finite are refused.
    """
    states = {name: part.state_dict() for name, part in stateful.items()}
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise InputError(
                    f"weights must be finite, got NaN or infinity in {key} of the {name} after step "
                    f"{progress.step - 1}: lower the learning rate or the weights of the adversarial losses; "
                    f"{describe_kept(out)}"
                )
    state = {**progress._asdict(), "run": dict(run), "stateful": states}
    _save(out / f"checkpoints/step-{progress.step:08d}.pt", state)
    for path in _newest_first(out)[KEPT:]:
        path.unlink(missing_ok=True)


def load_checkpoint(out: Path, stateful: Mapping[str, Stateful], run: Mapping[str, Any]) -> Progress:
    """Load the newest undamaged checkpoint, or start at step 0 if there are no checkpoints."""
    if not has_checkpoint(out):
        return Progress()
    path = newest_checkpoint(out)
    state = _load(path)
    try:
        check_same_run(state["run"], run, path)
        check_weights_fit(stateful["segmenter"].state_dict(), state["stateful"]["segmenter"], path)
        for name, part in stateful.items():
            part.load_state_dict(state["stateful"][name])
        step, best = int(state["step"]), state["best"]
        return Progress(step, (*state["resumed_from"], step), best and (float(best[0]), int(best[1])))
    except InputError:
        raise
    except _UNFIT as error:
        why = f"{type(error).__name__} {error!s}".splitlines()[0]
        raise InputError(f"{path} must be a checkpoint of this run, but does not fit this run: {why}") from error


def save_weights(path: Path, networks: Mapping[str, Stateful], **more: Any) -> None:
    """Save networks for `load_weights`, together with values that describe them."""
    _save(path, {**more, "stateful": {name: part.state_dict() for name, part in networks.items()}})


def load_weights(path: Path, *, teacher: bool = False) -> dict[str, Tensor]:
    """The weights of the segmenter in a checkpoint, or of its teacher."""
    state = _load(path)
    try:
        weights: dict[str, Tensor] = state["stateful"]["teacher" if teacher else "segmenter"]
        return {key.removeprefix("module."): weights[key] for key in weights if key != "n_averaged"}
    except _UNFIT as error:
        raise InputError(f"{path} must be a checkpoint of the workbench, got other contents") from error


def has_checkpoint(out: Path) -> bool:
    """Whether a run folder has checkpoints, including damaged ones."""
    return bool(_newest_first(out))


def describe_kept(out: Path) -> str:
    """A sentence about the checkpoint in a run folder, for the message of a run that stops."""
    newest = next(iter(_newest_first(out)), None)
    if newest is None:
        return f"{out} has no checkpoint; --resume starts at step 0"
    step = newest.stem.removeprefix("step-").lstrip("0") or "0"
    return f"{out} has a checkpoint of step {step}; --resume continues from it"


def newest_checkpoint(out: Path) -> Path:
    """The newest undamaged checkpoint of a run. A line on standard error names each newer, damaged one."""
    paths = _newest_first(out)
    for path in paths:
        if _is_whole(path):
            return path
        say(f"{path} is damaged; trying the checkpoint before it")
    found = f"{len(paths)} damaged" if paths else "none"
    raise InputError(f"expected an undamaged checkpoint in {out / 'checkpoints'}, got {found}")


def set_aside_damaged(out: Path) -> None:
    """Rename damaged checkpoints that are newer than the newest undamaged one, so that they do not count as kept."""
    if has_checkpoint(out):
        newest = newest_checkpoint(out)
        for path in _newest_first(out):
            if path > newest:
                # It is not deleted: a disk that fails to read it today may read it tomorrow.
                path.replace(path.with_suffix(".damaged"))


def check_weights_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: Path) -> None:
    """Check that a file's weights have the names and shapes of the segmenter's own."""
    for name in [*own, *weights]:
        wanted, found = (list(of[name].shape) if name in of else "none" for of in (own, weights))
        if wanted != found:
            raise InputError(f"{name} in {where} must have shape {wanted} to fit the settings, got {found}")


def _newest_first(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*.pt"), reverse=True)


def _save(path: Path, state: Mapping[str, Any]) -> None:
    def write(to: Path) -> None:
        # If torch.save gets a path, its error does not say why the file cannot be written.
        with to.open("wb") as file:
            torch.save(state, file)

    write_whole(path, write)


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"expected a checkpoint, got no file {path}")
    if not _is_whole(path):
        raise InputError(f"expected an undamaged checkpoint, got {path}, which is damaged")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises several types
        raise InputError(f"{path} must be a checkpoint without code, but PyTorch cannot load it") from error
    return state


def _is_whole(path: Path) -> bool:
    """Whether the checksums in the file are correct; `torch.load` does not check them."""
    try:
        with zipfile.ZipFile(path) as file:
            # `torch.load` reads a member as empty if its attributes mark it as a folder.
            return file.testzip() is None and not any(member.external_attr for member in file.infolist())
    except Exception:  # zipfile raises several types
        return False

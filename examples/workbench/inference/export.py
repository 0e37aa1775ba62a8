"""Export of a run's network to a file that needs neither semshift nor the workbench."""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.workbench.data.samples import resize_image
from examples.workbench.errors import InputError, MachineError
from examples.workbench.files import write_whole
from examples.workbench.inference.trained import Trained

__all__ = ["check_export", "export", "is_installed"]

Run = Callable[[Tensor], Tensor]

SHARE = 0.999
"""Share of a resized image's pixels that must have the same class as in the run's own prediction."""


def check_export(out: Path) -> None:
    """Check, before a network is loaded, that `export` can write this file."""
    if out.suffix not in (".pt2", ".onnx", ".pt", ".pth"):
        raise InputError(f"expected --out to end in .pt2, .onnx, .pt or .pth, got {out}")
    if out.is_dir():
        raise InputError(f"expected --out to be a file, got the folder {out}")
    if out.suffix == ".onnx" and not all(map(is_installed, ("onnx", "onnxscript"))):
        raise InputError(
            "export to .onnx needs packages that are not installed: pip install onnx onnxscript onnxruntime"
        )


def export(network: Trained, out: Path) -> str:
    """Write a network to a file and compare the file with the run's own predictions.

    Args:
        network: the network, on the CPU.
        out: the file. Its ending chooses the format: `.pt2` for a `torch.export` program, `.onnx`, or `.pt` or `.pth`
            for the segmenter's state dict.

    Returns:
        The result of the comparison, as a line for the user.

    Raises:
        MachineError: the file cannot be written, or its predictions differ from the run's. No file is left.
    """
    check_export(out)
    result = ""

    def write(to: Path) -> None:
        nonlocal result
        if out.suffix == ".pt2":
            result = _compare(network, _write_program(network, to))
        elif out.suffix == ".onnx":
            run, by = _write_onnx(network, to)
            result = f"{_compare(network, run)} ({by})"
        else:
            result = _write_weights(network, to)

    write_whole(out, write)
    return f"{out}: {result}"


def _write_weights(network: Trained, to: Path) -> str:
    own = network.segmenter.state_dict()
    with to.open("wb") as file:
        torch.save(own, file)
    written = torch.load(to, map_location="cpu", weights_only=True)
    if list(written) != list(own) or not all(torch.equal(written[name], own[name].cpu()) for name in own):
        raise MachineError("the weights in the file differ from the run's")
    return f"{len(own)} tensors, equal to the run's"


def _write_program(network: Trained, to: Path) -> Run:
    program = torch.export.export(network, (_example(network),), dynamic_shapes=_dynamic())
    with to.open("wb") as file:
        torch.export.save(program, file)
    with to.open("rb") as file:
        run: Run = torch.export.load(file).module()
    return run


def _write_onnx(network: Trained, to: Path) -> tuple[Run, str]:
    """Write the ONNX file. Return a function that runs it in an installed package, and the package's name."""
    # The exporter warns about its own code, and about packages that the network does not use.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (_example(network),),
            to,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_dynamic(),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if is_installed("onnxruntime"):
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(to.read_bytes(), providers=["CPUExecutionProvider"])
        by = "by onnxruntime"
    else:
        import onnx
        from onnx.reference import ReferenceEvaluator

        session, by = ReferenceEvaluator(onnx.load(to)), "by onnx's reference evaluator"
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), by


def _example(network: Trained) -> Tensor:
    height, width = network.data.size
    return torch.rand(2, 3, height + 3, width + 5)


def _dynamic() -> dict[str, dict[int, Any]]:
    return {"images": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}}


def _compare(network: Trained, run: Run) -> str:
    """Compare a program with the run's own predictions, on random and on smooth images of three sizes.

    At the network's size every pixel must agree; at other sizes a share of `SHARE` must. A pixel also agrees if its two
    classes have equal logits up to rounding, which depends on the order of summation.
    """
    rng, size = np.random.default_rng(0), network.data.size
    worst = 1.0
    for height, width in (size, (size[0] * 3 // 4 + 1, size[1] + 7), (size[0] * 2 + 5, size[1] * 3 // 2)):
        smooth = resize_image(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (height, width))
        images = np.stack([rng.integers(0, 256, (height, width, 3), dtype=np.uint8), smooth])
        with torch.no_grad():
            logits = run(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        own = torch.stack([network.logits(image) for image in images])
        if logits.shape != own.shape:
            raise MachineError(
                f"expected the program's logits to have shape {list(own.shape)}, got {list(logits.shape)}"
            )
        chosen = own.gather(1, logits.argmax(1, keepdim=True))[:, 0]
        share = float((chosen >= own.amax(1) - 1e-4 * own.abs().amax()).float().mean())
        # Where the run's own logits are NaN, the comparison above is False: such pixels count as different.
        if not share >= (1.0 if (height, width) == size else SHARE):
            raise MachineError(
                f"the program must predict the run's classes, got only {100 * share:.2f} % of the pixels equal at "
                f"{height} x {width}: please report this as a bug"
            )
        worst = min(worst, share)
    return f"compared with the run's predictions at three sizes, {100 * worst:.2f} % of pixels equal"


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None

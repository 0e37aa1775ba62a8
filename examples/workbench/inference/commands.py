"""The commands `predict` and `export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.workbench.inference.export import check_export, export
from examples.workbench.inference.predict import predict_files
from examples.workbench.inference.trained import load_run
from examples.workbench.options import OneLineParser

__all__ = ["export_command", "predict_command"]


def predict_command(arguments: Sequence[str]) -> None:
    """Predict the classes of the pixels of new images."""
    parser = OneLineParser("predict")
    _add_run(parser)
    images_help, out_help = "a folder of images, or one image", "folder for the predicted masks, NAME.png"
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help=images_help)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=out_help)
    overlay_help = "also write NAME_overlay.png: the image with its classes in colour"
    parser.add_argument("--overlay", action="store_true", help=overlay_help)
    probabilities_help = "also write NAME.npz: the probability of every class at each pixel"
    parser.add_argument("--probabilities", action="store_true", help=probabilities_help)
    device_help = "device to compute on (default: as in training)"
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda", "mps"], help=device_help)
    options = parser.parse_args(arguments)
    network = load_run(options.run, best=options.best, accelerator=options.accelerator)
    count = predict_files(
        network, options.images, options.out, overlay=options.overlay, probabilities=options.probabilities
    )
    print(f"{count} {'mask' if count == 1 else 'masks'} in {options.out}")


def export_command(arguments: Sequence[str]) -> None:
    """Export a run's network."""
    check = "The exported file is kept only if its predictions agree with the run's."
    parser = OneLineParser("export", epilog=check)
    _add_run(parser)
    what = "NAME.pt2 (a torch.export program), NAME.onnx, or NAME.pt or NAME.pth (a state dict)"
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help=what)
    options = parser.parse_args(arguments)
    check_export(options.out)
    print(export(load_run(options.run, best=options.best, accelerator="cpu"), options.out))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="the run folder of the trained network")
    best_help = "use the network with the best validation score, not the last one"
    parser.add_argument("--best", action="store_true", help=best_help)

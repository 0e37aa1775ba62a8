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
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="a folder of images, or one image")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the index masks, NAME.png")
    parser.add_argument("--overlay", action="store_true", help="also write NAME_overlay.png: image and classes")
    parser.add_argument("--probabilities", action="store_true", help="also write NAME.npz: those of every class")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda", "mps"], help="(default: the run's)")
    options = parser.parse_args(arguments)
    network = load_run(options.run, best=options.best, accelerator=options.accelerator)
    count = predict_files(
        network, options.images, options.out, overlay=options.overlay, probabilities=options.probabilities
    )
    print(f"{count} {'mask' if count == 1 else 'masks'} in {options.out}")


def export_command(arguments: Sequence[str]) -> None:
    """Export a run's network."""
    parser = OneLineParser("export", epilog="The file is compared with the run's own predictions before it is kept.")
    _add_run(parser)
    what = "NAME.pt2, a torch.export program; NAME.onnx; or NAME.pt or NAME.pth, a state dict"
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help=what)
    options = parser.parse_args(arguments)
    check_export(options.out)
    print(export(load_run(options.run, best=options.best, accelerator="cpu"), options.out))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="a run folder")
    parser.add_argument("--best", action="store_true", help="the step that was best on the validation images")

"""The command line: `python -m examples.workbench train | evaluate | predict | export | study`."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed as dist

import semshift
from examples.workbench.data.check import check_data
from examples.workbench.data.images import open_images
from examples.workbench.errors import InputError, describe_machine_error
from examples.workbench.inference.commands import export_command, predict_command
from examples.workbench.inference.trained import load_run
from examples.workbench.networks.build import build_segmenter, load_init
from examples.workbench.options import OneLineParser, read_settings
from examples.workbench.reporting.scores import Scores, evaluate, score_table
from examples.workbench.settings import Settings
from examples.workbench.spelling import did_you_mean
from examples.workbench.studies.command import study_command
from examples.workbench.training import signals
from examples.workbench.training.ranks import check_accelerator
from examples.workbench.training.train import train

__all__ = ["main"]

USAGE = """usage: python -m examples.workbench COMMAND [OPTIONS]

commands:
  train     train one method on the built-in scenes, a preset or your own settings file
  evaluate  compute the scores of a run again: per class, and averaged over a subset of the classes
  predict   predict masks of new images with the network of a run
  export    export the network of a run as a stand-alone program, or its weights
  study     compare several methods or settings, each with several seeds, in one table

`python -m examples.workbench COMMAND --help` lists the options of a command; --version prints the versions.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command, and print any expected error as one line.

    Returns:
        The exit status: 0 for success, 2 for wrong input, 3 for a failure of the machine, and 128 plus the signal's
        number if a signal stopped the command.
    """
    commands = {"train": _train, "evaluate": _evaluate, "study": study_command}
    commands |= {"predict": predict_command, "export": export_command}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"semshift {semshift.__version__} (torch {torch.__version__})")
        return 0
    try:
        if arguments[0] not in commands:
            names, meant = ", ".join(commands), did_you_mean(arguments[0], commands)
            raise InputError(f"expected one of the commands {names}, got {arguments[0]}{meant}")
        if arguments[0] != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"only train can run on several ranks, got {arguments[0]}; run it in one process")
        with signals.stop_at_once(), _leave_cores():
            commands[arguments[0]](arguments[1:])
        return 0
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, signals.Stopped) else signals.Stopped(signal.SIGINT)
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return stop.status
    except Exception as error:
        wrong_input = isinstance(error, InputError)
        line = str(error) if wrong_input else describe_machine_error(error)
        if line is None:
            raise
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        return 2 if wrong_input else 3


@contextlib.contextmanager
def _leave_cores() -> Iterator[None]:
    """Use half of the cores: two runs that together have more threads than cores slow each other down extremely."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(before, cores // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(arguments: Sequence[str]) -> None:
    settings, options = read_settings(arguments)
    first = os.environ.get("RANK", "0") == "0"
    if options.check:
        if first:
            _check(settings, options.data_root)
        return
    name = options.preset or ("scenes" if options.config is None else Path(options.config).stem)
    labelled = "all" if settings.labelled is None else Path(str(settings.labelled)).stem
    out = Path(options.out or f"runs/{name}-{settings.method}-{labelled}-seed{settings.seed}")
    metrics = train(
        settings, out, data_root=options.data_root, resume=options.resume, save_predictions=options.save_predictions
    )
    if first:
        if metrics["miou"] is None:
            print("no scores: the settings have no test images (data.test)")
        else:
            scores = Scores(metrics["iou"], metrics["miou"], metrics["unlabelled"])
            print(score_table(scores, subsets=settings.data.subsets))
        if (out / "report.png").exists():
            print(f"report: {out / 'report.png'}")
    if dist.is_initialized():
        dist.destroy_process_group()


def _check(settings: Settings, data_root: Path | None) -> None:
    loaded = load_init(settings, build_segmenter(settings))
    if loaded is not None:
        print(loaded)
    check_accelerator(settings)
    report = check_data(settings, data_root)
    print(report.text)
    for note in report.notes:
        print(f"note: {note}")
    if report.problems:
        print(*(f"error: {problem}" for problem in report.problems), sep="\n", file=sys.stderr)
        raise InputError(f"{len(report.problems)} of the checked files cannot be used")
    print("no problem found in the checked files")


def _evaluate(arguments: Sequence[str]) -> None:
    parser = OneLineParser("evaluate")
    parser.add_argument("--run", "--out", metavar="DIR", type=Path, required=True, help="a run folder")
    parser.add_argument("--data-root", metavar="DIR", type=Path, help="folder that contains the run's image folders")
    split_help = "which images to score (default: test)"
    parser.add_argument("--split", choices=["validation", "test"], default="test", help=split_help)
    parser.add_argument("--subset", metavar="NAME", help="show only the classes of this subset, one of data.subsets")
    device_help = "device to compute on (default: as in training)"
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda", "mps"], help=device_help)
    best_help = "use the network with the best validation score, not the last one"
    parser.add_argument("--best", action="store_true", help=best_help)
    parser.add_argument("--save-predictions", metavar="DIR", type=Path, help="also write the predicted masks to DIR")
    options = parser.parse_args(arguments)
    network = load_run(options.run, best=options.best, accelerator=options.accelerator)
    data = network.data
    if options.best and options.split == "test" and data.test is not None and data.test == data.validation:
        raise InputError(
            "--best needs --split validation where data.validation equals data.test, got test: the best step would be "
            "chosen and scored on the same images"
        )
    if options.subset is not None and options.subset not in data.subsets:
        meant = did_you_mean(options.subset, data.subsets)
        raise InputError(f"expected --subset to be one of {sorted(data.subsets)}, got {options.subset}{meant}")
    images = getattr(open_images(network.settings, options.data_root), options.split)
    if images is None:
        raise InputError(f"expected the run's settings to have data.{options.split}, got no such folder")
    scores = evaluate(
        network.segmenter,
        images,
        data,
        predictions=options.save_predictions,
    )
    if scores.unlabelled:
        absent = ", ".join(scores.unlabelled)
        print(f"warning: data.{options.split}: no labelled pixel of {absent} in {len(images)} images", file=sys.stderr)
    print(score_table(scores, subsets=data.subsets, only=options.subset))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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
  train     train one method on the built-in scenes, a preset or a file of settings
  evaluate  score a run again: per class, and averaged over a named subset
  predict   masks of new images, by the network of a run
  export    the network of a run as a program of its own, or as weights
  study     several methods or settings, each with several seeds, in one table

`python -m examples.workbench COMMAND --help` lists the options of each; --version prints the versions.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command, and print an error in one line.

    Returns:
        0; 2 for wrong input, 3 for a failure of the machine, and 128 plus its number for a signal.
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
            raise InputError(f"expected a command, one of {names}, got {arguments[0]}{meant}")
        if arguments[0] != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"expected train on several ranks, got {arguments[0]}, which runs in one process")
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
    """Compute with half of the cores: two runs of more threads than cores hold each other up almost to a halt."""
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
            print("no scores, since the settings have no data.test")
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
        raise InputError(f"{len(report.problems)} of the files that were checked cannot be used")
    print("no problem found in the files that were checked")


def _evaluate(arguments: Sequence[str]) -> None:
    parser = OneLineParser("evaluate")
    parser.add_argument("--run", "--out", metavar="DIR", type=Path, required=True, help="a run folder")
    parser.add_argument("--data-root", metavar="DIR", type=Path, help="folder of the run's image folders")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="(default: test)")
    parser.add_argument("--subset", metavar="NAME", help="one of the run's data.subsets")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda", "mps"], help="(default: the run's)")
    parser.add_argument("--best", action="store_true", help="the step that was best on the validation images")
    parser.add_argument("--save-predictions", metavar="DIR", type=Path, help="write the predicted index masks here")
    options = parser.parse_args(arguments)
    network = load_run(options.run, best=options.best, accelerator=options.accelerator)
    data = network.data
    if options.best and options.split == "test" and data.test is not None and data.test == data.validation:
        raise InputError(
            "expected --split validation with --best where data.validation is data.test, got test: the step would be "
            "chosen on the images that it is scored on"
        )
    if options.subset is not None and options.subset not in data.subsets:
        meant = did_you_mean(options.subset, data.subsets)
        raise InputError(f"expected --subset to be one of {sorted(data.subsets)}, got {options.subset}{meant}")
    images = getattr(open_images(network.settings, options.data_root), options.split)
    if images is None:
        raise InputError(f"expected data.{options.split} in the run's settings, got no folder")
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

"""The command line: `python -m examples.workbench train | demo | evaluate | compare | study`."""

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
from lightning_fabric import Fabric
from torch import distributed as dist

from examples.workbench import errors as faults
from examples.workbench.data.check import check_data
from examples.workbench.data.images import open_images
from examples.workbench.errors import InputError
from examples.workbench.networks.build import Segmenter, build_segmenter, dtype_of, load_init
from examples.workbench.reporting.scores import Scores, evaluate, illustrate, score_table
from examples.workbench.settings import METHODS, Settings
from examples.workbench.studies.compare import compare, comparison_table
from examples.workbench.studies.study import draw_curves, draw_study, read_study, recorded, run_study, study_table
from examples.workbench.training import checkpoints, signals
from examples.workbench.training import run_folder as runs
from examples.workbench.training.learners import build_discriminator, discriminator_settings
from examples.workbench.training.train import train

__all__ = ["main"]

PRESETS = Path(__file__).parent / "presets"
STUDIES = Path(__file__).parent / "studies"
USAGE = """usage: python -m examples.workbench COMMAND [OPTIONS]

commands:
  train     train one method on the built-in scenes, a preset or a file of settings
  demo      source-only and ass on the built-in scenes, then a report of the two
  evaluate  score a run again: per class, and averaged over a named subset
  compare   several methods and seeds in one table
  study     the rows of a file, each with several seeds, into records that are kept and a table

`python -m examples.workbench COMMAND --help` lists the options of each.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        0; 2 where something that was given is not fit, 3 where the machine let the run down, and 128 and its number
        for a signal, each told in one line on standard error.
    """
    commands = {"train": _train, "demo": _demo, "evaluate": _evaluate, "compare": _compare, "study": _study}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise InputError(f"expected a command, one of {', '.join(commands)}, got {arguments[0]}")
        if arguments[0] != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(f"expected train on several ranks, got {arguments[0]}, which takes one process")
        with signals.stop_at_once():
            commands[arguments[0]](arguments[1:])
    except (InputError, argparse.ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except signals.Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print(signals.Stopped(signal.SIGINT), file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        line = faults.describe_machine_error(error)
        if line is None:
            raise
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
        return 3
    return 0


def _train(arguments: Sequence[str]) -> None:
    settings, options = _parse("train", arguments)
    first = os.environ.get("RANK", "0") == "0"
    if options.check and not first:
        return
    if options.check:
        _check_data(settings, _path(options.data_root))
        return
    name = options.preset or ("scenes" if options.config is None else Path(options.config).stem)
    out = Path(options.out or f"runs/{name}-{settings.method}-{settings.labelled}-seed{settings.seed}")
    metrics = train(
        settings,
        out,
        data_root=_path(options.data_root),
        resume=options.resume,
        save_predictions=options.save_predictions,
    )
    if first:
        print(score_table(Scores(metrics["iou"], metrics["miou"]), subsets=settings.data.subsets))
        if (out / "report.png").exists():
            print(f"report: {out / 'report.png'}")
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_data(settings: Settings, data_root: Path | None) -> None:
    network = settings.network
    if network.init is None and network.frozen_batch_norm:
        # Of the weights there is nothing to look at yet.
        network = dataclasses.replace(network, frozen_batch_norm=False)
    check(dataclasses.replace(settings, network=network))
    segmenter = build_segmenter(settings)
    if network.init is not None:
        print(load_init(settings, segmenter))
    discriminators = {name: build_discriminator(name, settings, segmenter) for name in discriminator_settings(settings)}
    print(estimate_memory(settings, segmenter, discriminators))
    report = check_data(settings, data_root)
    print(report.text)
    for note in report.notes:
        print(f"note: {note}")
    for problem in report.problems:
        print(f"error: {problem}", file=sys.stderr)
    if report.problems:
        raise InputError(f"expected every file that was looked at to be fit for use, got {len(report.problems)} unfit")
    print("no file that was looked at is unfit")


def _demo(arguments: Sequence[str]) -> None:
    settings, options = _parse("demo", arguments)
    for name in ("check", "save_predictions"):
        if getattr(options, name):
            raise InputError(f"expected --{name.replace('_', '-')} with train, got it with demo")
    if settings.method == "source-only":
        raise InputError("expected demo to have a method beside source-only, got source-only")
    out = Path(options.out or "runs/demo")
    data_root = _path(options.data_root)
    scores, segmenters = {}, []
    for method in ("source-only", settings.method):
        run = dataclasses.replace(settings, method=method)
        metrics = train(run, out / method, data_root=data_root, resume=options.resume)
        scores[method] = metrics["miou"]
        segmenters.append((method, _load(run, checkpoints.newest_checkpoint(out / method))))
    illustrate(
        out / "report.png",
        settings,
        open_images(settings, data_root),
        title=f"{settings.method} with {settings.labelled} labelled target images, against source-only",
        before=segmenters[0],
        after=segmenters[1],
        history=run_folder.read_history(out / settings.method),
    )
    for method, miou in scores.items():
        print(f"mIoU {method}: {100 * miou:.1f}")
    print(f"report: {out / 'report.png'}")


def _evaluate(arguments: Sequence[str]) -> None:
    parser = _parser("evaluate")
    parser.add_argument("--out", metavar="DIR", required=True, help="a run folder")
    parser.add_argument("--data-root", metavar="DIR", help="where the run's image folders lie")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="(default: test)")
    parser.add_argument("--subset", metavar="NAME", help="of the run's data.subsets this one alone")
    parser.add_argument("--accelerator", metavar="NAME", help="auto, cpu, cuda or mps (default: the run's)")
    parser.add_argument("--best", action="store_true", help="the step that was best on the validation images")
    parser.add_argument("--save-predictions", metavar="DIR", help="write the predicted index masks here")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if not (out / "settings.yaml").exists():
        raise InputError(f"expected --out to be a run folder, got {out}, which has no settings.yaml")
    settings, _ = _parse("train", ["--config", str(out / "settings.yaml")])
    if options.accelerator is not None:
        settings = dataclasses.replace(settings, accelerator=options.accelerator)
    check_accelerator(settings)
    chosen_on_test = settings.data.test is not None and settings.data.test == settings.data.validation
    if options.best and options.split == "test" and chosen_on_test:
        raise InputError(
            "expected --split validation with --best where data.validation is data.test, got test: the step would be "
            "chosen on the images that it is scored on"
        )
    subsets = settings.data.subsets
    if options.subset is not None and options.subset not in subsets:
        raise InputError(f"expected --subset to be one of {sorted(subsets)}, got {options.subset}")
    scores = evaluate(
        _load(settings, out / checkpoints.BEST if options.best else checkpoints.newest_checkpoint(out)),
        getattr(open_images(settings, _path(options.data_root)), options.split),
        classes=settings.data.classes,
        size=settings.data.size,
        ignore_index=settings.data.ignore_index,
        predictions=_path(options.save_predictions),
    )
    print(score_table(scores, subsets=subsets, only=options.subset))


def _compare(arguments: Sequence[str]) -> None:
    parser = _parser("compare", "Options of train may follow; they hold for every run.")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--out", metavar="DIR", default="runs/compare", help="(default: runs/compare)")
    options, rest = parser.parse_known_args(arguments)
    settings, train_options = _parse("train", rest)
    if train_options.check:
        raise InputError("expected --check with train, got it with compare")
    own = train_options.out is not None or train_options.resume
    if own or any(argument.partition("=")[0] in ("--method", "--seed") for argument in rest):
        raise InputError("expected compare to choose method, seed, out and resume of its runs, got one of them")
    check(settings)
    results = compare(
        rest,
        methods=options.methods,
        seeds=options.seeds,
        out=Path(options.out),
        jobs=options.jobs,
        threads=options.threads,
    )
    print(comparison_table(results))
    print(f"table: {Path(options.out) / 'comparison.md'}")


def _study(arguments: Sequence[str]) -> None:
    parser = _parser("study")
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    parser.add_argument("study", metavar="NAME", help=f"{', '.join(names)}, or a YAML file")
    parser.add_argument("--data-root", metavar="DIR", help="where the image folders lie")
    parser.add_argument("--records", metavar="DIR", default="docs/results", help="(default: docs/results)")
    parser.add_argument("--out", metavar="DIR", default="runs/study", help="of the run folders (default: runs/study)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="table and figure of what is on record; run nothing")
    options = parser.parse_args(arguments)
    if min(options.jobs, options.threads) < 1:
        raise InputError(f"expected --jobs and --threads of at least 1, got {options.jobs} and {options.threads}")
    path = STUDIES / f"{options.study}.yaml" if options.study in names else Path(options.study)
    study = read_study(path)
    records = Path(options.records) / f"{path.stem}.json"
    if options.report_only:
        results = recorded(study, records=records)
    else:
        results = run_study(
            study,
            records=records,
            out=Path(options.out) / path.stem,
            data_root=options.data_root,
            jobs=options.jobs,
            threads=options.threads,
        )
    table = study_table(study, results)
    how = f"`python -m examples.workbench study {path.stem}`"
    checkpoints.write_whole(records.with_suffix(".md"), lambda to: to.write_text(f"{table}\n{how}\n", encoding="utf-8"))
    draw_study(records.with_suffix(".png"), study, results)
    draw_curves(records.with_name(f"{path.stem}-curves.png"), study, results)
    print(table)
    print(f"records: {records}")


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(message)


def _parser(command: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return _OneLineParser(prog=f"python -m examples.workbench {command}", epilog=epilog, allow_abbrev=False)


def _parse(command: str, arguments: Sequence[str]) -> tuple[Settings, argparse.Namespace]:
    # The preset or file must be known before the settings are parsed, since options given beside it come over it.
    where = _parser(command)
    where.add_argument("--preset")
    where.add_argument("--config")
    chosen, _ = where.parse_known_args([argument for argument in arguments if argument not in ("-h", "--help")])
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if chosen.preset is not None and chosen.config is not None:
        raise InputError(f"expected --preset or --config, got both, {chosen.preset} and {chosen.config}")
    if chosen.preset is not None and chosen.preset not in presets:
        raise InputError(f"expected --preset to be one of {', '.join(presets)}, got {chosen.preset}")
    file = chosen.config if chosen.preset is None else str(PRESETS / f"{chosen.preset}.yaml")
    if file is not None and not Path(file).is_file():
        raise InputError(f"expected --config to be a file, got {file}")
    try:
        _ = file and Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"expected --config to be a text file in UTF-8, got {file}") from error

    parser = jsonargparse.ArgumentParser(
        prog=f"python -m examples.workbench {command}",
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[] if file is None else [file],
    )
    parser.add_argument("--preset", metavar="NAME", help=f"settings that come with the trainer: {', '.join(presets)}")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--data-root", metavar="DIR", help="where the image folders of the settings lie")
    parser.add_argument("--out", metavar="DIR", help="the run folder")
    parser.add_argument("--init", metavar="FILE", help="short for --network.init")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument("--save-predictions", action="store_true", help="write the test set's index masks")
    parser.add_argument("--check", action="store_true", help="look at images and weights for a minute, train nothing")
    parser.add_class_arguments(Settings, None)
    try:
        options = parser.instantiate(parser.parse_args(list(arguments)))
    except argparse.ArgumentError as error:
        raise InputError(f"{error} (with the settings of {file})" if file else str(error)) from error
    except ValueError as error:
        # A value out of range; the scenes' own are no InputError.
        raise InputError(str(error)) from error
    settings = Settings(**{part.name: options[part.name] for part in dataclasses.fields(Settings)})
    if options.init is not None:
        settings = dataclasses.replace(settings, network=dataclasses.replace(settings.network, init=options.init))
    return settings, options


def _load(settings: Settings, checkpoint: Path) -> Segmenter:
    segmenter = build_segmenter(settings)
    taught = "self-training" in METHODS[settings.method] and settings.self_training.final == "teacher"
    weights = checkpoints.load_weights(checkpoint, teacher=taught)
    checkpoints.check_weights_fit(segmenter.state_dict(), weights, checkpoint)
    segmenter.load_state_dict(weights)
    return segmenter.to(Fabric(accelerator=settings.accelerator, devices=1).device, dtype_of(settings)).eval()


def _path(path: str | None) -> Path | None:
    return None if path is None else Path(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command `study`: studies by their names, or one of methods, and the reports of them."""

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.workbench.errors import InputError
from examples.workbench.options import OneLineParser
from examples.workbench.settings import METHODS
from examples.workbench.spelling import did_you_mean
from examples.workbench.studies.report import write_report
from examples.workbench.studies.runs import run_study
from examples.workbench.studies.study import STUDIES, Record, Study, read_records, read_study, study_of_methods
from examples.workbench.studies.summary import write_summary

__all__ = ["study_command"]

_RESULTS = Path("docs/results")
"""Records of the workbench's own studies, which are committed."""


def study_command(arguments: Sequence[str]) -> None:
    """Run studies one after another, and write a report of each and a summary of several."""
    # Not left to argparse, which would take the values of options of train for names.
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    options, rest = _parser().parse_known_args(arguments[len(named) :])
    if min(options.jobs, options.threads) < 1:
        raise InputError(f"expected --jobs and --threads of at least 1, got {options.jobs} and {options.threads}")
    if bool(named) == (options.methods is not None):
        given = f"both, {' '.join(named)} and --methods" if named else "neither"
        raise InputError(f"expected names of studies, before all options, or --methods, got {given}")
    if named and (rest or options.seeds):
        given = f"{' '.join(named)} with {' '.join(rest) or '--seeds'}"
        raise InputError(f"expected names first; options of train and --seeds go with --methods, got {given}")
    if options.summary is not None and (len(named) < 2 or options.summary.suffix != ".md"):
        raise InputError(f"expected --summary to be a file .md, with several studies, got {options.summary}")
    if named:
        studies = _read(named)
    else:
        studies = {"methods": study_of_methods(options.methods, options.seeds or [0, 1, 2], rest)}
    found = {}
    chosen = [[word] for word in named] or [list(arguments)]
    for (name, study), words in zip(studies.items(), chosen, strict=True):
        # Of a study that is no file of the workbench, in its own folder.
        folder = options.records or (_RESULTS if name in named else options.out / name)
        file = folder / f"{name}.json"
        records = _run(study, name, file, options)
        if options.report_only and not records and len(studies) > 1:
            print(f"{file} holds no runs of {study.title} yet", file=sys.stderr)
            continue
        found[name] = study, records
        print(write_report(study, records, file, _command(words)))
        print(f"records, table, figure: {file}, {file.with_suffix('.md')}, {file.with_suffix('.png')}", flush=True)
    if len(studies) > 1:
        if not found:
            raise InputError(f"expected runs on record, got none of {', '.join(studies)}")
        folder = options.records or (_RESULTS if set(studies) == set(named) else options.out)
        summary = options.summary or folder / "summary.md"
        print(f"\n{write_summary(found, summary, _command(named))}")
        print(f"summary, figure: {summary}, {summary.with_suffix('.png')}")


def _parser() -> OneLineParser:
    example = "study --methods labelled-only joint ass --config mine.yaml --data-root DIR --labelled 10 --steps 1000"
    epilog = f"NAME is {', '.join(_names())} or a YAML file. With --methods, options of train hold for every run: "
    parser = OneLineParser("study [NAME ...]", epilog=epilog + example)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="in place of NAME")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of each method (default: 0 1 2)")
    parser.add_argument("--data-root", metavar="DIR", type=Path, help="folder of the image folders")
    parser.add_argument("--records", metavar="DIR", type=Path, help=f"(default: {_RESULTS}; of your studies, in --out)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/study"), help="(default: runs/study)")
    parser.add_argument("--summary", metavar="FILE", type=Path, help="of several (default: summary.md by the records)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="tables and figures of the records; run nothing")
    return parser


def _names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def _read(named: Sequence[str]) -> dict[str, Study]:
    """The studies by their names, all of them checked before the first of them runs."""
    studies: dict[str, Study] = {}
    for word in named:
        path = STUDIES / f"{word}.yaml" if word in _names() else Path(word)
        if not path.exists():
            names, meant = ", ".join(_names()), did_you_mean(word, _names())
            raise InputError(f"expected a study, one of {names} or a YAML file, got {word}{meant}")
        if path.stem in studies:
            raise InputError(f"expected studies of different names, got two called {path.stem}")
        studies[path.stem] = read_study(path)
        _ = studies[path.stem].settings
    return studies


def _run(study: Study, name: str, file: Path, options: argparse.Namespace) -> list[Record]:
    if options.report_only:
        return read_records(study, file)
    out, root = options.out / name, options.data_root
    return run_study(study, records=file, out=out, data_root=root, jobs=options.jobs, threads=options.threads)


def _command(words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "examples.workbench", "study", *words])

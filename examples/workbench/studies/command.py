"""The command `study`: runs named studies, or one study of several methods, and writes their reports."""

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
"""Folder of the records of the workbench's own studies, which are committed."""


def study_command(arguments: Sequence[str]) -> None:
    """Run studies one after another, and write a report of each study and a summary of several."""
    # argparse would mistake the values of train's options for names, so the names are separated here.
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    options, rest = _parser().parse_known_args(arguments[len(named) :])
    if min(options.jobs, options.threads) < 1:
        raise InputError(f"expected --jobs and --threads of at least 1, got {options.jobs} and {options.threads}")
    if bool(named) == (options.methods is not None):
        given = f"both, {' '.join(named)} and --methods" if named else "neither"
        raise InputError(f"expected either names of studies, before all options, or --methods, got {given}")
    if named and (rest or options.seeds):
        given = f"{' '.join(named)} with {' '.join(rest) or '--seeds'}"
        raise InputError(f"names come before all options, and options of train or --seeds need --methods, got {given}")
    if options.summary is not None and (len(named) < 2 or options.summary.suffix != ".md"):
        raise InputError(f"--summary needs several studies and a file that ends in .md, got {options.summary}")
    if named:
        studies = _read(named)
    else:
        studies = {"methods": study_of_methods(options.methods, options.seeds or [0, 1, 2], rest)}
    found = {}
    chosen = [[word] for word in named] or [list(arguments)]
    for (name, study), words in zip(studies.items(), chosen, strict=True):
        # Records of a study that does not ship with the workbench are in the study's own folder.
        folder = options.records or (_RESULTS if name in named else options.out / name)
        file = folder / f"{name}.json"
        records = _run(study, name, file, options)
        if options.report_only and not records and len(studies) > 1:
            print(f"{file} has no records of {study.title} yet", file=sys.stderr)
            continue
        found[name] = study, records
        print(write_report(study, records, file, _command(words)))
        print(f"records, table, figure: {file}, {file.with_suffix('.md')}, {file.with_suffix('.png')}", flush=True)
    if len(studies) > 1:
        if not found:
            raise InputError(f"expected recorded runs, got none of {', '.join(studies)}")
        folder = options.records or (_RESULTS if set(studies) == set(named) else options.out)
        summary = options.summary or folder / "summary.md"
        print(f"\n{write_summary(found, summary, _command(named))}")
        print(f"summary, figure: {summary}, {summary.with_suffix('.png')}")


def _parser() -> OneLineParser:
    example = "study --methods labelled-only joint ass --config mine.yaml --data-root DIR --labelled 10 --steps 1000"
    epilog = f"NAME is {', '.join(_names())} or a YAML file. With --methods, options of train apply to every run: "
    parser = OneLineParser("study [NAME ...]", epilog=epilog + example)
    add, methods_help = parser.add_argument, "methods to compare, instead of NAME"
    add("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=methods_help)
    add("--seeds", nargs="+", type=int, metavar="SEED", help="seeds of each method (default: 0 1 2)")
    add("--data-root", metavar="DIR", type=Path, help="folder that contains the image folders")
    records_help = f"folder of the records (default: {_RESULTS}; for your own studies, a folder in --out)"
    add("--records", metavar="DIR", type=Path, help=records_help)
    out_help = "folder for the run folders (default: runs/study)"
    add("--out", metavar="DIR", type=Path, default=Path("runs/study"), help=out_help)
    summary_help = "summary of several studies (default: summary.md beside the records or in --out)"
    add("--summary", metavar="FILE", type=Path, help=summary_help)
    add("--jobs", type=int, default=2, metavar="N", help="number of runs at a time (default: 2)")
    add("--threads", type=int, default=1, metavar="N", help="number of threads per run (default: 1)")
    add("--report-only", action="store_true", help="write tables and figures of the records; run nothing")
    return parser


def _names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def _read(named: Sequence[str]) -> dict[str, Study]:
    """The studies by name. All of them are checked before the first one runs."""
    studies: dict[str, Study] = {}
    for word in named:
        path = STUDIES / f"{word}.yaml" if word in _names() else Path(word)
        if not path.exists():
            names, meant = ", ".join(_names()), did_you_mean(word, _names())
            raise InputError(f"expected a study, one of {names} or a YAML file, got {word}{meant}")
        if path.stem in studies:
            raise InputError(f"expected studies with different names, got two called {path.stem}")
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

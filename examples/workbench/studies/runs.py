"""The runs of a study. Each is a separate process with its own folder and log; several run at a time."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import yaml
from joblib import Parallel, delayed

from examples.workbench.errors import InputError
from examples.workbench.files import write_whole
from examples.workbench.plain import as_plain, check_same_run
from examples.workbench.progress import bar, say, time_left
from examples.workbench.settings import Settings
from examples.workbench.studies.study import Record, Study, known_settings, read_records, write_record

__all__ = ["run_study"]

# Tests replace this program.
_TRAIN = [sys.executable, "-m", "examples.workbench", "train"]


class _Run(NamedTuple):
    row: str
    settings: Settings
    folder: Path


def run_study(
    study: Study, *, records: Path, out: Path, data_root: Path | None = None, jobs: int = 2, threads: int = 1
) -> list[Record]:
    """Run all runs without a record, seed by seed, record each when it ends, and return the records row by row.

    A finished run in `out` is recorded without running it again, and an unfinished run resumes. If a run fails, or the
    study is interrupted, the other runs are terminated, and they keep their last checkpoints. A line on standard error
    reports each run that ends.

    Args:
        study: the study to run.
        records: JSON file of the records.
        out: folder for the run folders and their logs.
        data_root: folder that contains the image folders; it is not part of a record.
        jobs: number of runs at a time.
        threads: number of threads of each run.
    """
    recorded, due = {(record["row"], record["seed"]) for record in read_records(study, records)}, []
    for row, seed in study.runs:
        if (row, seed) in recorded:
            continue
        run = _Run(row, dataclasses.replace(study.settings[row], seed=seed), out / f"{row}-seed{seed}")
        if _finished(run):
            _record(study, run, records)
        else:
            due.append(run)
    total, processes, began = len(study.runs), _Processes(), time.monotonic()
    parallel = Parallel(n_jobs=jobs, prefer="threads", return_as="generator_unordered")
    with bar(total=total, initial=total - len(due), desc="study", unit="run") as shown:
        try:
            ended = parallel(delayed(processes.train)(run, data_root, threads) for run in due)
            for done, run in enumerate(ended, 1):
                record, left = _record(study, run, records), len(due) - done
                shown.update()
                told = (
                    f"{run.folder.name}: mIoU {100 * study.scores(record)['miou']:.1f}, run {total - left} of {total}"
                )
                say(f"{told}, {time_left((time.monotonic() - began) / done * left)}" if left else told)
        finally:
            processes.terminate()
    return read_records(study, records)


class _Processes:
    """The processes of the runs, started in threads and terminated together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.started: list[subprocess.Popen[bytes]] = []
        self.stopped = False

    def train(self, run: _Run, data_root: Path | None, threads: int) -> _Run:
        """Train a run to its end; resume it if its folder exists."""
        settings, log = (run.folder.with_name(f"{run.folder.name}.{kind}") for kind in ("yaml", "log"))
        command = [*_TRAIN, "--config", str(settings), "--out", str(run.folder)]
        command += ["--data-root", str(data_root)] if data_root else []
        command += ["--resume"] if run.folder.exists() else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self.lock:
            if self.stopped:
                return run
            write_whole(settings, lambda to: to.write_text(yaml.safe_dump(as_plain(run.settings), sort_keys=False)))
            with log.open("ab") as out:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
            self.started.append(process)
        if process.wait() and not self.stopped:
            # Set this before the thread starts its next run.
            self.stopped = True
            *_, last = ["", *log.read_text(encoding="utf-8", errors="replace").strip().splitlines()]
            raise InputError(f"{run.folder.name} ended with status {process.returncode}: {last} (see {log})")
        return run

    def terminate(self) -> None:
        """Terminate the running processes, and start no more."""
        with self.lock:
            self.stopped = True
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.wait()


def _finished(run: _Run) -> bool:
    """Whether the folder holds the finished run. A run with different settings is refused."""
    settings = run.folder / "settings.yaml"
    if settings.exists():
        try:
            check_same_run(yaml.safe_load(settings.read_text(encoding="utf-8")), as_plain(run.settings), settings)
        except InputError as error:
            raise InputError(
                f"the study's settings have changed: choose a new --out, or delete {run.folder}: {error}"
            ) from error
    return settings.exists() and (run.folder / "metrics.json").exists()


def _record(study: Study, run: _Run, records: Path) -> Record:
    metrics = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    options, settings = study.options(run.row), known_settings(run.settings)
    record = {"row": run.row, "seed": run.settings.seed, "options": options, "settings": settings, **metrics}
    write_record(records, record)
    return record

"""A program that stands for `train`: a run takes a tenth of a second, and its score follows from its settings."""

import sys

import pytest

from examples.workbench.studies import runs

TRAINER = """
import argparse, json, os, pathlib, shutil, sys, time, yaml
parser = argparse.ArgumentParser()
for name in ("config", "out", "data-root"):
    parser.add_argument(f"--{name}")
parser.add_argument("--resume", action="store_true")
a = parser.parse_args()
settings, out = yaml.safe_load(open(a.config)), pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=a.resume)
shutil.copy(a.config, out / "settings.yaml")
(out / "pid").write_text(str(os.getpid()))
with (out.parent / "started").open("a") as log:
    log.write(f"{out.name} {os.environ['OMP_NUM_THREADS']} {a.data_root}\\n")
while len(list(out.parent.glob("*/pid"))) < int(os.environ.get("GATHER", 0)):
    time.sleep(0.01)
if settings["method"] == os.environ.get("SLEEP"):
    time.sleep(120)
if settings["method"] == os.environ.get("FAIL"):
    sys.exit("error: expected luck\\n")
time.sleep(0.1)
miou = 0.5 + 0.01 * settings["seed"] + settings["global_alignment"]["weight"]
score = {"miou": miou, "iou": {"road": miou, "pole": None}}
(out / "metrics.json").write_text(json.dumps({"method": settings["method"], "seed": settings["seed"], **score,
    "validation": score, "seconds": 60.0, "versions": {"torch": "2.13.0"}}))
with (out.parent / "started").open("a") as log:
    log.write("ended - -\\n")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    program = tmp_path / "trainer.py"
    program.write_text(TRAINER)
    monkeypatch.setattr(runs, "_TRAIN", [sys.executable, str(program)])
    return tmp_path

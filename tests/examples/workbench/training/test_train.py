"""Training: every method's run folder, bit-identical resume, run folders that are not mixed up, variants."""

import json

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.scenes import Scenes
from examples.workbench.errors import InputError
from examples.workbench.networks.build import build_segmenter
from examples.workbench.settings import METHODS
from examples.workbench.training import checkpoints, run_folder
from examples.workbench.training import train as train_module
from examples.workbench.training.train import train
from tests.errors import mentions, refuses
from tests.examples.workbench.tiny import TINY, checkpoint, equal, history, tiny

# The trainer's libraries give their own warnings.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == "ass" else pytest.mark.slow) for method in METHODS]
)
def test_every_method_leaves_a_run_folder(method, tmp_path):
    out = tmp_path / "run"
    metrics = train(tiny(method=method), out, save_predictions=True)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    expected = {
        "method": method,
        "labelled": 6 if method == "oracle" else 2,
        "seed": 0,
        "steps": 6,
        "num_classes": 8,
        "resumed_from": [],
    }
    assert {name: metrics[name] for name in expected} == expected
    values = [value for value in metrics["iou"].values() if value is not None]
    assert metrics["miou"] == pytest.approx(sum(values) / len(values))
    assert yaml.safe_load((out / "settings.yaml").read_text())["method"] == method
    assert len((out / "labelled.txt").read_text().split()) == (6 if method == "oracle" else 2)
    assert (out / "report.png").stat().st_size > 10_000
    assert list((out / "tensorboard").glob("events*"))
    assert len(list((out / "predictions").glob("*.png"))) == 3
    alignments = METHODS[method] & {"global", "semantic"}
    state = checkpoint(out)
    assert {name.split()[0] for name in state["stateful"] if name.endswith("alignment")} == alignments
    assert state["step"] == 6
    last = run_folder.read_history(out)[-1]
    weighted = {name.split("/")[1] for name in last if name.startswith("weight/")}
    assert weighted == alignments | (METHODS[method] & {"self-training"})
    for name in alignments:
        assert last[f"weight/{name}"] > 0
        assert last[f"gradient/{name}"] > 0
        assert 0 <= last[f"accuracy/{name}_source"] <= 1
        assert last[f"loss/{name}_discriminator"] > 0


@pytest.mark.slow
def test_methods_share_their_start_and_alignments_matter(tmp_path):
    weights = {}
    for method in ("joint", "global", "semantic", "ass"):
        train(tiny(method=method, steps=3), tmp_path / method)
        weights[method] = checkpoint(tmp_path / method)["stateful"]["segmenter"]
    before = torch.load(tmp_path / "joint" / "checkpoints" / "before.pt", weights_only=True)
    assert equal(before["stateful"]["segmenter"], dict(build_segmenter(TINY).state_dict()))
    methods = list(weights)
    assert not any(equal(weights[a], weights[b]) for i, a in enumerate(methods) for b in methods[:i])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"method": "ass-plus", "self_training": {"start": 0.0, "ramp": 0.0, "threshold": 0.2}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"global_alignment": {"inputs": "balanced", "every": 2}}, marks=pytest.mark.slow),
    ],
    ids=["ass", "ass-plus", "balanced"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(changes, tmp_path, monkeypatch):
    settings = tiny(**changes)
    whole = train(settings, tmp_path / "whole")
    append = run_folder.append_history

    def interrupt(out, row):
        append(out, row)
        if row["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "append_history", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut")
    monkeypatch.undo()
    assert checkpoint(tmp_path / "cut")["step"] == 3
    resumed = train(settings, tmp_path / "cut", resume=True)
    assert resumed["resumed_from"] == [3]
    assert equal(checkpoint(tmp_path / "whole")["stateful"], checkpoint(tmp_path / "cut")["stateful"])
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    assert (resumed["miou"], resumed["iou"]) == (whole["miou"], whole["iou"])
    if not changes:
        train(tiny(seed=1), tmp_path / "other")
        assert not equal(checkpoint(tmp_path / "whole")["stateful"], checkpoint(tmp_path / "other")["stateful"])


def test_resume_in_a_folder_without_a_checkpoint_starts_at_step_0(tmp_path):
    (tmp_path / "run").mkdir()
    assert train(tiny(steps=1), tmp_path / "run", resume=True)["resumed_from"] == []
    assert [row["step"] for row in run_folder.read_history(tmp_path / "run")] == [0]


def test_without_its_report_a_run_still_has_metrics(tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise ValueError("96 colours")

    monkeypatch.setattr(train_module, "draw_report", fail)
    metrics = train(tiny(method="source-only", steps=1), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    mentions(capsys.readouterr().err.splitlines()[-1], "no report", 96)


def test_images_of_another_shape_have_a_report(tmp_path, monkeypatch):
    """Three times as wide as data.size: such labels do not fit the features' grid."""
    wide, open_images = Scenes("target", "val", 2, seed=0, size=(32, 96)), train_module.open_images
    monkeypatch.setattr(train_module, "open_images", lambda *which: open_images(*which)._replace(validation=wide))
    train(tiny(method="source-only", steps=1), tmp_path / "run")
    assert (tmp_path / "run" / "report.png").exists()


def test_run_folders_are_not_mixed_up(tmp_path):
    out = tmp_path / "run"
    train(tiny(steps=1), out)
    with refuses(InputError, "--out", "--resume", out):
        train(tiny(steps=1), out)
    with refuses(InputError, "labelled 3", out / "settings.yaml", 2):
        train(tiny(steps=1, labelled=3), out, resume=True)
    checkpoints.newest_checkpoint(out).write_bytes(b"cut short")
    with refuses(InputError, out / "checkpoints", "1 damaged"):
        train(tiny(steps=1), out, resume=True)
    (tmp_path / "file").touch()
    with refuses(InputError, "--out", tmp_path / "file"):
        train(TINY, tmp_path / "file")


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with refuses(InputError, "labelled", 6, 7):
        train(tiny(labelled=7), tmp_path / "run")
    with refuses(InputError, "network.init", "frozen_batch_norm"):
        network = {"name": "deeplab-v2", "width": 16, "depth": 50, "frozen_batch_norm": True}
        train(tiny(network=network), tmp_path / "run")
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with refuses(InputError, "--accelerator cpu", absent):
        train(tiny(accelerator=absent), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    learn = train_module.learn

    def poison(step, batch, *arguments, **options):
        if step == 4:
            batch["source"]["image"].fill_(torch.inf)
        return learn(step, batch, *arguments, **options)

    monkeypatch.setattr(train_module, "learn", poison)
    with refuses(InputError, "loss", "nan", "step 4", "learning rate"):
        train(TINY, tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "semantic", "semantic_alignment": {"conditioning": "none", "spectral_norm": True}},
        {"method": "semantic", "semantic_alignment": {"conditioning": "class-and-domain", "per_image": False}},
        {"method": "semantic", "semantic_alignment": {"r1": 1.0, "resample": "majority"}},
        {
            "method": "global",
            "precision": "bf16-mixed",
            "global_alignment": {"inputs": "entropy", "r1": 1.0, "every": 2, "objective": "hinge"},
        },
        {"precision": "64-true", "optimiser": {"name": "sgd", "classifier_factor": 10.0}},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_variants_train(changes, tmp_path):
    train(tiny(steps=2, **changes), tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_the_reference_of_the_global_alignment_matters(tmp_path):
    weights = {}
    for against in ("source", "labelled", "both"):
        how = {"start": 0.0, "ramp": 0.0, "against": against}
        train(tiny(method="global", steps=3, global_alignment=how), tmp_path / against)
        newest = checkpoints.newest_checkpoint(tmp_path / against)
        weights[against] = checkpoints.load_weights(newest)["classifier.weight"]
    assert len({tuple(of.flatten().tolist()) for of in weights.values()}) == 3


@pytest.mark.parametrize("validate_every", [0, 2])
def test_tensorboard_has_scores_rates_and_pictures(validate_every, tmp_path):
    out = tmp_path / "run"
    metrics = train(tiny(steps=4, validate_every=validate_every), out)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scores = [(event.step + 1, event.value) for event in events.Scalars("miou/validation")]
    assert [step for step, _ in scores] == ([2, 4] if validate_every else [4])
    assert scores[-1][1] == pytest.approx(metrics["validation"]["miou"])
    for name in ("segmenter", "global", "semantic"):
        rates = [event.value for event in events.Scalars(f"learning_rate/{name}")]
        assert len(rates) == 4
        assert rates[0] == pytest.approx(3e-3 if name == "segmenter" else 5e-4)
        assert (rates[-1] < rates[0]) == (name == "segmenter")
    # Two validation images.
    assert events.Tags()["images"] == ["predictions/0", "predictions/1"]
    for event in events.Images("predictions/1"):
        assert (event.height, event.width) == (32, 3 * 32)
    assert [event.step + 1 for event in events.Images("predictions/1")] == [step for step, _ in scores]


def test_a_run_says_where_it_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    train(tiny(steps=3), out, resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: data.")]
    mentions(lines[0], "no checkpoint", out, "step 0")
    train(tiny(steps=3), out, resume=True)
    mentions(capsys.readouterr().err.splitlines()[0], "resuming", out, "step 3")
    train(tiny(steps=3), tmp_path / "new")
    assert "resum" not in capsys.readouterr().err

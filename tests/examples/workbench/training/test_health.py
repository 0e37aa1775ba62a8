"""Health: figures against ones counted by hand, each fault caused in a run, each warning given once."""

import dataclasses
import json
import math
import mmap

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import semshift
from examples.scenes import Severity
from examples.workbench.data_settings import Augmentation, Data, Folder, SceneSettings
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.settings import NetworkSettings
from examples.workbench.training import train as train_module
from examples.workbench.training.health import (
    alignment_figures,
    feature_figures,
    findings,
    format_row,
    machine_figures,
    shorten_row,
    window,
)
from examples.workbench.training.train import train
from tests.errors import mentions
from tests.examples.workbench.tiny import TINY, history, tiny

# The trainer's libraries give their own warnings.
pytestmark = pytest.mark.filterwarnings("default")


def with_discriminators(*, alignment=None, **changes):
    """Twenty steps, of which ten are judged; the weights have their full value from the start."""
    alignment = {"start": 0.0, "ramp": 0.0} | (alignment or {})
    return tiny(**{"steps": 20, "save_every": 100} | changes, global_alignment=alignment, semantic_alignment=alignment)


def warnings(out):
    """Those of the discriminators; small sets of images lack classes too."""
    path = out / "warnings.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["kind"]: row for row in rows if not row["kind"].startswith("classes ")}


@pytest.mark.slow
def test_faults_of_both_discriminators_in_runs(tmp_path, capsys):
    """One that does not learn is at chance; a weight too high dominates, one too low is silent."""
    for change, kind, words in (
        ({"learning_rate": 1e-12}, "chance", ("Raise its learning rate", "{}_alignment.learning_rate 1e-12")),
        ({"weight": 1000.0}, "dominates", ("lower", "{}_alignment.weight 1000")),
        ({"weight": 1e-7}, "silent", ("raise", "{}_alignment.weight 1e-07")),
    ):
        train(with_discriminators(alignment=change), tmp_path / kind)
        shown, found = capsys.readouterr().err, warnings(tmp_path / kind)
        for name in ("global", "semantic"):
            row = found[f"{name} {kind}"]
            assert row["step"] == 19
            mentions(row["warning"], *(text.format(name) for text in words))
            assert f"warning: {row['warning']}" in shown


@pytest.mark.slow
def test_a_discriminator_that_is_far_ahead_is_certain(tmp_path):
    scenes = SceneSettings(source=2, target=2, validation=1, test=1, severity=Severity(1, 1, 1, 1, 1, 1))
    data = dataclasses.replace(TINY.data, scenes=scenes, augmentation=Augmentation((1.0, 1.0), 0.0, 0.0))
    how = {"learning_rate": 3e-3, "weight": 1e-3}
    train(with_discriminators(method="semantic", steps=24, data=data, alignment=how), tmp_path)
    (row,) = warnings(tmp_path).values()
    assert row["kind"] == "semantic certain"
    mentions(row["warning"], "semantic_alignment.learning_rate 0.003", "semantic_alignment.weight 0.001")


@pytest.mark.slow
def test_a_discriminator_that_sees_no_class_is_idle(tmp_path, monkeypatch):
    # Such images are refused; crops of them may still leave out the few pixels that are labelled.
    monkeypatch.setattr(train_module, "require_labels", lambda *which, **how: np.ones(256, np.int64))
    rng = np.random.default_rng(0)
    for domain, ids in (("source", (0, 1)), ("target", (255,))):
        for kind in ("images", "labels"):
            (tmp_path / domain / kind).mkdir(parents=True)
        for i in range(2):
            label = rng.choice(ids, (32, 32)).astype(np.uint8)
            image = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / domain / "images" / f"{i}.png")
            Image.fromarray(label).save(tmp_path / domain / "labels" / f"{i}.png")
    source, target = (Folder(f"{domain}/images", f"{domain}/labels") for domain in ("source", "target"))
    data = Data(classes=["a", "b"], size=(32, 32), source=source, target=target, validation=source, test=source)
    train(with_discriminators(method="semantic", data=data), tmp_path / "run", data_root=tmp_path)
    (row,) = warnings(tmp_path / "run").values()
    assert row["kind"] == "semantic idle"
    mentions(row["warning"], "--check", "data.classes")


@pytest.mark.slow
def test_a_resumed_run_repeats_no_warning(tmp_path, capsys, monkeypatch):
    settings = with_discriminators(method="semantic", steps=22, save_every=15, alignment={"weight": 1000.0})
    train(settings, tmp_path / "whole")
    (first, *_) = warnings(tmp_path / "whole").values()
    assert first["step"] == 19
    capsys.readouterr()

    def interrupt(row):
        if row["step"] == 20:
            raise KeyboardInterrupt
        return format_row(row)

    monkeypatch.setattr(train_module, "format_row", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut")
    monkeypatch.undo()
    assert capsys.readouterr().err.count(first["warning"]) == 1
    # Steps 15 to 20 come again, and their fault too.
    assert train(settings, tmp_path / "cut", resume=True)["resumed_from"] == [15]
    assert first["warning"] not in capsys.readouterr().err
    assert (tmp_path / "cut" / "warnings.jsonl").read_text() == (tmp_path / "whole" / "warnings.jsonl").read_text()
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def rows(count=20, *, first=0, **changed):
    """Of a healthy semantic discriminator, each figure as said."""
    healthy = {"weight/semantic": 0.01, "gradient/semantic": 0.02, "gradient/segmentation": 0.4}
    healthy |= {"accuracy/semantic_source": 0.8, "accuracy/semantic_target": 0.7}
    changed = {name.replace("__", "/"): value for name, value in changed.items()}
    return [{"step": first + step, **healthy, **changed} for step in range(count)]


SEMANTIC = with_discriminators(method="semantic")


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, None),
        ({"accuracy__semantic_source": 0.98, "accuracy__semantic_target": 0.98}, "certain"),
        # A high accuracy on one domain only is no certainty: everything may be classified as that domain.
        ({"accuracy__semantic_source": 1.0}, None),
        ({"accuracy__semantic_source": 1.0, "accuracy__semantic_target": 0.1}, "chance"),
        ({"accuracy__semantic_source": 0.56, "accuracy__semantic_target": 0.55}, None),
        ({"accuracy__semantic_source": math.nan}, "idle"),
        ({"gradient__semantic": 0.0003}, "silent"),
        ({"gradient__semantic": 0.0005}, None),
        ({"gradient__semantic": 0.81}, "dominates"),
        ({"gradient__semantic": 0.79}, None),
        # Nothing to compare with.
        ({"gradient__segmentation": 0.0}, None),
        # The weight has not risen yet.
        ({"gradient__semantic": 0.0, "weight__semantic": 0.0049}, None),
    ],
)
def test_thresholds(changed, kind):
    expected = set() if kind is None else {f"semantic {kind}"}
    assert findings(rows(**changed), SEMANTIC).keys() == expected


def test_faults_that_are_over_or_short_give_no_warning():
    wrong = {"accuracy__semantic_source": 1.0, "accuracy__semantic_target": 1.0}
    assert findings(rows(**wrong), SEMANTIC)
    assert not findings(rows(19, **wrong), SEMANTIC)
    assert not findings(rows(15, **wrong) + rows(5, first=15), SEMANTIC)
    # A wrong row among right ones.
    assert not findings([*rows(19), *rows(1, first=19, gradient__semantic=100.0)], SEMANTIC)
    # Rows without an accuracy, where the discriminator learns at some steps only, are no evidence of one.
    some = [row if row["step"] % 2 else {n: v for n, v in row.items() if "acc" not in n} for row in rows(**wrong)]
    assert not findings(some, SEMANTIC)


def test_the_sign_of_wasserstein_logits_is_not_judged():
    how = dataclasses.replace(SEMANTIC.semantic_alignment, objective="wasserstein")
    wrong = rows(accuracy__semantic_source=1.0, accuracy__semantic_target=1.0)
    assert not findings(wrong, dataclasses.replace(SEMANTIC, semantic_alignment=how))


def test_the_window_is_a_tenth_of_the_run_and_ten_rows_at_least():
    assert window(tiny(steps=800, log_every=20)) == 10
    assert window(tiny(steps=150_000, log_every=100)) == 150
    long = dataclasses.replace(SEMANTIC, steps=150)
    wrong = {"accuracy__semantic_source": 1.0, "accuracy__semantic_target": 1.0}
    assert not findings(rows(29, **wrong), long)
    assert findings(rows(30, **wrong), long)


def test_the_auxiliary_loss_is_judged_by_its_own_gradient_and_weight():
    network = NetworkSettings(name="deeplab-v2", auxiliary=True)
    settings = dataclasses.replace(SEMANTIC, network=network)
    how = dataclasses.replace(settings.global_alignment, weight=0.0, auxiliary_weight=0.25)
    settings = dataclasses.replace(settings, method="global", global_alignment=how)
    of_it = {"weight/auxiliary": 0.25, "gradient/auxiliary": 3.0, "gradient/auxiliary_segmentation": 1.0}
    found = findings([row | of_it | {"gradient/segmentation": 100.0} for row in rows()], settings)
    assert found.keys() == {"auxiliary dominates"}
    mentions(found["auxiliary dominates"], "auxiliary", "global_alignment.auxiliary_weight 0.25")


def test_rows_without_any_figure_are_no_fault():
    assert findings([{"step": step, "weight/semantic": 0.01} for step in range(20)], SEMANTIC) == {}


def test_figures_of_the_features():
    generator = torch.Generator().manual_seed(1)
    settings = dataclasses.replace(TINY, data=Data(classes=["a", "b", "c", "d"], size=(32, 32)))
    outputs, batch = {}, {}
    for domain in ("source", "labelled"):
        features = torch.randn(2, 5, 4, 4, generator=generator, requires_grad=True)
        outputs[domain] = Segmentation(features, features)
        label = torch.randint(0, 3, (2, 4, 4), generator=generator)
        label[0, 0, 0] = 255
        batch[domain] = {"label": label}
    # Class 2 is missing from the target, class 3 from both.
    batch["labelled"]["label"][batch["labelled"]["label"] == 2] = 1
    loss = (3 * outputs["labelled"].features).sum() + (4 * outputs["source"].features).sum()
    figures = feature_figures(outputs, batch, loss, settings)
    means = {
        domain: [outputs[domain].features.detach().movedim(1, -1)[batch[domain]["label"] == k].mean(0) for k in (0, 1)]
        for domain in outputs
    }
    middle = [(means["source"][k] + means["labelled"][k]) / 2 for k in (0, 1)]
    unit = (middle[0] - middle[1]).norm()
    apart = [float((means["source"][k] - means["labelled"][k]).norm() / unit) for k in (0, 1)]
    expected = {
        "gradient/segmentation": 5 * math.sqrt(2 * 5 * 4 * 4),
        "present/source": 0.75,
        "present/labelled": 0.5,
        "distance/mean": sum(apart) / 2,
        "class_distance/a": apart[0],
        "class_distance/b": apart[1],
    }
    assert figures == pytest.approx(expected, rel=1e-5)
    alone = {"source": batch["source"], "unlabelled": {"image": None}}
    figures = feature_figures({"source": outputs["source"]}, alone, loss, settings)
    assert figures.keys() == {"gradient/segmentation", "present/source"}


def test_figures_of_the_machine():
    figures = machine_figures(120, 60.0, torch.device("cpu"))
    assert figures["machine/images_per_second"] == 2
    # Fresh pages: an allocator may have as much left over from earlier tests.
    memory = np.frombuffer(mmap.mmap(-1, 2**28), np.uint8)
    memory[:] = 1
    more = machine_figures(120, 60.0, torch.device("cpu"))
    if "machine/memory_mib" in figures:
        assert more["machine/memory_mib"] - figures["machine/memory_mib"] == pytest.approx(memory.nbytes / 2**20, abs=8)


def test_a_row_in_one_line():
    row = rows(1)[0] | {"loss/segmentation": 1.234, "loss/semantic": 0.69}
    row |= {"distance/mean": 0.5, "machine/images_per_second": 80.2, "machine/memory_mib": 500.3}
    assert format_row(row) == "segmentation 1.23, semantic 0.69 acc 0.80/0.70 grad 5 %, apart 0.50"
    for gradient, words in ((3.2, "160 %"), (1.994, "100 %"), (0.001, "0.05 %"), (1e-7, "<0.01 %"), (0.0, "0 %")):
        row["gradient/semantic"] = row["gradient/segmentation"] * gradient / 2
        assert f"grad {words}, apart" in format_row(row)
    assert (
        format_row({"loss/segmentation": 1.234, "loss/self-training": 2.0}) == "segmentation 1.23, self-training 2.00"
    )


@pytest.mark.parametrize(("method", "names"), [("ass", ["global", "semantic"]), ("ass-plus", ["global", "semantic"])])
def test_the_bar_shows_what_matters_in_80_columns(method, names):
    """Rendered as in a terminal of 80 columns, of which tqdm uses 79."""
    row = {"loss/segmentation": 0.934, "loss/self-training": 0.41, "machine/images_per_second": 80.2}
    for name in [*names, "auxiliary"]:
        row |= {f"loss/{name}": 0.7, f"accuracy/{name}_source": 0.61, f"accuracy/{name}_target": 0.584}
    for done, total, seconds in ((120, 800, 36), (12000, 40000, 2000)):
        line = tqdm.format_meter(
            done, total, seconds, ncols=79, prefix=method, postfix=shorten_row(row), bar_format=train_module.BAR
        )
        assert len(line) <= 79
        mentions(line, f"{method} {done}/{total}", "left", "loss 0.93", *(f"{name} 61/58" for name in names))
    assert shorten_row({"loss/segmentation": 1.0}) == "loss 1.00"


def test_figures_of_an_alignment():
    reached = Segmentation(torch.zeros(1, 1, 1, 1, requires_grad=True), torch.zeros(()))
    figures = {name: torch.tensor(value) for name, value in (("source_accuracy", 0.75), ("target_accuracy", 0.5))}
    losses = semshift.AlignmentLosses(4 * reached.features.sum(), torch.tensor(0.25), figures)
    assert alignment_figures("semantic", losses, 0.5, reached) == {
        "loss/semantic": 0.0,
        "gradient/semantic": 2.0,
        "loss/semantic_discriminator": 0.25,
        "accuracy/semantic_source": 0.75,
        "accuracy/semantic_target": 0.5,
    }

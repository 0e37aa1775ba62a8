"""The command line: a run on folders, its evaluation, and one line for every bad command."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import semshift
from examples.workbench import __main__ as command_line
from examples.workbench.__main__ import main
from examples.workbench.options import PRESETS
from examples.workbench.settings import METHODS, Settings
from examples.workbench.spelling import setting_types
from examples.workbench.studies import command as study_module
from examples.workbench.training import checkpoints
from examples.workbench.training import train as train_module
from examples.workbench.training.train import train
from tests.errors import mentions
from tests.examples.workbench.tiny import checkpoint, equal, tiny

# The trainer's libraries give their own warnings.
pytestmark = pytest.mark.filterwarnings("default")


SCORED = ("validation", "test", "subsets")
TEST = "{images: test/images, labels: test/labels}"


@pytest.fixture
def folders(tmp_path):
    """A data root with four splits of small images, and a file of settings that names them."""
    rng = np.random.default_rng(0)
    for split in ("source", "target", "validation", "test"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(3):
            label = np.repeat(rng.integers(0, 3, (40, 1)), 48, axis=1).astype(np.uint8)
            image = (60 * label[..., None] + rng.integers(0, 40, (40, 48, 3))).astype(np.uint8)
            label[:3] = 255
            Image.fromarray(image).save(tmp_path / "data" / split / "images" / f"{i}.png")
            Image.fromarray(label).save(tmp_path / "data" / split / "labels" / f"{i}.png")
    names = ("source", "target", "validation", "test")
    data = {name: {"images": f"{name}/images", "labels": f"{name}/labels"} for name in names}
    data |= {"classes": ["a", "b", "c"], "size": [32, 32], "subsets": {"ends": ["a", "c"]}}
    settings = {"labelled": 2, "steps": 2, "data": data, "network": {"width": 8}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_folders_from_the_command_line(folders, capsys):
    out, config = folders / "run", str(folders / "settings.yaml")
    arguments = ["train", "--config", config, "--data-root", str(folders / "data"), "--out", str(out)]
    assert main([*arguments, "--save-predictions", "--method", "joint"]) == 0
    assert f"report: {out / 'report.png'}" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())

    # An independent count over the saved masks.
    shared, either = np.zeros(3), np.zeros(3)
    for file in (folders / "data" / "test" / "labels").iterdir():
        label, predicted = np.asarray(Image.open(file)), np.asarray(Image.open(out / "predictions" / file.name))
        assert label.shape == predicted.shape
        for k in range(3):
            a, b = (label == k), (predicted == k) & (label != 255)
            shared[k] += (a & b).sum()
            either[k] += (a | b).sum()
    iou = {name: shared[k] / either[k] if either[k] else None for k, name in enumerate("abc")}
    assert metrics["iou"] == pytest.approx(iou)
    assert metrics["miou"] == pytest.approx(np.mean([value for value in iou.values() if value is not None]))

    assert main(["evaluate", "--out", str(out), "--data-root", str(folders / "data"), "--subset", "ends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    mean = 50 * sum(iou[name] for name in "ac")
    assert lines[-1].split() == ["mean", "over", "ends", f"{mean:.1f}", "(over", "2", "of", "2", "classes)"]
    assert main(["evaluate", "--out", str(out), "--data-root", str(folders / "data"), "--subset", "all"]) == 2
    mentions(capsys.readouterr().err, "error", "--subset", ["ends"], "all")

    # A run from a different machine, with an accelerator that this machine lacks.
    absent = "mps" if torch.cuda.is_available() else "cuda"
    written = (out / "settings.yaml").read_text()
    assert "accelerator: cpu" in written
    (out / "settings.yaml").write_text(written.replace("accelerator: cpu", f"accelerator: {absent}"))
    again = ["evaluate", "--out", str(out), "--data-root", str(folders / "data")]
    assert main(again) == 2
    mentions(capsys.readouterr().err, "error", "--accelerator cpu", absent)
    assert main([*again, "--accelerator", "cpu"]) == 0
    assert f"{100 * metrics['miou']:.1f}" in capsys.readouterr().out


def test_few_images_of_ones_own(folders, capsys):
    """One mask for three target images, no validation and no test images, and a class that no label shows."""
    settings = yaml.safe_load((folders / "settings.yaml").read_text())
    data = settings["data"] | {"classes": ["a", "b", "c", "unicorn"]}
    (folders / "own.yaml").write_text(
        yaml.safe_dump({"steps": 2, "network": {"width": 8}, "data": {k: data[k] for k in data if k not in SCORED}})
    )
    for name in "02":
        (folders / f"data/target/labels/{name}.png").unlink()
    command = ["train", "--config", str(folders / "own.yaml"), "--data-root", str(folders / "data")]
    assert main([*command, "--check"]) == 0
    checked = capsys.readouterr().out
    out = folders / "run"
    assert main([*command, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "no scores" in captured.out
    assert (out / "labelled.txt").read_text() == "1\n"
    assert (out / "report.png").exists()
    assert json.loads((out / "metrics.json").read_text())["miou"] is None
    for split in ("source", "labelled"):
        assert f"{split} has no labelled pixel of" in checked
        assert f"data.{split}: no labelled pixel of" in captured.err
    kinds = [json.loads(line)["kind"] for line in (out / "warnings.jsonl").read_text().splitlines()]
    assert {"classes source", "classes labelled"} <= set(kinds)
    evaluate_it = ["evaluate", "--out", str(out), "--data-root", str(folders / "data")]
    assert main(evaluate_it) == 2
    mentions(capsys.readouterr().err, "data.test")
    # With test images, of which none shows the class either.
    (out / "settings.yaml").write_text((out / "settings.yaml").read_text().replace("  test: null", f"  test: {TEST}"))
    assert main(evaluate_it) == 0
    captured = capsys.readouterr()
    assert "no labelled pixel of" in captured.err
    assert "unicorn" in captured.err
    assert "of 4 classes)" in captured.out.splitlines()[-1]


def test_an_empty_mask_is_refused_and_leaves_no_folder(folders, capsys):
    for name in "01":
        (folders / f"data/target/labels/{name}.png").unlink()
    file = folders / "data/target/labels/2.png"
    Image.fromarray(np.full((40, 48), 255, np.uint8)).save(file)
    command = ["train", "--config", str(folders / "settings.yaml"), "--labelled", "1"]
    assert main([*command, "--data-root", str(folders / "data"), "--out", str(folders / "run")]) == 2
    mentions(capsys.readouterr().err.splitlines()[-1], "error", 2, "labelled pixels", "none")
    assert not (folders / "run").exists()


def test_double_precision_is_evaluated_as_it_was_trained(tmp_path, monkeypatch):
    seen = []
    evaluate = command_line.evaluate
    monkeypatch.setattr(
        command_line,
        "evaluate",
        lambda net, *a, **o: seen.append(next(net.parameters()).dtype) or evaluate(net, *a, **o),
    )
    train(tiny(steps=1, precision="64-true"), tmp_path / "run")
    assert main(["evaluate", "--out", str(tmp_path / "run")]) == 0
    assert seen == [torch.float64]


@pytest.mark.slow
def test_any_id_may_be_ignored(folders):
    """Of files, and where a crop leaves the image, which it does at a scale below 1."""
    arguments = ["train", "--config", str(folders / "settings.yaml"), "--data-root", str(folders / "data")]
    arguments += ["--data.augmentation.scale", "[0.6, 0.6]", "--optimiser.batch_size", "2"]
    assert main([*arguments, "--out", str(folders / "255")]) == 0
    for file in (folders / "data").glob("*/labels/*.png"):
        label = np.array(Image.open(file))
        label[label == 255] = 7
        Image.fromarray(label).save(file)
    assert main([*arguments, "--out", str(folders / "7"), "--data.ignore_index", "7"]) == 0
    assert equal(checkpoint(folders / "255")["stateful"], checkpoint(folders / "7")["stateful"])
    scores = [json.loads((folders / run / "metrics.json").read_text()) for run in ("255", "7")]
    assert scores[0]["iou"] == scores[1]["iou"]
    assert scores[0]["validation"] == scores[1]["validation"]


def test_a_truncated_image_ends_the_run_and_keeps_the_checkpoint(folders, capsys, monkeypatch):
    # At the start of a run more images are read where some class has not been seen.
    monkeypatch.setattr(train_module, "find_absent", lambda *which, **how: None)
    # The image that the sampler draws last.
    *_, last = semshift.MixedBatchSampler({"source": 3}, {"source": 1}, seed=0, steps=3)
    out, image = folders / "run", folders / "data" / "source" / "images" / f"{last[0]}.png"
    arguments = ["train", "--config", str(folders / "settings.yaml"), "--data-root", str(folders / "data")]
    arguments += ["--out", str(out), "--method", "source-only", "--steps", "3", "--save_every", "1"]
    arguments += ["--optimiser.batch_size", "1"]
    image.write_bytes(image.read_bytes()[:300])
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    mentions(error.split("\r")[-1], "error", image, "whole")
    assert checkpoint(out)["step"] == 2


@pytest.mark.slow
def test_a_checkpoint_of_other_classes_is_refused(folders, capsys):
    """By evaluation and by resuming, which both leave the file as it is."""
    out, root = folders / "run", ["--data-root", str(folders / "data")]
    train_it = ["train", "--config", str(folders / "settings.yaml"), *root, "--out", str(out), "--method", "joint"]
    assert main(train_it) == 0
    last = checkpoints.newest_checkpoint(out)
    state = torch.load(last, weights_only=True)
    weight = state["stateful"]["segmenter"]["classifier.weight"]
    state["stateful"]["segmenter"]["classifier.weight"] = torch.cat([weight, weight])
    capsys.readouterr()
    for contents, words in (
        (state, ("classifier.weight", [3, 8, 1, 1], [6, 8, 1, 1])),
        (state["stateful"]["segmenter"], ("checkpoint",)),
    ):
        torch.save(contents, last)
        before = last.read_bytes()
        for command in (["evaluate", "--out", str(out), *root], [*train_it, "--resume"]):
            assert main(command) == 2
            mentions(capsys.readouterr().err.splitlines()[-1], "error", last, *words)
        assert last.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], ("train", "evaluate", "study", "fly")),
        (["evalute"], ("evalute", "did you mean evaluate?")),
        (["train", "--preset", "none"], ("--preset", "none")),
        (["train", "--preset", "idd-camvd"], ("--preset", "idd-camvd", "did you mean idd-camvid?")),
        (["train", "--optimizer.lr", "1"], ("--optimizer.lr", "did you mean --optimiser.learning_rate?")),
        (["train", "--save_predictions"], ("--save_predictions", "did you mean --save-predictions?")),
        (["train", "--method=as"], ("method", "as", "did you mean ass?")),
        (["train", "--network", "{nam: small}"], ("network.nam", "did you mean network.name?")),
        (["train", "--steps", "many", "--data.subsets.ends", "[sky]"], ("steps", "many")),
        (["train", "--preset", "idd-camvid"], ("--data-root", "none")),
        (["train", "--steps", "many"], ("steps", "many")),
        (["train", "--network.width", "10"], ("network.width", 10)),
        (["train", "--data.scenes.severity.fog", "-1", "--check"], ("severity.fog", "[0, 1]", -1.0)),
        (["evaluate", "--out", "/none"], ("--run", "/none", "no such folder")),
        (["evaluate", "--split", "train", "--out", "/none"], ("--split", "'validation'", "train")),
        (["evaluate"], ("--out",)),
        (["evaluate", "--outt", "/none"], ("--outt", "did you mean --out?")),
    ],
)
def test_bad_command_lines(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    mentions(captured.err.strip(), *words)
    assert not list(tmp_path.iterdir())


def test_a_study_is_named_or_made_of_methods(monkeypatch, tmp_path, capsys):
    """Options of train may follow in any order; their values are not mistaken for names of studies."""
    asked = []
    monkeypatch.setattr(study_module, "run_study", lambda study, **how: asked.append((study, how)) or [])
    methods = ["study", "--steps", "10", "--methods", "joint", "ass", "--seeds", "3", "4", "--data.size", "[32,32]"]
    assert main([*methods, "--out", str(tmp_path), "--jobs", "1"]) == 2
    mentions(capsys.readouterr().err, "error", tmp_path / "methods" / "methods.json")
    study, how = asked[0]
    assert (list(study.rows), study.baseline, study.seeds) == (["joint", "ass"], "joint", [3, 4])
    assert (study.settings["ass"].steps, study.settings["ass"].data.size) == (10, (32, 32))
    assert (how["out"], how["jobs"], how["threads"]) == (tmp_path / "methods", 1, 1)
    main(["study", "scenes", "--records", str(tmp_path)])
    assert asked[1][0].title == "Built-in scenes, 4 labelled target images"
    assert asked[1][1]["records"] == tmp_path / "scenes.json"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--methods", "neither")),
        (["scenes", "--methods", "ass"], ("--methods", "scenes")),
        (["scenes", "--steps", "10"], ("--steps 10", "scenes")),
        (["scenes", "--seeds", "1"], ("--seeds", "scenes")),
        (["none.yaml"], ("none.yaml",)),
        (["scens"], ("scens", "did you mean scenes?")),
        (["--methods", "magic"], ("--methods", "magic")),
        (["--methods", "as-plus"], ("--methods", "as-plus", "did you mean ass-plus?")),
        (["--methods", "ass", "--seeds", "0", "0"], ("seeds", [0, 0])),
        (["--methods", "ass", "--jobs", "0"], ("--jobs", 0)),
        (["--methods", "ass", "--seed", "1"], ("--seed",)),
    ],
)
def test_bad_studies(arguments, words, capsys):
    assert main(["study", *arguments]) == 2
    mentions(capsys.readouterr().err.strip(), "error", *words)


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("study") == 2


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("optimizer: {lr: 1}", ("optimizer.lr", "did you mean optimiser.learning_rate?")),
        ("data: {test: {imges: a, labels: b}}", ("data.test.imges", "did you mean data.test.images?")),
        ("data: {test: {images: a, labels: b, layout: gta}}", ("data.test.layout", "gta", "did you mean gta5?")),
        ("stepz: 3", ("stepz", "did you mean steps?")),
        ("steps: many", ("steps", "many")),
        ("[", ()),
    ],
)
def test_bad_settings_files(written, words, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(written)
    assert main(["train", "--config", str(tmp_path / "mine.yaml")]) == 2
    mentions(capsys.readouterr().err.strip(), "error", tmp_path / "mine.yaml", *words)


def test_help_of_train_fits_a_screen_and_all_of_it_is_one_option_away(capsys):
    for arguments in (["--help"], ["-h", "--preset", "idd-camvid"]):
        with pytest.raises(SystemExit) as done:
            main(["train", *arguments])
        assert done.value.code == 0
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) <= 40
        assert max(map(len, printed.splitlines())) <= 80
        for part in dataclasses.fields(Settings):
            group = dataclasses.is_dataclass(getattr(Settings(), part.name))
            assert (f"  {part.name} " if group else f"--{part.name} ") in printed
        assert all(
            word in printed for word in ("--help-all", *METHODS, *(path.stem for path in PRESETS.glob("*.yaml")))
        )
    with pytest.raises(SystemExit) as done:
        main(["train", "--help-all"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in setting_types(Settings) if name.count(".") < 2)
    assert all(option in printed for option in ("--resume", "--save-predictions", "--check", "--init"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"semshift {semshift.__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("given", [True, False])
def test_a_command_leaves_half_of_the_cores(given, monkeypatch, tmp_path):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(command_line, "train", lambda *a, **o: seen.append(torch.get_num_threads()) or {})
    monkeypatch.setattr(command_line.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
    torch.set_num_threads(7)
    try:
        with pytest.raises(KeyError, match="iou"):
            main(["train", "--out", str(tmp_path)])
        assert seen == [7 if given else 4]
        assert torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(before)

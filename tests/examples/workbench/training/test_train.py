"""The trainer: methods, run folder, resuming, evaluation, bad input. Runs are tiny: a few steps at 32 x 32."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import semshift
from examples.workbench.training import checkpoints, run_folder as runs
from examples.workbench.training import step as step_module
from examples.workbench.training import train as train_module
from examples.workbench.__main__ import main
from examples.workbench.training.learners import weight_schedule
from examples.workbench.errors import InputError
from examples.workbench.data.images import open_images
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.networks.small import SmallSegmenter
from examples.workbench.settings import Data, METHODS, NetworkSettings, OptimiserSettings, SceneSettings, Settings
from examples.workbench.training.train import train
from examples.workbench.training.views import count_pixels, global_view, semantic_view
from tests.errors import mentions, refuses

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

SCENES = SceneSettings(source=6, target=6, validation=2, test=3)
TINY = Settings(
    steps=6,
    labelled=2,
    log_every=2,
    save_every=3,
    data=Data(size=(32, 32), scenes=SCENES),
    network=NetworkSettings(width=8),
    optimiser=OptimiserSettings(images=2, unlabelled=2),
)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def checkpoint(out):
    return torch.load(checkpoints.newest_checkpoint(out), weights_only=True)


def history(out):
    """The rows of a run's log, without what two runs of the same settings differ in."""
    return [{n: v for n, v in row.items() if not n.startswith("machine/")} for row in run_folder.read_history(out)]


def equal(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[] if method == "ass" else pytest.mark.slow) for method in METHODS]
)
def test_every_method_leaves_a_run_folder(method, tmp_path):
    out = tmp_path / "run"
    metrics = train(tiny(method=method), out, save_predictions=True)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    expected = {"method": method, "labelled": 2, "seed": 0, "steps": 6, "num_classes": 8, "resumed_from": []}
    assert {name: metrics[name] for name in expected} == expected
    values = [value for value in metrics["iou"].values() if value is not None]
    assert metrics["miou"] == pytest.approx(sum(values) / len(values))
    assert yaml.safe_load((out / "settings.yaml").read_text())["method"] == method
    assert len((out / "labelled.txt").read_text().split()) == (tiny().data.scenes.target if method == "oracle" else 2)
    assert (out / "report.png").stat().st_size > 10_000
    assert list((out / "tensorboard").glob("events*"))
    assert len(list((out / "predictions").glob("*.png"))) == 3
    discriminators = METHODS[method] & {"global", "semantic"}
    state = checkpoint(out)
    assert {name.split()[0] for name in state["stateful"] if "critic" in name} == discriminators
    assert state["step"] == 6
    last = run_folder.read_history(out)[-1]
    assert {name.split("/")[1] for name in last if name.startswith("weight/")} == discriminators | (
        METHODS[method] & {"self-training"}
    )
    for name in discriminators:
        assert last[f"weight/{name}"] > 0
        assert last[f"gradient/{name}"] > 0
        assert 0 <= last[f"accuracy/{name}_source"] <= 1


@pytest.mark.slow
def test_methods_share_their_start_and_discriminators_matter(tmp_path):
    weights = {}
    for method in ("joint", "global", "semantic", "ass"):
        train(tiny(method=method, steps=3), tmp_path / method)
        weights[method] = checkpoint(tmp_path / method)["stateful"]["segmenter"]
        before = torch.load(tmp_path / method / "checkpoints" / "before.pt", weights_only=True)
        if method == "joint":
            start = before["stateful"]["segmenter"]
            assert equal(start, dict(train_module.build_segmenter(TINY).state_dict()))
    methods = list(weights)
    assert not any(equal(weights[a], weights[b]) for i, a in enumerate(methods) for b in methods[:i])


@pytest.mark.slow
def test_same_seed_same_bits(tmp_path):
    for name in ("a", "b"):
        train(TINY, tmp_path / name)
    assert equal(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    train(tiny(seed=1), tmp_path / "c")
    assert not equal(checkpoint(tmp_path / "a")["stateful"], checkpoint(tmp_path / "c")["stateful"])


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    whole = train(TINY, tmp_path / "whole")

    append = run_folder.append_history

    def interrupted(out, row):
        append(out, row)
        if row["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "append_history", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "cut")
    monkeypatch.undo()
    assert checkpoint(tmp_path / "cut")["step"] == 3
    resumed = train(TINY, tmp_path / "cut", resume=True)
    assert resumed["resumed_from"] == [3]
    assert equal(checkpoint(tmp_path / "whole")["stateful"], checkpoint(tmp_path / "cut")["stateful"])
    assert equal(checkpoint(tmp_path / "whole")["pixels"], checkpoint(tmp_path / "cut")["pixels"])
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    assert (resumed["miou"], resumed["iou"]) == (whole["miou"], whole["iou"])


def test_resume_in_a_folder_without_a_checkpoint_starts_at_step_0(tmp_path):
    (tmp_path / "run").mkdir()
    assert train(tiny(steps=1), tmp_path / "run", resume=True)["resumed_from"] == []
    assert [row["step"] for row in run_folder.read_history(tmp_path / "run")] == [0]


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


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    entropy = step_module.supervised_loss

    def poisoned(logits, labels, settings):
        poisoned.calls += 1
        return entropy(logits, labels, settings) * (math.nan if poisoned.calls > 8 else 1.0)

    poisoned.calls = 0
    monkeypatch.setattr(step_module, "supervised_loss", poisoned)
    with refuses(InputError, "loss", "nan", "step 4", "learning rate"):
        train(TINY, tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 3


def test_a_class_that_the_source_never_showed_takes_no_part():
    features = torch.randn(1, 4, 8, 8)
    outputs = {domain: Segmentation(features, features) for domain in ("source", "labelled")}
    labels = {"source": torch.zeros(1, 8, 8, dtype=torch.long), "labelled": torch.zeros(1, 8, 8, dtype=torch.long)}
    labels["labelled"][:, 4:] = 5
    batch = {domain: {"label": label} for domain, label in labels.items()}
    pixels = {domain: count_pixels(label, 8) for domain, label in labels.items()}
    view = semantic_view(outputs, batch, pixels, TINY)
    assert view.target_weight.flatten().nonzero().flatten().tolist() == [0]
    batch["source"]["label"] = torch.full((1, 8, 8), 5)
    pixels["source"] += count_pixels(batch["source"]["label"], 8)
    view = semantic_view(outputs, batch, pixels, TINY)
    assert view.target_weight.flatten().nonzero().flatten().tolist() == [0, 5]
    assert view.source_weight.flatten().nonzero().flatten().tolist() == [5]


def test_pixels_are_counted_by_class():
    labels = torch.tensor([[[0, 2, 2, 255], [1, 2, 3, 3]]])
    assert count_pixels(labels, 4).tolist() == [1, 1, 3, 2]
    assert count_pixels(labels.clamp(max=4), 4).tolist() == [1, 1, 3, 2]
    assert count_pixels(torch.full((1, 2, 2), 255), 4).tolist() == [0, 0, 0, 0]


def test_a_balanced_map_does_not_tell_the_shares_of_the_classes():
    """Two domains whose probabilities are their class shares: the discriminator sees one and the same map."""
    pixels = {"source": torch.tensor([699, 199, 99]), "labelled": torch.tensor([99, 199, 699])}
    logits = {name: ((counts + 1) / 1000).log()[None, :, None, None] for name, counts in pixels.items()}
    size = dataclasses.replace(TINY.data, classes=["a", "b", "c"])
    outputs = {"source": logits["source"].expand(1, 3, 4, 4), "unlabelled": logits["labelled"].expand(1, 3, 4, 4)}
    outputs = {name: Segmentation(tensor, tensor) for name, tensor in outputs.items()}
    for inputs, alike in (("probabilities", False), ("balanced", True)):
        how = dataclasses.replace(TINY.global_alignment, inputs=inputs)
        settings = dataclasses.replace(TINY, data=size, global_alignment=how)
        view = global_view(outputs, pixels, settings)
        assert view.source.shape == view.target.shape == (1, 3, 32, 32)
        assert torch.allclose(view.source, view.target) == alike
        assert torch.allclose(view.target.sum(1), torch.ones(1, 32, 32))


def test_weights_wait_then_rise():
    schedule = weight_schedule(dataclasses.replace(TINY.semantic_alignment, weight=0.5, start=0.2, ramp=0.3), 100)
    assert [schedule(step) for step in (0, 19, 20)] == [0, 0, 0]
    assert 0 < schedule(21) < schedule(40) < 0.5
    assert schedule(99) == pytest.approx(0.5, rel=1e-3)
    at_once = weight_schedule(dataclasses.replace(TINY.semantic_alignment, weight=0.5, start=0, ramp=0), 100)
    assert at_once(0) == 0.5


@pytest.mark.parametrize("conditioning", ["none", "per-class", "class-and-domain"])
@pytest.mark.parametrize("per_image", [True, False])
def test_semantic_variants_train(conditioning, per_image, tmp_path):
    how = dataclasses.replace(
        TINY.semantic_alignment, conditioning=conditioning, per_image=per_image, spectral_norm=per_image
    )
    train(tiny(method="semantic", steps=2, semantic_alignment=how), tmp_path / "run")


def test_global_variants_train(tmp_path):
    how = dataclasses.replace(TINY.global_alignment, inputs="entropy", r1=1.0, every=2, objective="hinge")
    train(tiny(method="global", steps=2, precision="bf16-mixed", global_alignment=how), tmp_path / "run")


def test_r1_on_prototypes(tmp_path):
    how = dataclasses.replace(TINY.semantic_alignment, r1=1.0)
    train(tiny(method="semantic", steps=2, semantic_alignment=how), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labelled": 0}, ("labelled", 1, 0)),
        ({"labelled": 7}, ("labelled", 6, 7)),
        ({"steps": -1}, ("steps", 1, -1)),
        ({"seed": -1}, ("seed", -1)),
        ({"data": Data(size=(16, 32))}, ("data.size", 32, [16, 32])),
        ({"data": Data(ignore_index=3)}, ("data.ignore_index", 8, 255, 3)),
        ({"data": Data(subsets={"some": ["tram"]})}, ("data.subsets.some", "data.classes", ["tram"])),
        ({"network": NetworkSettings(width=10)}, ("network.width", 8, 10)),
        pytest.param(
            {"accelerator": "cuda"},
            ("accelerator", "--accelerator cpu", "cuda"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
        ({"accelerator": "abacus"}, ("accelerator", "auto, cpu, cuda, mps", "abacus")),
    ],
)
def test_bad_settings(changes, words, tmp_path):
    with refuses(InputError, *words):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("weight", math.nan), ("start", 1.5), ("learning_rate", 0.0), ("every", 0)]
)
def test_bad_settings_of_a_discriminator(name, value):
    with refuses(InputError, f"semantic_alignment.{name}", value):
        check(tiny(semantic_alignment=dataclasses.replace(TINY.semantic_alignment, **{name: value})))


def test_network_shapes_and_errors():
    segmenter = SmallSegmenter(5, width=8)
    features, logits, _ = segmenter(torch.rand(2, 3, 32, 64))
    assert features.shape == (2, 32, 4, 8)
    assert logits.shape == (2, 5, 16, 32)
    assert SmallSegmenter(5, width=8, feature_layer="decoder")(torch.rand(1, 3, 32, 32)).features.shape == (
        1,
        8,
        16,
        16,
    )
    with refuses(ValueError, "num_classes", 2, 1):
        SmallSegmenter(1)
    with refuses(ValueError, "feature_layer", "'encoder'", "'decoder'", "'neck'"):
        SmallSegmenter(2, feature_layer="neck")


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
    assert lines[-1].split() == ["mean", "over", "ends", f"{mean:.1f}"]
    assert main(["evaluate", "--out", str(out), "--data-root", str(folders / "data"), "--subset", "all"]) == 2
    mentions(capsys.readouterr().err, "error", "--subset", ["ends"], "all")

    # A run of another machine, whose accelerator this one has not.
    absent = "mps" if torch.cuda.is_available() else "cuda"
    written = (out / "settings.yaml").read_text()
    assert "accelerator: cpu" in written
    (out / "settings.yaml").write_text(written.replace("accelerator: cpu", f"accelerator: {absent}"))
    again = ["evaluate", "--out", str(out), "--data-root", str(folders / "data")]
    assert main(again) == 2
    mentions(capsys.readouterr().err, "error", "--accelerator cpu", absent)
    assert main([*again, "--accelerator", "cpu"]) == 0
    assert f"{100 * metrics['miou']:.1f}" in capsys.readouterr().out


def test_double_precision_is_evaluated_as_it_was_trained(tmp_path, monkeypatch):
    seen = []
    evaluate = main_module.evaluate
    monkeypatch.setattr(
        main_module,
        "evaluate",
        lambda net, *a, **o: seen.append(next(net.parameters()).dtype) or evaluate(net, *a, **o),
    )
    train(dataclasses.replace(TINY, steps=1, precision="64-true"), tmp_path / "run")
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


def test_an_image_cut_short_ends_the_run_and_keeps_the_checkpoint(folders, capsys):
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
def test_a_checkpoint_of_other_classes_is_told_in_a_line(folders, capsys):
    """By evaluation and by resuming, neither of which loses anything."""
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
        checkpoints._save(last, contents)
        before = last.read_bytes()
        for command in (["evaluate", "--out", str(out), *root], [*train_it, "--resume"]):
            assert main(command) == 2
            mentions(capsys.readouterr().err.splitlines()[-1], "error", last, *words)
        assert last.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], ("train, demo, evaluate, compare, study", "fly")),
        (
            ["train", "--preset", "none"],
            ("--preset", "airsim-camvid, gta5-cityscapes, idd-camvid, synthia-cityscapes", "none"),
        ),
        (["train", "--config", "/none.yaml"], ("--config", "/none.yaml")),
        (["train", "--preset", "idd-camvid", "--config", "x"], ("--preset", "--config", "idd-camvid", "x")),
        (["train", "--preset", "idd-camvid"], ("--data-root", "none")),
        (["train", "--method", "magic"], ("method", "'oracle'", "magic")),
        (["train", "--steps", "many"], ("steps", "many")),
        (["train", "--speed", "9"], ("--speed 9",)),
        (["train", "--seed", "-1"], ("seed", -1)),
        (["train", "--data.size", "[8,8]"], ("data.size", 32, [8, 8])),
        (["train", "--data.scenes.test", "0"], ("data.scenes.test", 1, 0)),
        (["train", "--data.scenes.severity.light", "2"], ("severity.light", "[0, 1]", 2.0)),
        (["train", "--data.scenes.severity.fog", "-1", "--check"], ("severity.fog", "[0, 1]", -1.0)),
        (["demo", "--data.scenes.severity.noise", "1.5"], ("severity.noise", "[0, 1]", 1.5)),
        (["compare", "--data.scenes.severity.light", "2"], ("severity.light", "[0, 1]", 2.0)),
        (["train", "--data.augmentation.flip", "2"], ("augmentation.flip", "[0, 1]", 2.0)),
        (["evaluate", "--out", "/none"], ("--out", "/none", "settings.yaml")),
        (["compare", "--seed", "1"], ("compare", "seed")),
        (["compare", "--method=ass"], ("compare", "method")),
        (["compare", "--check"], ("--check", "train", "compare")),
        (["demo", "--check"], ("--check", "train", "demo")),
        (["demo", "--save-predictions"], ("--save-predictions", "train", "demo")),
        (["demo", "--method", "source-only"], ("demo", "method", "source-only")),
    ],
)
def test_bad_command_lines(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    mentions(captured.err, *words)
    assert not list(tmp_path.iterdir())


def test_scenes_out_of_range_are_an_input_error():
    """Also where `check` has let them pass: the scenes themselves know no InputError."""
    wrong = dataclasses.replace(TINY.data, scenes=dataclasses.replace(SCENES, test=0))
    with refuses(InputError, "scenes", 1, 0):
        open_images(tiny(data=wrong), None)


def test_options_come_over_the_preset(tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    config.write_text("steps: 5\nstepz: 3\n")
    assert main(["train", "--config", str(config)]) == 2
    assert "Option 'stepz' is not accepted" in capsys.readouterr().err
    config.write_text(
        f"steps: 5\nlabelled: 2\ndata: {{size: [32, 32], scenes: {json.dumps(vars(SCENES) | {'severity': {}})}}}\n"
    )
    out = tmp_path / "run"
    assert main(["train", "--steps", "1", "--config", str(config), "--method", "labelled-only", "--out", str(out)]) == 0
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert (settings["steps"], settings["labelled"], settings["data"]["size"]) == (1, 2, [32, 32])


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    data = {"size": [32, 32], "scenes": {"source": 4, "target": 4, "validation": 2, "test": 2}}
    config.write_text(yaml.safe_dump({"steps": 2, "labelled": 2, "data": data}))
    assert main(["demo", "--config", str(config), "--out", str(tmp_path / "demo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["mIoU source-only:", "mIoU ass:", "report:"]
    assert (tmp_path / "demo" / "report.png").stat().st_size > 10_000

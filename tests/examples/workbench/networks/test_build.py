"""The segmenter of a run: its settings, its first weights, and runs of the trained networks."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml

from examples.workbench.__main__ import main
from examples.workbench.networks.build import build_segmenter, load_init
from examples.workbench.networks.deeplab import DeepLabV2
from examples.workbench.networks.small import SmallSegmenter
from examples.workbench.plain import as_plain
from examples.workbench.settings import NetworkSettings
from examples.workbench.training import checkpoints
from examples.workbench.training import train as train_module
from tests.errors import mentions
from tests.examples.workbench.tiny import checkpoint, equal, history, tiny

# Transformers and other libraries warn of things that we cannot change.
pytestmark = pytest.mark.filterwarnings("default")

SMALL_SEGFORMER = {
    "model_type": "segformer",
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    # High, so that a resumed run with other random numbers is noticed.
    "hidden_dropout_prob": 0.3,
    "drop_path_rate": 0.3,
}


DEEPLAB = NetworkSettings(name="deeplab-v2", depth=50)


def settings(network, **changes):
    sgd = {"name": "sgd", "learning_rate": 1e-3, "classifier_factor": 10.0, "batch_size": 1, "unlabelled_batch_size": 1}
    return tiny(**({"steps": 2, "save_every": 1, "network": network, "optimiser": sgd} | changes))


@pytest.mark.parametrize(("layer", "channels", "stride"), [("encoder", 32, 8), ("decoder", 8, 2)])
def test_the_small_segmenter(layer, channels, stride):
    segmenter = SmallSegmenter(5, width=8, feature_layer=layer)
    features, logits, auxiliary = segmenter(torch.rand(2, 3, 32, 64))
    assert features.shape == (2, segmenter.feature_channels, 32 // stride, 64 // stride)
    assert segmenter.feature_channels == channels
    assert logits.shape == (2, 5, 16, 32)
    assert auxiliary is None


@pytest.mark.parametrize(
    ("network", "classifier"),
    [
        (NetworkSettings(width=8), {"classifier"}),
        (dataclasses.replace(DEEPLAB, auxiliary=True), {"layer5", "layer6"}),
        (NetworkSettings(name="segformer"), {"classifier"}),
    ],
    ids=["small", "deeplab", "segformer"],
)
def test_first_weights_and_the_classifier(network, classifier):
    first, again = (build_segmenter(settings(network)) for _ in range(2))
    other = build_segmenter(settings(network, seed=1)).state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    names = {id(parameter): name for name, parameter in first.named_parameters()}
    last = [names[id(parameter)] for parameter in first.classifier_parameters()]
    assert {name.split(".")[0] for name in last} == classifier
    assert len(last) == sum(name.split(".")[0] in classifier for name in names.values())
    assert not torch.equal(first.state_dict()[last[0]], other[last[0]])
    assert load_init(settings(network), first) is None


@pytest.fixture
def init(tmp_path):
    """Weights of a ResNet whose values stay in range, and whose statistics differ from untrained ones."""
    state = {n: t for n, t in DeepLabV2(2, depth=50).state_dict().items() if not n.startswith("layer5")}
    state = {name: tensor * 0.1 if name.endswith("bn3.weight") else tensor for name, tensor in state.items()}
    state["bn1.running_mean"] += 0.25
    torch.save(state, tmp_path / "resnet50.pth")
    return tmp_path / "resnet50.pth"


@pytest.mark.slow
def test_from_the_command_line_with_weights(init, tmp_path, capsys):
    """Two steps from a file of weights, and an evaluation without the file; frozen tensors equal the file's."""
    state, out, config = torch.load(init, weights_only=True), tmp_path / "run", tmp_path / "settings.yaml"
    plain = as_plain(settings(DEEPLAB, method="joint"))
    plain["network"] |= {"frozen_batch_norm": True, "origin": "caffe"}
    config.write_text(yaml.safe_dump(plain))
    arguments = ["train", "--config", str(config), "--out", str(out)]
    assert main(arguments) == 2
    mentions(capsys.readouterr().err.splitlines()[-1], "error", "network.init", "network.frozen_batch_norm", "none")
    assert main([*arguments, "--init", str(init)]) == 0
    report = capsys.readouterr().err
    mentions(next(line for line in report.splitlines() if str(init) in line), 318, "caffe", "BGR", "1x1")
    weights = checkpoint(out)["stateful"]["segmenter"]
    norms = [name for name in state if "bn" in name or "downsample.1" in name]
    assert all(torch.equal(weights[name], state[name]) for name in norms)
    assert not torch.equal(weights["conv1.weight"], state["conv1.weight"])
    init.unlink()
    assert main(["evaluate", "--out", str(out)]) == 0
    assert "mean over all classes" in capsys.readouterr().out
    shutil.rmtree(out)
    assert main([*arguments, "--init", str(init)]) == 2
    mentions(capsys.readouterr().err.splitlines()[-1], "error", "network.init", init)
    assert not out.exists()


@pytest.mark.slow
def test_the_second_level_has_losses_of_its_own(tmp_path):
    network = dataclasses.replace(DEEPLAB, auxiliary=True)
    rows = {}
    for weight in (0.5, 0.0):
        run = settings(network, steps=1)
        how = dataclasses.replace(run.global_alignment, start=0.0, ramp=0.0, auxiliary_weight=weight)
        optimiser = dataclasses.replace(run.optimiser, auxiliary_weight=weight)
        out = tmp_path / str(weight)
        train_module.train(dataclasses.replace(run, global_alignment=how, optimiser=optimiser), out)
        (rows[weight],) = history(out)
        names = {"global", "auxiliary", "semantic"} if weight else {"global", "semantic"}
        assert {name.split("/")[1] for name in rows[weight] if name.startswith("weight/")} == names
        assert {name.split()[0] for name in checkpoint(out)["stateful"] if name.endswith("alignment")} == names
    assert rows[0.5]["weight/auxiliary"] == 0.5
    assert rows[0.5]["gradient/auxiliary"] > 0
    assert rows[0.5]["loss/auxiliary"] != rows[0.5]["loss/global"]
    # The cross-entropy of the auxiliary classifier is added.
    assert rows[0.5]["loss/segmentation"] > rows[0.0]["loss/segmentation"]


def test_networks_are_evaluated_with_their_running_statistics(tmp_path, monkeypatch):
    training, evaluate = [], train_module.evaluate

    def evaluated(segmenter, *arguments, **options):
        training.append(segmenter.training)
        return evaluate(segmenter, *arguments, **options)

    def drawn(*arguments, before, after, **options):
        training.extend(segmenter.training for _, segmenter in (before, after))

    monkeypatch.setattr(train_module, "evaluate", evaluated)
    monkeypatch.setattr(train_module, "draw_report", drawn)
    train_module.train(settings(NetworkSettings(width=8), steps=1, method="source-only"), tmp_path / "run")
    assert training == [False] * 4


@pytest.mark.parametrize("name", ["deeplab-v2", "segformer"])
@pytest.mark.slow
def test_resumed_equals_uninterrupted(name, init, tmp_path, monkeypatch):
    """With running statistics, both groups of the optimiser, and dropout whose draws are a function of the step."""
    network = dataclasses.replace(DEEPLAB, init=str(init))
    if name == "segformer":
        (tmp_path / "config.json").write_text(json.dumps(SMALL_SEGFORMER))
        network = NetworkSettings(name="segformer", config=str(tmp_path / "config.json"))
    run = settings(network)
    train_module.train(run, tmp_path / "whole")
    save = checkpoints.save_checkpoint

    def interrupt(*arguments, **options):
        save(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_module.train(run, tmp_path / "cut")
    monkeypatch.undo()
    # Neither the file of weights nor the state of the generator matters any more.
    init.unlink()
    torch.rand(7)
    assert train_module.train(run, tmp_path / "cut", resume=True)["resumed_from"] == [1]
    whole, cut = (checkpoint(tmp_path / name)["stateful"] for name in ("whole", "cut"))
    assert equal(whole, cut)

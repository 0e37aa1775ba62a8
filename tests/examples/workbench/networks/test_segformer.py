"""SegFormer: shapes, loading from a local folder, and runs of the trainer. Nothing is downloaded."""

import dataclasses
import json
import sys

import pytest
import torch

from examples.workbench.__main__ import main
from examples.workbench.data.samples import image_tensor
from examples.workbench.errors import InputError
from examples.workbench.networks.build import build_segmenter, load_init
from examples.workbench.networks.segformer import SegFormer, load_segformer
from examples.workbench.settings import Data, NetworkSettings, OptimiserSettings, SceneSettings, Settings
from examples.workbench.training import checkpoints
from examples.workbench.training.train import train
from tests.errors import mentions, refuses

transformers = pytest.importorskip("transformers")

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

SMALL = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    # High, so that a run that draws other numbers shows.
    "hidden_dropout_prob": 0.3,
    "drop_path_rate": 0.3,
}


def published(folder, labels=5, kind="SegformerForSemanticSegmentation", **changes):
    """A folder as `save_pretrained` leaves it."""
    torch.manual_seed(1)
    config = transformers.SegformerConfig(num_labels=labels, **(SMALL | changes))
    network = getattr(transformers, kind)(config)
    network.save_pretrained(folder)
    return network


def tiny(folder, **changes):
    settings = Settings(
        method="ass",
        steps=4,
        labelled=2,
        log_every=1,
        save_every=2,
        data=Data(size=(32, 64), scenes=SceneSettings(source=4, target=4, validation=2, test=2)),
        network=NetworkSettings(name="segformer", init=str(folder)),
        optimiser=OptimiserSettings(learning_rate=1e-3, images=2, unlabelled=2),
    )
    return dataclasses.replace(settings, **changes)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "segformer"
    published(folder)
    return folder


@pytest.mark.parametrize(("layer", "channels", "stride"), [("encoder", 32, 32), ("decoder", 16, 4)])
def test_shapes(folder, layer, channels, stride):
    model = SegFormer(7, config=folder, feature_layer=layer)
    output = model(torch.zeros(2, 3, 64, 96))
    assert output.features.shape == (2, channels, 64 // stride, 96 // stride)
    assert output.logits.shape == (2, 7, 16, 24)
    assert model.feature_channels == channels
    (weight, bias) = model.classifier_parameters()
    assert weight.shape == (7, 16, 1, 1)
    assert bias.shape == (7,)


def test_the_default_is_the_smallest_of_the_paper():
    with torch.device("meta"):
        model = SegFormer(150)
    # Table 1 of the paper has 3.8 million parameters, for the 150 classes of ADE20K.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 3.8


def test_it_computes_what_transformers_computes(folder):
    """From an image to logits, with the normalisation that the published weights want."""
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    model = SegFormer(5, config=folder).eval()
    loaded = load_segformer(model, folder)
    assert loaded.missing == loaded.left_over == ()
    image = torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = network(((image / 255 - mean) / deviation).permute(2, 0, 1)[None]).logits
    assert torch.allclose(model(image_tensor(image.numpy())[None]).logits, expected, atol=1e-5)


def test_other_classes_leave_the_classifier_as_it_was(folder):
    model = SegFormer(7, config=folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load_segformer(model, folder)
    assert loaded.missing == ("classifier.weight", "classifier.bias")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in loaded.missing)
    assert not torch.equal(before["decoder.linear_fuse.weight"], after["decoder.linear_fuse.weight"])
    assert "missing: classifier.weight, classifier.bias" in str(loaded)


def test_the_classifier_can_be_left_out(folder):
    model = SegFormer(5, config=folder)
    assert load_segformer(model, folder, classifier=False).missing == ("classifier.weight", "classifier.bias")


def test_an_encoder_alone_will_do(tmp_path):
    network = published(tmp_path / "imagenet", kind="SegformerForImageClassification")
    model = SegFormer(7, config=tmp_path / "imagenet")
    loaded = load_segformer(model, tmp_path / "imagenet")
    assert all(name.startswith(("decoder.", "classifier.")) for name in loaded.missing)
    assert set(loaded.left_over) == {"classifier.weight", "classifier.bias"}
    own = model.encoder.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.segformer.state_dict().items())


def test_first_weights_are_a_function_of_the_seed(folder):
    first, again = (build_segmenter(tiny(folder)).state_dict() for _ in range(2))
    other = build_segmenter(tiny(folder, seed=1)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    model = build_segmenter(tiny(folder))
    assert load_init(tiny(folder), model).missing == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.state_dict()["classifier.weight"], first["classifier.weight"])


def damage_encoder(folder):
    state = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).state_dict()
    name = next(name for name in state if name.startswith("segformer.") and name.endswith("proj.weight"))
    (folder / "model.safetensors").unlink()
    torch.save({n: t for n, t in state.items() if n != name}, folder / "pytorch_model.bin")


def other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_sizes": [8, 16, 24, 48]}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_encoder, ("{folder}", "encoder", "segformer.")),
        (other_sizes, ("{folder}", "encoder", "segformer.")),
        (lambda f: (f / "model.safetensors").unlink(), ("{folder}", "weights")),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), ("{folder}", "weights")),
        (lambda f: (f / "config.json").unlink(), ("network.config", "network.init", "{folder}/config.json")),
        (lambda f: (f / "config.json").write_text("{"), ("{folder}/config.json", "configuration")),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "beit"}'),
            ("{folder}/config.json", "segformer", "beit"),
        ),
    ],
)
def test_folders_that_are_unfit(folder, tmp_path, capsys, damage, words):
    damage(folder)
    options = ["--network.name", "segformer", "--steps", "1", "--out", str(tmp_path / "run"), "--init", str(folder)]
    assert main(["train", *options]) == 2
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    mentions(error, *(word.replace("{folder}", str(folder)) for word in words))
    assert not (tmp_path / "run").exists()


def test_a_refused_folder_changes_nothing(folder, tmp_path):
    model = SegFormer(5, config=folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage_encoder(folder)
    with pytest.raises(InputError):
        load_segformer(model, folder)
    with refuses(InputError, "network.init", tmp_path / "none"):
        load_segformer(model, tmp_path / "none")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_another_configuration_are_refused(folder, tmp_path):
    published(tmp_path / "wide", decoder_hidden_size=24)
    with refuses(InputError, tmp_path / "wide", "configuration", "decoder"):
        load_segformer(SegFormer(5, config=folder), tmp_path / "wide")


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refuses(InputError, "pip install transformers"):
        SegFormer(5)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            NetworkSettings(name="segformer", frozen_batch_norm=True),
            ("network.frozen_batch_norm", "deeplab-v2", "segformer"),
        ),
        (NetworkSettings(name="segformer", auxiliary=True), ("network.auxiliary", "deeplab-v2", "segformer")),
        (NetworkSettings(name="small", init="x"), ("network.init", "deeplab-v2", "segformer", "x", "small")),
        (NetworkSettings(config="x"), ("network.config", "segformer", "network.init", "x", "small", "none")),
        (NetworkSettings(name="segformer", config="x", init="y"), ("network.config", "network.init", "x", "y")),
    ],
)
def test_bad_settings(network, words):
    with refuses(InputError, *words):
        check(dataclasses.replace(tiny("none"), network=network))


@pytest.mark.slow
def test_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch, capsys):
    """With dropout, whose draws are a function of the step."""
    settings = tiny(folder)
    train(settings, tmp_path / "whole")
    assert "tensors loaded as segformer weights (RGB)" in capsys.readouterr().err
    save = checkpoints.save_checkpoint

    def stop(*arguments, **options):
        save(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut")
    monkeypatch.undo()
    torch.rand(7)
    train(settings, tmp_path / "cut", resume=True)
    whole, cut = (
        torch.load(checkpoints.newest_checkpoint(tmp_path / run), weights_only=True)["stateful"]
        for run in ("whole", "cut")
    )
    assert all(torch.equal(whole["segmenter"][name], cut["segmenter"][name]) for name in whole["segmenter"])
    assert main(["evaluate", "--out", str(tmp_path / "cut")]) == 0

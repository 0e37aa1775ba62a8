"""SegFormer: shapes, and loading from a local folder. Nothing is downloaded."""

import json
import shutil
import sys

import pytest
import torch

from examples.workbench.data.samples import image_tensor
from examples.workbench.errors import InputError
from examples.workbench.networks.segformer import SegFormer, load_segformer
from tests.errors import mentions, refuses

transformers = pytest.importorskip("transformers")

# Transformers warns of things that we cannot change.
pytestmark = pytest.mark.filterwarnings("default")

SMALL = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}


def published(folder, labels=5, kind="SegformerForSemanticSegmentation", **changes):
    """A folder as `save_pretrained` leaves it."""
    torch.manual_seed(1)
    config = transformers.SegformerConfig(num_labels=labels, **(SMALL | changes))
    network = getattr(transformers, kind)(config)
    network.save_pretrained(folder)
    return network


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


@pytest.mark.parametrize(("classes", "classifier"), [(7, True), (5, False)])
def test_the_classifier_can_be_left_out(folder, classes, classifier):
    model = SegFormer(classes, config=folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load_segformer(model, folder, classifier=classifier)
    assert loaded.missing == ("classifier.weight", "classifier.bias")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert "decoder.linear_fuse.weight" in changed
    assert not changed & set(loaded.missing)


def test_an_encoder_alone_will_do(tmp_path):
    network = published(tmp_path / "imagenet", kind="SegformerForImageClassification")
    model = SegFormer(7, config=tmp_path / "imagenet")
    loaded = load_segformer(model, tmp_path / "imagenet")
    assert all(name.startswith(("decoder.", "classifier.")) for name in loaded.missing)
    assert set(loaded.left_over) == {"classifier.weight", "classifier.bias"}
    own = model.encoder.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in network.segformer.state_dict().items())


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
        (lambda f: published(f, decoder_hidden_size=24), ("{folder}", "configuration", "decoder")),
        (shutil.rmtree, ("network.init", "{folder}")),
    ],
)
def test_unfit_folders_are_refused_and_change_nothing(folder, damage, words):
    model = SegFormer(5, config=folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_segformer(model, folder)
    # Transformers' own words may take several lines.
    mentions(" ".join(str(caught.value).split()), *(word.format(folder=folder) for word in words))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refuses(InputError, "pip install transformers"):
        SegFormer(5)

"""What the discriminators look at: whose output maps against whose, and how wide the one over prototypes is."""

import dataclasses

import pytest
import torch

import semshift
from examples.workbench.training import checkpoints, run_folder as runs
from examples.workbench.__main__ import main
from examples.workbench.networks.build import build_segmenter
from examples.workbench.training.learners import build_discriminator
from examples.workbench.errors import InputError
from examples.workbench.settings import Folder
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.settings import Data, NetworkSettings, OptimiserSettings, SceneSettings, Settings
from examples.workbench.training.train import train
from examples.workbench.training.views import global_view, semantic_view
from tests.errors import mentions, refuses

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

TINY = Settings(
    method="global",
    steps=3,
    labelled=2,
    log_every=1,
    save_every=3,
    data=Data(size=(32, 32), scenes=SceneSettings(source=4, target=4, validation=1, test=1)),
    network=NetworkSettings(width=8),
    optimiser=OptimiserSettings(images=2, unlabelled=3),
)


def with_discriminator(settings=TINY, *, semantic=False, **changes):
    name = "semantic_alignment" if semantic else "global_alignment"
    return dataclasses.replace(settings, **{name: dataclasses.replace(getattr(settings, name), **changes)})


def outputs_and_pixels():
    generator = torch.Generator().manual_seed(0)
    images = {"source": 2, "labelled": 2, "unlabelled": 3}
    outputs = {}
    for domain, count in images.items():
        logits, auxiliary = (torch.randn(count, 8, 16, 16, generator=generator) for _ in range(2))
        outputs[domain] = Segmentation(logits, logits, auxiliary)
    pixels = {domain: torch.randint(1, 100, (8,), generator=generator) for domain in ("source", "labelled")}
    return outputs, pixels


def probabilities(logits):
    return torch.nn.functional.interpolate(logits, size=(32, 32), mode="bilinear").softmax(1)


@pytest.mark.parametrize(
    ("against", "domains"), [("source", ["source"]), ("labelled", ["labelled"]), ("both", ["source", "labelled"])]
)
def test_whose_outputs_the_unlabelled_are_to_be_taken_for(against, domains):
    outputs, pixels = outputs_and_pixels()
    view = global_view(outputs, pixels, with_discriminator(against=against))
    assert torch.equal(view.source, torch.cat([probabilities(outputs[domain].logits) for domain in domains]))
    assert torch.equal(view.target, probabilities(outputs["unlabelled"].logits))
    second = global_view(outputs, pixels, with_discriminator(against=against), auxiliary=True)
    assert torch.equal(second.source, torch.cat([probabilities(outputs[domain].auxiliary) for domain in domains]))
    assert torch.equal(second.target, probabilities(outputs["unlabelled"].auxiliary))


def test_balanced_maps_are_divided_by_the_shares_of_their_own_domain():
    outputs, pixels = outputs_and_pixels()
    view = global_view(outputs, pixels, with_discriminator(against="both", inputs="balanced"))
    expected = []
    for domain, counted in (("source", "source"), ("labelled", "labelled"), ("unlabelled", "labelled")):
        share = (pixels[counted] + 1) / (pixels[counted] + 1).sum()
        weighed = probabilities(outputs[domain].logits) / share[:, None, None]
        expected.append(weighed / weighed.sum(1, keepdim=True))
    torch.testing.assert_close(view.source, torch.cat(expected[:2]))
    torch.testing.assert_close(view.target, expected[2])


def test_the_segmenter_is_confused_on_the_unlabelled_alone():
    """The labelled images are what to be taken for: no gradient of the confusion reaches them."""
    outputs, pixels = outputs_and_pixels()
    for output in outputs.values():
        output.logits.requires_grad_()
    settings = with_discriminator(against="both")
    view = global_view(outputs, pixels, settings)
    discriminator = build_discriminator("global", settings, build_segmenter(settings))
    semshift.confusion_loss(discriminator(view.target)).backward()
    assert outputs["unlabelled"].logits.grad.abs().sum() > 0
    assert outputs["source"].logits.grad is None
    assert outputs["labelled"].logits.grad is None


@pytest.mark.slow
def test_against_matters_in_training(tmp_path):
    weights = {}
    for against in ("source", "labelled", "both"):
        train(with_discriminator(start=0.0, ramp=0.0, against=against), tmp_path / against)
        weights[against] = checkpoints.load_weights(checkpoints.newest_checkpoint(tmp_path / against))["classifier.weight"]
        assert run_folder.read_history(tmp_path / against)[-1]["gradient/global"] > 0
    assert len({tuple(of.flatten().tolist()) for of in weights.values()}) == 3


def test_both_needs_source_images_of_the_targets_size():
    data = dataclasses.replace(TINY.data, source=Folder("a", "b"), source_size=(32, 64))
    with refuses(InputError, "data.source_size", "data.size", "global_alignment.against both", [32, 64], [32, 32]):
        check(with_discriminator(dataclasses.replace(TINY, data=data), against="both"))
    for against in ("source", "labelled"):
        check(with_discriminator(dataclasses.replace(TINY, data=data), against=against))
    check(
        with_discriminator(
            dataclasses.replace(TINY, data=dataclasses.replace(data, source_size=(32, 32))), against="both"
        )
    )


@pytest.mark.parametrize("hidden", [(), (24,), (64, 32, 16)])
def test_hidden_channels_are_the_layers_of_the_discriminator(hidden):
    settings = with_discriminator(semantic=True, hidden_channels=hidden)
    segmenter = build_segmenter(settings)
    discriminator = build_discriminator("semantic", settings, segmenter)
    widths = [m.out_features for m in discriminator.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [*hidden, 8]
    assert discriminator(torch.zeros(2, 8, segmenter.feature_channels)).shape == (2, 8)


def test_hidden_channels_from_the_command_line(tmp_path, capsys):
    arguments = ["train", "--method", "semantic", "--steps", "1", "--labelled", "2", "--network.width", "8"]
    arguments += ["--data.size", "[32,32]", "--data.scenes.source", "2", "--data.scenes.target", "2"]
    arguments += ["--data.scenes.validation", "1", "--data.scenes.test", "1", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--semantic_alignment.hidden_channels", "[24,0]"]) == 2
    mentions(capsys.readouterr().err, "error", "semantic_alignment.hidden_channels", 1, 0)
    assert main([*arguments, "--semantic_alignment.hidden_channels", "[24]"]) == 0
    state = torch.load(checkpoints.newest_checkpoint(tmp_path / "run"), weights_only=True)
    assert state["run"]["semantic_alignment"]["hidden_channels"] == [24]
    assert 24 in {len(tensor) for tensor in state["stateful"]["semantic alignment"].values()}


def semantic_case():
    """Two images a domain at 4 x 4: the source has classes 0 and 1, the labelled images 0 alone."""
    generator = torch.Generator().manual_seed(0)
    outputs, batch = {}, {}
    for domain in ("source", "labelled", "unlabelled"):
        features = torch.randn(2, 3, 4, 4, generator=generator).requires_grad_()
        outputs[domain] = Segmentation(features, features)
        batch[domain] = {"label": torch.zeros(2, 4, 4, dtype=torch.int64)}
    batch["source"]["label"][:, 2:] = 1
    pixels = {"source": torch.tensor([16, 16, 0]), "labelled": torch.tensor([32, 9, 0])}
    settings = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, classes=["a", "b", "c"]))
    return outputs, batch, pixels, with_discriminator(settings, semantic=True, resample="nearest")


def test_a_bank_stands_in_for_the_discriminator_alone():
    outputs, batch, pixels, settings = semantic_case()
    banks = {domain: semshift.PrototypeBank(3, 3, momentum=0.5) for domain in ("source", "labelled")}
    earlier = torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 6.0], [0.0, 0.0, 0.0]])
    banks["labelled"].update(semshift.ClassSums(earlier, torch.tensor([0, 2, 0])))
    view = semantic_view(outputs, batch, pixels, settings, banks=banks)
    assert view.target_weight.tolist() == [[True, True, False]] * 2
    assert view.confusion_weight.tolist() == [[True, False, False]] * 2
    assert view.target[:, 1].tolist() == [[1.0, 2.0, 3.0]] * 2
    # The bank has taken in this batch: half of the sum of all features of class 0, over half of their number.
    of_0 = outputs["labelled"].features.detach().permute(0, 2, 3, 1).reshape(-1, 3).mean(0)
    torch.testing.assert_close(banks["labelled"].means[0], of_0)
    assert not banks["labelled"].means.requires_grad
    without = semantic_view(outputs, batch, pixels, settings)
    assert without.target_weight.tolist() == without.confusion_weight.tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("per_image", [True, False])
def test_soft_prototypes_join_where_they_weigh_a_cell(per_image):
    outputs, batch, pixels, settings = semantic_case()
    settings = with_discriminator(settings, semantic=True, per_image=per_image)
    soft = torch.zeros(2, 3, 4, 4)
    soft[:, 0, 0, 0] = 0.25
    soft[:, 1, 1, :2] = 0.5
    view = semantic_view(outputs, batch, pixels, settings, soft_weights=soft)
    rows = slice(2, 4) if per_image else slice(1, 2)
    assert view.target_weight[rows].tolist() == [[False, True, False]] * (2 if per_image else 1)
    assert view.confusion_weight[rows].tolist() == view.target_weight[rows].tolist()
    means = outputs["unlabelled"].features.detach()[:, :, 1, :2].mean(2)
    torch.testing.assert_close(view.target[rows, 1].detach(), means if per_image else means.mean(0, keepdim=True))
    (outputs["unlabelled"].features * 0).sum().backward()
    view.target.sum().backward()
    assert outputs["unlabelled"].features.grad.abs().sum() > 0

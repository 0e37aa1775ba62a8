"""The network of a run folder: which weights it has, what it computes, and which folders are refused."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from examples.workbench.__main__ import main
from examples.workbench.data.files import read_image
from examples.workbench.errors import InputError
from examples.workbench.inference.trained import load_run
from examples.workbench.settings import Settings
from examples.workbench.training import checkpoints
from examples.workbench.training.train import train
from tests.errors import mentions, refuses
from tests.examples.workbench.tiny import equal, tiny

# The trainer's libraries give their own warnings.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def copied(trained, tmp_path):
    """The run folder in another place."""
    shutil.copytree(trained.run, tmp_path / "copy")
    return tmp_path / "copy"


def pixels(rng, *size):
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def as_batch(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def test_it_is_ready_to_use(copied):
    network = load_run(str(copied))
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.data.classes == ["a", "b", "c"]
    assert network.settings.steps == 12


@pytest.mark.parametrize(("final", "best"), [("teacher", False), ("segmenter", False), ("teacher", True)])
def test_its_weights_are_those_that_the_settings_name(copied, final, best):
    file = copied / "settings.yaml"
    file.write_text(file.read_text().replace("final: teacher", f"final: {final}"))
    checkpoint = copied / checkpoints.BEST if best else checkpoints.newest_checkpoint(copied)
    expected = checkpoints.load_weights(checkpoint, teacher=final == "teacher")
    other = checkpoints.load_weights(checkpoint, teacher=final != "teacher")
    assert not equal(expected, other)
    assert equal(dict(load_run(copied, best=best).segmenter.state_dict()), expected)


def test_only_a_method_with_a_teacher_uses_one():
    assert [Settings(method=method).final for method in ("ass", "ass-plus")] == ["segmenter", "teacher"]


def test_predictions_are_those_of_the_evaluation(trained):
    network = load_run(trained.run)
    for file in sorted(trained.images.iterdir()):
        saved = np.asarray(Image.open(trained.run / "predictions" / f"{file.stem}.png"))
        np.testing.assert_array_equal(network.predict(read_image(file)), saved)


@pytest.mark.parametrize("size", [(32, 48), (75, 51), (31, 200), (5, 7), (1, 1)])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_forward_gives_the_logits_behind_the_predictions(size, precision, trained, tmp_path):
    """Resized as Pillow does, so that they are equal at every size."""
    run = trained.run
    if precision == "64-true":
        run = tmp_path / "run"
        train(tiny(steps=1, precision=precision), run)
    network, image = load_run(run), pixels(np.random.default_rng(0), *size)
    logits = network(as_batch(image))
    assert logits.dtype == torch.float32
    assert torch.equal(logits[0], network.logits(image))
    assert logits.shape == (1, len(network.data.classes), *size)
    two = network(torch.cat([as_batch(image)] * 2))
    torch.testing.assert_close(two, torch.cat([logits] * 2))


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).double()])
def test_other_tensors_are_refused(images, trained):
    with refuses(InputError, "[B, 3, H, W]", "float32", list(images.shape), images.dtype):
        load_run(trained.run)(images)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8)])
def test_other_arrays_are_refused(image, trained):
    with refuses(InputError, "[H, W, 3]", "uint8", list(image.shape), image.dtype):
        load_run(trained.run).predict(image)


def test_a_damaged_checkpoint_is_passed_over(copied, capsys):
    *_, before, newest = sorted((copied / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    expected = checkpoints.load_weights(before, teacher=True)
    assert equal(dict(load_run(copied).segmenter.state_dict()), expected)
    mentions(capsys.readouterr().err.strip(), newest, "damaged")


def cut(file, words):
    file.write_text(file.read_text().split(words)[0])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: shutil.rmtree(run), ("no such folder",)),
        (lambda run: (run / "settings.yaml").unlink(), ("settings.yaml",)),
        (lambda run: (run / "settings.yaml").write_bytes(b""), ("settings.yaml", "damaged")),
        (lambda run: (run / "settings.yaml").write_bytes(b"\xff\xfe\x00"), ("settings.yaml", "damaged")),
        (lambda run: (run / "settings.yaml").write_text("data: ["), ("settings.yaml", "damaged")),
        (lambda run: cut(run / "settings.yaml", "self_training"), ("settings.yaml", "damaged")),
        (lambda run: cut(run / "settings.yaml", "  final"), ("settings.yaml", "damaged")),
        (lambda run: cut(run / "settings.yaml", " teacher"), ("settings.yaml", "damaged")),
        (lambda run: shutil.rmtree(run / "checkpoints"), ("checkpoints", "none")),
        (lambda run: [file.write_bytes(b"x") for file in run.glob("checkpoints/*.pt")], ("checkpoints", "damaged")),
        (
            lambda run: (run / "settings.yaml").write_text((run / "settings.yaml").read_text().replace("  - c\n", "")),
            ("classifier.weight",),
        ),
    ],
)
def test_a_folder_that_cannot_be_used(spoil, words, copied, capsys):
    spoil(copied)
    with pytest.raises(InputError) as caught:
        load_run(copied)
    mentions(" ".join(str(caught.value).split()), "--run", copied, *words)


def test_best_without_a_validation_during_training(copied):
    (copied / checkpoints.BEST).unlink()
    with refuses(InputError, "--run", copied, "best.pt", "validate_every"):
        load_run(copied, best=True)


def test_another_accelerator(copied):
    assert load_run(copied, accelerator="cpu").settings.accelerator == "cpu"
    absent = "mps" if torch.cuda.is_available() else "cuda"
    with refuses(InputError, absent, "--accelerator cpu"):
        load_run(copied, accelerator=absent)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["init", "config"])
def test_a_segformer_loads_and_resumes_without_the_folder_that_it_came_from(given, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=2, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "weights")
    network = {"name": "segformer", given: str(tmp_path / "weights")}
    run, config = tmp_path / "run", tmp_path / "tiny.yaml"
    settings = {"data": {"size": [32, 32], "scenes": {"source": 4, "target": 4, "validation": 2, "test": 2}}}
    config.write_text(yaml.safe_dump({**settings, "network": network, "labelled": 2, "steps": 1, "method": "joint"}))
    arguments = ["train", "--config", str(config), "--out", str(run), "--optimiser.batch_size", "2"]
    assert main(arguments) == 0
    image = pixels(np.random.default_rng(0), 40, 50)
    expected = load_run(run).predict(image)

    shutil.rmtree(tmp_path / "weights")
    run.rename(tmp_path / "moved")
    moved = load_run(tmp_path / "moved")
    assert moved.segmenter.feature_channels == 32
    np.testing.assert_array_equal(moved.predict(image), expected)
    arguments[arguments.index(str(run))] = str(tmp_path / "moved")
    assert main([*arguments, "--resume"]) == 0
    # Without it, the error names the file that is missing.
    (tmp_path / "moved" / "network.json").unlink()
    with refuses(InputError, "--run", tmp_path / "moved", tmp_path / "weights"):
        load_run(tmp_path / "moved")

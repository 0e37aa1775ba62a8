"""The command `export`: predictions of the files without the workbench, and the exports that are refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from examples.workbench.__main__ import main
from examples.workbench.errors import MachineError
from examples.workbench.inference import export as export_module
from examples.workbench.inference.export import export
from examples.workbench.inference.trained import Trained, load_run
from examples.workbench.networks.build import build_segmenter
from examples.workbench.settings import NetworkSettings
from tests.errors import mentions, refuses
from tests.examples.workbench.tiny import tiny

# PyTorch's exporters warn about their own code.
pytestmark = pytest.mark.filterwarnings("default")

SIZES = [(32, 48), (75, 51), (20, 33), (1, 1), (160, 300)]

PROGRAM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("semshift", "examples"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Block())
import numpy as np
import torch

program = torch.export.load("network.pt2").module()
images = np.load("images.npz")
masks = {}
for name in images:
    with torch.no_grad():
        logits = program(torch.from_numpy(images[name]).permute(0, 3, 1, 2).float() / 255)
    masks[name] = logits.argmax(1).byte().numpy()
np.savez("masks.npz", **masks)
try:
    import semshift
except ImportError:
    assert not [name for name in sys.modules if name.split(".")[0] in ("semshift", "examples")]
    print("no semshift")
"""


@pytest.fixture(scope="module")
def network(trained):
    return load_run(trained.run)


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def as_batch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.mark.slow
def test_the_program_runs_without_semshift(trained, network, tmp_path, capsys):
    assert main(["export", "--run", str(trained.run), "--out", str(tmp_path / "network.pt2")]) == 0
    mentions(capsys.readouterr().out.strip(), tmp_path / "network.pt2", "100.00")
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]
    images = {f"{b} {size}": pixels(b, *size) for size in SIZES for b in (1, 3)}
    np.savez(tmp_path / "images.npz", **images)
    (tmp_path / "run.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "run.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no semshift\n"), done.stderr
    with np.load(tmp_path / "masks.npz") as masks:
        assert set(masks) == set(images)
        for name, batch in images.items():
            np.testing.assert_array_equal(masks[name], np.stack([network.predict(image) for image in batch]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deeplab-v2", "segformer"])
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_the_other_networks(name, ending, tmp_path):
    if name == "segformer":
        pytest.importorskip("transformers")
    settings = tiny(network=NetworkSettings(name=name, **({"depth": 50} if name == "deeplab-v2" else {})))
    network = Trained(settings, build_segmenter(settings))
    assert "three sizes" in export(network, tmp_path / f"network.{ending}")
    if ending == "pt2":
        program = torch.export.load(tmp_path / "network.pt2").module()
        image = pixels(1, 41, 50)
        np.testing.assert_array_equal(program(as_batch(image))[0].argmax(0).numpy(), network.predict(image[0]))


@pytest.mark.slow
def test_onnx(trained, network, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "network.onnx"
    assert main(["export", "--run", str(trained.run), "--out", str(file)]) == 0
    mentions(capsys.readouterr().out.strip(), file, "onnxruntime")
    # Its weights are in the file.
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in SIZES:
        images = pixels(2, *size)
        (logits,) = session.run(["logits"], {"images": as_batch(images).numpy()})
        assert logits.shape == (2, 3, *size)
        expected = np.stack([network.logits(image).numpy() for image in images])
        # Sums in another order, through a dozen layers.
        np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_onnx_where_it_is_not_installed(missing, trained, tmp_path, capsys, monkeypatch):
    find = export_module.is_installed
    monkeypatch.setattr(export_module, "is_installed", lambda package: package != missing and find(package))
    assert main(["export", "--run", str(trained.run), "--out", str(tmp_path / "network.onnx")]) == 2
    mentions(capsys.readouterr().err.strip(), "error", ".onnx", "pip install onnx onnxscript")


@pytest.mark.slow
def test_onnx_without_its_runtime(network, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    find = export_module.is_installed
    monkeypatch.setattr(export_module, "is_installed", lambda package: package != "onnxruntime" and find(package))
    assert "onnx's reference" in export(network, tmp_path / "network.onnx")


@pytest.mark.parametrize("ending", ["pt", "pth"])
def test_weights(ending, trained, network, tmp_path, capsys):
    file = tmp_path / f"network.{ending}"
    assert main(["export", "--run", str(trained.run), "--out", str(file)]) == 0
    mentions(capsys.readouterr().out.strip(), file, len(network.segmenter.state_dict()))
    build_segmenter(network.settings).load_state_dict(torch.load(file, weights_only=True))
    state = torch.load(file, weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in network.segmenter.state_dict().items())


def test_best(trained, tmp_path):
    assert main(["export", "--run", str(trained.run), "--best", "--out", str(tmp_path / "best.pt")]) == 0
    expected = load_run(trained.run, best=True).segmenter.state_dict()
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    last = load_run(trained.run).segmenter.state_dict()
    assert not all(torch.equal(last[name], value) for name, value in expected.items())


class Shifted(torch.nn.Module):
    """Logits of a wrong class on a share of the pixels, for images of one size."""

    def __init__(self, network, size, rows):
        super().__init__()
        self.network, self.size, self.rows = network, size, rows

    def forward(self, images):
        logits = self.network(images)
        if images.shape[-2:] == self.size:
            logits[..., : self.rows, :] = logits[..., : self.rows, :].roll(1, 1)
        return logits


@pytest.mark.parametrize(
    ("size", "rows", "right"),
    [((32, 48), 0, True), ((32, 48), 1, False), ((69, 72), 1, False), ((25, 55), 1, False)],
)
def test_a_program_that_predicts_something_else_is_not_kept(size, rows, right, trained, tmp_path, capsys, monkeypatch):
    write = export_module._write_program
    monkeypatch.setattr(export_module, "_write_program", lambda n, to: write(n, to) and Shifted(n, size, rows))
    (tmp_path / "network.pt2").write_bytes(b"old")
    status = main(["export", "--run", str(trained.run), "--out", str(tmp_path / "network.pt2")])
    assert status == (0 if right else 3)
    if not right:
        mentions(capsys.readouterr().err.strip(), "error", tmp_path / "network.pt2", f"{size[0]} x {size[1]}")
        assert (tmp_path / "network.pt2").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]


def test_weights_that_are_not_finite(network, tmp_path):
    settings = tiny()
    broken = Trained(settings, build_segmenter(settings))
    broken.segmenter.classifier.bias.fill_(torch.nan)
    with refuses(MachineError, "0.00", tmp_path / "network.pt2"):
        export(broken, tmp_path / "network.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["network", "network.pkl", "network.PT2", "folder.pt2"])
def test_files_that_are_refused(name, trained, tmp_path, capsys):
    (tmp_path / "folder.pt2").mkdir()
    assert main(["export", "--run", str(trained.run), "--out", str(tmp_path / name)]) == 2
    mentions(capsys.readouterr().err.strip(), "error", "--out", tmp_path / name)


def test_runs_that_are_refused(tmp_path, capsys):
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "a.pt")]) == 2
    mentions(capsys.readouterr().err.strip(), "error", "--run", tmp_path)

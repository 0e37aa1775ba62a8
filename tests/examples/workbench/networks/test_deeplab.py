"""DeepLab-v2: counts, sizes and names against the papers', preprocessing by hand, loading, and runs of the trainer."""

import dataclasses
import functools
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from examples.workbench.training.views import supervised_loss
from torch import nn
from torch.nn import functional as F

from examples.workbench.__main__ import main
from examples.workbench.data.samples import image_tensor
from examples.workbench.errors import InputError
from examples.workbench.networks.build import build_segmenter
from examples.workbench.networks.deeplab import DeepLabV2, load_pretrained
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.settings import Data, NetworkSettings, OptimiserSettings, SceneSettings, Settings
from examples.workbench.training import checkpoints
from examples.workbench.training import run_folder as runs
from examples.workbench.training import train as train_module
from examples.workbench.training.learners import build_optimiser
from examples.workbench.training.train import train
from tests.errors import mentions, refuses

# Libraries under the trainer warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

SCENES = SceneSettings(source=4, target=4, validation=2, test=2)
TINY = Settings(
    method="ass",
    steps=2,
    labelled=2,
    log_every=1,
    save_every=1,
    data=Data(size=(32, 32), scenes=SCENES),
    network=NetworkSettings(name="deeplab-v2", depth=50),
    optimiser=OptimiserSettings(name="sgd", learning_rate=1e-3, classifier_factor=10, images=1, unlabelled=1),
)


def resnet(blocks, *, counters=True):
    """Names and shapes of torchvision's ResNets with bottlenecks, from table 1 of the paper and nothing of ours."""

    def norm(name, channels):
        shapes = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        return shapes | ({f"{name}.num_batches_tracked": ()} if counters else {})

    shapes = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64)
    inputs = 64
    for stage, (count, planes) in enumerate(zip(blocks, (64, 128, 256, 512)), start=1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.conv1.weight": (planes, inputs, 1, 1)} | norm(f"{at}.bn1", planes)
            shapes |= {f"{at}.conv2.weight": (planes, planes, 3, 3)} | norm(f"{at}.bn2", planes)
            shapes |= {f"{at}.conv3.weight": (4 * planes, planes, 1, 1)} | norm(f"{at}.bn3", 4 * planes)
            if block == 0:
                shapes |= {f"{at}.downsample.0.weight": (4 * planes, inputs, 1, 1)}
                shapes |= norm(f"{at}.downsample.1", 4 * planes)
            inputs = 4 * planes
    return shapes


def head(name, channels, classes, branches=4):
    shapes = {}
    for branch in range(branches):
        shapes |= {f"{name}.conv2d_list.{branch}.weight": (classes, channels, 3, 3)}
        shapes |= {f"{name}.conv2d_list.{branch}.bias": (classes,)}
    return shapes


RESNET_50, RESNET_101 = (3, 4, 6, 3), (3, 4, 23, 3)
FC = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def filled(shapes, prefix=""):
    """Small values, another one in every tensor; running variances positive."""
    values = {name: torch.full(shape, (1 + i % 97) / 997) for i, (name, shape) in enumerate(shapes.items())}
    return {prefix + n: v.long() if n.endswith("num_batches_tracked") else v for n, v in values.items()}


@functools.cache
def on_meta(*arguments, **options):
    """One network of each kind, without memory, not to be changed."""
    with torch.device("meta"):
        return DeepLabV2(*arguments, **options)


def count(shapes):
    running = ("running_mean", "running_var", "num_batches_tracked")
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith(running))


def test_parameter_counts():
    assert count(resnet(RESNET_101)) == 42_500_160
    model = on_meta(19)
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("layer5"))
    assert backbone == 42_500_160
    assert sum(p.numel() for p in model.classifier_parameters()) == 4 * (2048 * 19 * 9 + 19) == 1_400_908
    assert sum(p.numel() for p in model.parameters()) == 43_901_068
    assert sum(p.numel() for p in on_meta(19, depth=50).parameters()) == 23_508_032 + 1_400_908
    assert sum(p.numel() for p in on_meta(19, aspp_dilations=(6, 12)).parameters()) == 42_500_160 + 700_454


@pytest.mark.parametrize(("depth", "blocks"), [(50, RESNET_50), (101, RESNET_101)])
@pytest.mark.parametrize("frozen", [False, True])
def test_names_and_shapes_are_torchvisions_and_the_published_ones(depth, blocks, frozen):
    state = on_meta(19, depth=depth, freeze_batch_norm=frozen).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == resnet(blocks) | head("layer5", 2048, 19)
    state = on_meta(19, depth=depth, auxiliary=True).state_dict()
    heads = head("layer5", 1024, 19) | head("layer6", 2048, 19)
    assert {name: tuple(t.shape) for name, t in state.items()} == resnet(blocks) | heads


@pytest.mark.parametrize("origin", ["torchvision", "caffe"])
@pytest.mark.parametrize(
    ("size", "expected"), [((512, 1024), (65, 129)), ((720, 1280), (91, 161)), ((32, 32), (5, 5)), ((33, 47), (5, 7))]
)
def test_feature_sizes(origin, size, expected):
    features, logits, auxiliary = on_meta(19, origin=origin)(torch.empty(1, 3, *size, device="meta"))
    assert features.shape == (1, 2048, *expected)
    assert logits.shape == (1, 19, *expected)
    assert auxiliary is None
    output = on_meta(19, origin=origin, auxiliary=True)(torch.empty(1, 3, *size, device="meta"))
    assert output.logits.shape == output.auxiliary.shape == (1, 19, *expected)


def test_origins_differ_in_stride_and_dilation():
    for origin, strides, first in (("torchvision", [(1, 1), (2, 2)], [1, 2]), ("caffe", [(2, 2), (1, 1)], [2, 4])):
        model = on_meta(2, origin=origin)
        assert [model.layer2[0].conv1.stride, model.layer2[0].conv2.stride] == strides
        strided = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
        carrier = "layer2.0.conv2" if origin == "torchvision" else "layer2.0.conv1"
        assert strided == {"conv1", carrier, "layer2.0.downsample.0"}
        for stage, dilation, at_first in ((model.layer3, 2, first[0]), (model.layer4, 4, first[1])):
            assert [block.conv2.dilation[0] for block in stage] == [at_first] + [dilation] * (len(stage) - 1)
    assert [conv.dilation[0] for conv in on_meta(2).layer5.conv2d_list] == [6, 12, 18, 24]


def settle(model, generator):
    """Random statistics, so that batch norm does something, and keeps values of deep layers in range."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 10)
            module.running_var.copy_(1 + torch.rand(module.running_var.shape, generator=generator))


@torch.no_grad()
@pytest.mark.parametrize("origin", ["torchvision", "caffe"])
def test_dilated_features_hold_those_of_the_strided_network(origin):
    """The à trous algorithm: at every fourth position stand the features of the network as it was trained."""
    model = DeepLabV2(2, depth=50, origin=origin).eval()
    settle(model, torch.Generator().manual_seed(0))
    images = torch.randn(1, 3, 64, 96)
    dilated = model(images).features
    for stage in (model.layer3, model.layer4):
        for i, block in enumerate(stage):
            block.conv2.dilation = block.conv2.padding = (1, 1)
            if i == 0:
                (block.conv2 if origin == "torchvision" else block.conv1).stride = (2, 2)
                block.downsample[0].stride = (2, 2)
    strided = model(images).features
    assert strided.std() > 0.01
    torch.testing.assert_close(dilated[:, :, ::4, ::4], strided, rtol=1e-3, atol=1e-4 * float(strided.abs().max()))


def test_preprocessing_is_that_of_the_weights_origin():
    pixels = torch.randint(256, (5, 7, 3), dtype=torch.uint8)
    rgb = pixels.double().permute(2, 0, 1)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    torchvision = (rgb / 255 - mean[:, None, None]) / deviation[:, None, None]
    bgr_mean = torch.tensor([104.00698793, 116.66876762, 122.67891434], dtype=torch.float64)
    caffe = torch.stack([rgb[2], rgb[1], rgb[0]]) - bgr_mean[:, None, None]
    # A few roundings of float32 at the size of the values before the mean is taken off.
    for origin, expected, size in (("torchvision", torchvision, 5), ("caffe", caffe, 255)):
        model = DeepLabV2(2, depth=50, origin=origin)
        got = model.preprocess(image_tensor(pixels.numpy())[None])[0].double()
        torch.testing.assert_close(got, expected, rtol=0, atol=8 * size * 2**-24)
        assert not {"gain", "offset"} & model.state_dict().keys()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            expected = model(torch.zeros(1, 3, 32, 32)).features
            patch.setattr(model, "preprocess", lambda images: images)
            assert not torch.equal(model(torch.zeros(1, 3, 32, 32)).features, expected)


@torch.no_grad()
def test_the_classifier_sums_its_branches():
    model = DeepLabV2(3, depth=50, aspp_dilations=(6, 12)).eval()
    for parameter in model.layer5.parameters():
        parameter.normal_(std=0.1)
    features, logits, _ = model(torch.randn(1, 3, 32, 32))
    convolutions = model.layer5.conv2d_list
    expected = sum(F.conv2d(features, c.weight, c.bias, padding=d, dilation=d) for c, d in zip(convolutions, (6, 12)))
    torch.testing.assert_close(logits, expected)
    assert isinstance(model(torch.randn(1, 3, 32, 32)), Segmentation)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_norm_stays_as_it_is(frozen):
    model = DeepLabV2(2, depth=50, freeze_batch_norm=frozen)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 53
    with torch.no_grad():  # so that an untrained network stays in range
        for name, norm in norms.items():
            norm.weight.fill_(0.1 if name.endswith("bn3") else 1.0)
    model.train()
    model.layer3.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.randn(2, 3, 32, 32)).logits.square().mean().backward()
    optimiser.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    of_norms = {f"{name}.{key}" for name, norm in norms.items() for key in norm.state_dict()}
    if frozen:
        assert not changed & of_norms
        assert not any(parameter.requires_grad for norm in norms.values() for parameter in norm.parameters())
        assert "conv1.weight" in changed
    else:
        assert {name for name in of_norms if "running" in name or "tracked" in name} <= changed


def saved(path, state):
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def model():
    return DeepLabV2(5, depth=50)


def test_torchvision_weights_load_into_the_backbone(tmp_path):
    model = DeepLabV2(5, depth=101, origin="torchvision", freeze_batch_norm=True)
    drawn = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("layer5")}
    state = filled(resnet(RESNET_101) | FC)
    loaded = load_pretrained(model, saved(tmp_path / "resnet101.pth", state))
    after = model.state_dict()
    for name, tensor in state.items():
        if name not in FC:
            assert torch.equal(after[name], tensor)
    assert all(torch.equal(after[name], tensor) for name, tensor in drawn.items())
    assert set(loaded.loaded) == resnet(RESNET_101).keys()
    assert set(loaded.missing) == head("layer5", 2048, 5).keys()
    assert set(loaded.left_over) == FC.keys()
    assert str(loaded).splitlines() == [
        f"{tmp_path / 'resnet101.pth'}: 624 tensors loaded as torchvision weights (RGB, stride in the 3x3)",
        "missing: " + ", ".join(head("layer5", 2048, 5)),
        "left over: fc.weight, fc.bias",
    ]


@pytest.mark.parametrize("prefix", ["", "module.", "Scale.", "module.Scale."])
def test_published_checkpoints_load_whole(prefix, tmp_path):
    """With a second classifier and without the counters that old versions of PyTorch did not have."""
    model = DeepLabV2(5, depth=50, origin="caffe", auxiliary=True)
    shapes = resnet(RESNET_50, counters=False) | head("layer5", 1024, 5) | head("layer6", 2048, 5)
    loaded = load_pretrained(model, saved(tmp_path / "w.pth", filled(shapes, prefix)))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in filled(shapes).items())
    assert (set(loaded.loaded), loaded.left_over, loaded.prefix) == (shapes.keys(), (), prefix)
    assert len(loaded.missing) == 53
    first, missing, left_over = str(loaded).splitlines()
    assert "as caffe weights (BGR, stride in the 1x1)" in first
    assert first.endswith(f", without the prefix {prefix}") == bool(prefix)
    assert (missing, left_over) == ("missing: 53 x num_batches_tracked", "left over: nothing")


def test_the_two_branch_variant_leaves_two_over(tmp_path):
    model = DeepLabV2(5, depth=50, aspp_dilations=(6, 12))
    file = saved(tmp_path / "w.pth", filled(resnet(RESNET_50) | head("layer5", 2048, 5)))
    assert {name[: len("layer5.conv2d_list.0")] for name in load_pretrained(model, file).left_over} == {
        "layer5.conv2d_list.2",
        "layer5.conv2d_list.3",
    }


def test_a_classifier_can_be_left_out(model, tmp_path):
    file = saved(tmp_path / "w.pth", filled(resnet(RESNET_50) | head("layer5", 2048, 21)))
    shapes = [5, 2048, 3, 3], [21, 2048, 3, 3]
    with refuses(InputError, "layer5.conv2d_list.0.weight", file, *shapes, "network.init_classifier false"):
        load_pretrained(model, file)
    loaded = load_pretrained(model, file, classifier=False)
    assert set(loaded.left_over) == set(loaded.missing) == head("layer5", 2048, 5).keys()
    assert torch.equal(model.state_dict()["conv1.weight"], torch.load(file, weights_only=True)["conv1.weight"])


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


BACKBONE_50 = resnet(RESNET_50)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            without(BACKBONE_50, "layer3.2.conv2.weight"),
            ("depth 50", "no layer3.2.conv2.weight"),
        ),
        (
            without(BACKBONE_50, "bn1.running_var", "bn1.bias", "layer4.2.bn3.bias"),
            ("depth 50", "no bn1.bias", "2 more"),
        ),
        ({}, ("depth 50", "no conv1.weight", "264 more")),
        (
            resnet(RESNET_101),
            ("depth 50", "layer3.6.conv1.weight", "305 more"),
        ),
        (
            BACKBONE_50 | {"layer2.0.conv2.weight": (256, 256, 3, 3)},
            ("layer2.0.conv2.weight", [128, 128, 3, 3], [256, 256, 3, 3]),
        ),
        (
            BACKBONE_50 | without(head("layer5", 2048, 5), "layer5.conv2d_list.3.bias"),
            ("classifier", "no layer5.conv2d_list.3.bias"),
        ),
        (
            {f"module.{name}": shape for name, shape in BACKBONE_50.items()} | FC,
            ("depth 50", "no conv1.weight", "264 more"),
        ),
    ],
)
def test_other_weights_are_refused_and_change_nothing(shapes, words, model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = saved(tmp_path / "w.pth", filled(shapes))
    with refuses(InputError, file, *words):
        load_pretrained(model, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Code:
    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([torch.zeros(2)], ("state dict", "list")),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, ("state dict", "dict under 'state_dict'")),
        ({3: torch.zeros(1)}, ("state dict", "Tensor under 3")),
        ({"conv1.weight": Code()}, ("no code",)),
    ],
)
def test_files_that_are_no_state_dict(state, words, model, tmp_path, capsys):
    file = saved(tmp_path / "w.pth", state)
    with refuses(InputError, file, *words):
        load_pretrained(model, file)
    assert "code" not in capsys.readouterr().out


def test_files_that_do_not_load(model, tmp_path, capsys):
    whole = saved(tmp_path / "w.pth", filled(BACKBONE_50)).read_bytes()
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("empty", b""),
        ("pickle", pickle.dumps(Code(), protocol=2)),
    ):
        (tmp_path / name).write_bytes(content)
        with refuses(InputError, tmp_path / name, "no code"):
            load_pretrained(model, tmp_path / name)
    with refuses(InputError, "network.init", "/none.pth"):
        load_pretrained(model, Path("/none.pth"))
    assert "code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_classes", 1, ("2", "got 1")),
        ("depth", 18, (101, 50, 18)),
        ("aspp_dilations", (), ("[]",)),
        ("aspp_dilations", (6, 0), ([6, 0],)),
        ("origin", "timm", ("'torchvision'", "'caffe'", "'timm'")),
    ],
)
def test_bad_arguments(name, value, words):
    with refuses(ValueError, name, *words):
        on_meta(**({"num_classes": 5} | {name: value}))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"aspp_dilations": (6, -1)}, ("network.aspp_dilations", [6, -1])),
        ({"name": "small", "init": "w.pth"}, ("network.init", "deeplab-v2", "segformer", "w.pth", "small")),
        ({"name": "small", "frozen_batch_norm": True}, ("network.frozen_batch_norm", "deeplab-v2", "small")),
        ({"feature_layer": "decoder"}, ("network.feature_layer", "encoder", "decoder", "deeplab-v2")),
        ({"frozen_batch_norm": True}, ("network.init", "network.frozen_batch_norm", "none")),
    ],
)
def test_bad_settings(network, words):
    with refuses(InputError, *words):
        check(dataclasses.replace(TINY, network=dataclasses.replace(TINY.network, **network)))


def test_bad_classifier_factor():
    optimiser = dataclasses.replace(TINY.optimiser, classifier_factor=0.0)
    with refuses(InputError, "optimiser.classifier_factor", 0.0):
        check(dataclasses.replace(TINY, optimiser=optimiser))


@pytest.mark.parametrize("network", [NetworkSettings(width=8), TINY.network])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups_of_the_optimiser(network, name):
    settings = dataclasses.replace(TINY, network=network, optimiser=dataclasses.replace(TINY.optimiser, name=name))
    with torch.device("meta"):
        segmenter = build_segmenter(settings)
    groups = build_optimiser(settings, segmenter).param_groups
    assert len(groups) == 2
    names = {id(parameter): name for name, parameter in segmenter.named_parameters()}
    last = "classifier" if network.name == "small" else "layer5"
    assert {names[id(p)].split(".")[0] for p in groups[1]["params"]} == {last}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert last not in {names[id(p)].split(".")[0] for p in groups[0]["params"]}
    one = dataclasses.replace(settings.optimiser, classifier_factor=1.0)
    assert len(build_optimiser(dataclasses.replace(settings, optimiser=one), segmenter).param_groups) == 1


@pytest.mark.slow
def test_from_the_command_line_with_weights(tmp_path, capsys):
    """Two steps from a file of weights, and an evaluation without the file; what is frozen is as in the file."""
    state = DeepLabV2(2, depth=50).state_dict()
    state = {n: t * 0.1 if n.endswith("bn3.weight") else t for n, t in state.items() if not n.startswith("layer5")}
    state["bn1.running_mean"] += 0.25
    init, out, config = saved(tmp_path / "resnet50.pth", state), tmp_path / "run", tmp_path / "settings.yaml"
    settings = json.loads(json.dumps(dataclasses.asdict(TINY)))
    settings["network"] |= {"frozen_batch_norm": True, "origin": "caffe"}
    config.write_text(yaml.safe_dump(settings))
    arguments = ["train", "--config", str(config), "--out", str(out), "--method", "joint", "--steps", "2"]
    assert main([*arguments, "--init", str(init)]) == 0
    errors = capsys.readouterr().err
    assert f"{init}: 318 tensors loaded as caffe weights (BGR, stride in the 1x1)\nmissing: layer5." in errors
    assert "memory of a step, estimated: " in errors
    kept = torch.load(checkpoints.newest_checkpoint(out), weights_only=True)
    assert kept["run"]["network"]["origin"] == "caffe"
    rates = [group["lr"] for group in kept["stateful"]["optimiser"]["param_groups"]]
    assert rates[1] == pytest.approx(10 * rates[0])
    weights = kept["stateful"]["segmenter"]
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


@pytest.mark.parametrize(
    ("weight", "discriminators"), [(0.5, {"global", "auxiliary", "semantic"}), (0, {"global", "semantic"})]
)
@pytest.mark.slow
def test_the_second_level_has_losses_of_its_own(weight, discriminators, tmp_path):
    network = dataclasses.replace(TINY.network, auxiliary=True)
    how = dataclasses.replace(TINY.global_alignment, start=0.0, ramp=0.0, auxiliary_weight=weight)
    settings = dataclasses.replace(TINY, network=network, global_alignment=how, steps=1)
    train(settings, tmp_path / "run")
    state = torch.load(checkpoints.newest_checkpoint(tmp_path / "run"), weights_only=True)["stateful"]
    assert {name.split()[0] for name in state if name.endswith("critic")} == discriminators
    (row,) = run_folder.read_history(tmp_path / "run")
    assert {name.split("/")[1] for name in row if name.startswith("weight/")} == discriminators
    if weight:
        assert row["weight/auxiliary"] == weight
        assert row["gradient/auxiliary"] > 0
        assert row["loss/auxiliary"] != row["loss/global"]


def test_the_auxiliary_classifier_learns_from_labels(tmp_path):
    output = Segmentation(torch.zeros(1, 1, 1, 1), torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    settings = dataclasses.replace(TINY, optimiser=dataclasses.replace(TINY.optimiser, auxiliary_weight=0.25))
    assert supervised_loss(output, labels, settings) == pytest.approx(1.25 * math.log(2))
    assert supervised_loss(output._replace(auxiliary=None), labels, settings) == pytest.approx(math.log(2))


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """Running statistics of batch norm and both groups of the optimiser too, and without the file of weights."""
    init = saved(tmp_path / "w.pth", {n: t * 0.5 for n, t in DeepLabV2(8, depth=50).state_dict().items()})
    settings = dataclasses.replace(TINY, network=dataclasses.replace(TINY.network, init=str(init)))
    train(settings, tmp_path / "whole")
    append = run_folder.append_history

    def interrupted(out, row):
        append(out, row)
        if row["step"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs, "append_history", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut")
    monkeypatch.undo()
    init.unlink()
    assert train(settings, tmp_path / "cut", resume=True)["resumed_from"] == [1]
    whole, cut = (
        torch.load(checkpoints.newest_checkpoint(tmp_path / run), weights_only=True)["stateful"]
        for run in ("whole", "cut")
    )
    for part in ("segmenter", "global alignment", "semantic alignment"):
        assert all(torch.equal(whole[part][name], tensor) for name, tensor in cut[part].items())
    assert whole["optimiser"]["param_groups"] == cut["optimiser"]["param_groups"]
    momenta = [state["optimiser"]["state"] for state in (whole, cut)]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], of["momentum_buffer"]) for i, of in momenta[1].items())
    for run in ("whole", "cut"):
        shutil.rmtree(tmp_path / run)


def test_running_statistics_are_for_evaluation(tmp_path, monkeypatch):
    evaluating, drawing = [], []
    evaluate, illustrate = train_module.evaluate, train_module.illustrate

    def evaluated(segmenter, *arguments, **options):
        evaluating.append(segmenter.training)
        return evaluate(segmenter, *arguments, **options)

    def illustrated(*arguments, before, after, **options):
        drawing.extend(segmenter.training for _, segmenter in (before, after))
        return illustrate(*arguments, before=before, after=after, **options)

    monkeypatch.setattr(train_module, "evaluate", evaluated)
    monkeypatch.setattr(train_module, "illustrate", illustrated)
    train(dataclasses.replace(TINY, steps=1, method="source-only", network=NetworkSettings(width=8)), tmp_path / "run")
    assert evaluating == drawing == [False, False]

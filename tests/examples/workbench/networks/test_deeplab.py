"""DeepLab-v2: counts, sizes and names against the papers', preprocessing by hand, and loading of weights."""

import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples.workbench.data.samples import image_tensor
from examples.workbench.errors import InputError
from examples.workbench.networks.deeplab import DeepLabV2, load_pretrained
from tests.errors import mentions, refuses


def resnet(blocks, *, counters=True):
    """Names and shapes of torchvision's ResNets with bottlenecks, from table 1 of the paper and not from our code."""

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
BACKBONE_50 = resnet(RESNET_50)
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


@pytest.mark.parametrize(("depth", "blocks", "count"), [(50, RESNET_50, 23_508_032), (101, RESNET_101, 42_500_160)])
def test_names_and_shapes_are_torchvisions_and_the_published_ones(depth, blocks, count):
    model = on_meta(19, depth=depth)
    assert sum(p.numel() for p in model.parameters()) == count + 4 * (2048 * 19 * 9 + 19)
    state = model.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == resnet(blocks) | head("layer5", 2048, 19)
    state = on_meta(19, depth=depth, auxiliary=True, freeze_batch_norm=True).state_dict()
    heads = head("layer5", 1024, 19) | head("layer6", 2048, 19)
    assert {name: tuple(t.shape) for name, t in state.items()} == resnet(blocks) | heads


@pytest.mark.parametrize("origin", ["torchvision", "caffe"])
@pytest.mark.parametrize(("size", "expected"), [((512, 1024), (65, 129)), ((720, 1280), (91, 161)), ((33, 47), (5, 7))])
def test_feature_sizes(origin, size, expected):
    for auxiliary in (False, True):
        output = on_meta(19, origin=origin, auxiliary=auxiliary)(torch.empty(1, 3, *size, device="meta"))
        assert output.features.shape == (1, 2048, *expected)
        assert output.logits.shape == (1, 19, *expected)
        assert (output.auxiliary is not None) == auxiliary
        assert not auxiliary or output.auxiliary.shape == (1, 19, *expected)


@pytest.mark.parametrize(("origin", "first"), [("torchvision", (1, 2)), ("caffe", (2, 4))])
def test_origins_differ_in_stride_and_dilation(origin, first):
    model = on_meta(2, origin=origin)
    strided = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    carrier = "layer2.0.conv2" if origin == "torchvision" else "layer2.0.conv1"
    assert strided == {"conv1", carrier, "layer2.0.downsample.0"}
    for stage, dilation, at_first in ((model.layer3, 2, first[0]), (model.layer4, 4, first[1])):
        assert [block.conv2.dilation[0] for block in stage] == [at_first] + [dilation] * (len(stage) - 1)


@torch.no_grad()
@pytest.mark.parametrize("origin", ["torchvision", "caffe"])
def test_dilated_features_hold_those_of_the_strided_network(origin):
    """The à trous algorithm: every fourth position has the features of the network as it was trained."""
    model = DeepLabV2(2, depth=50, origin=origin).eval()
    # Random statistics, so that batch norm changes something and keeps values of deep layers in range.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(1, 2)
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
    # A few roundings of float32 at the size of the values before the mean is subtracted.
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


def test_frozen_batch_norm_stays_as_it_is():
    model = DeepLabV2(2, depth=50, freeze_batch_norm=True)
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
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert "conv1.weight" in changed
    assert not changed & {f"{name}.{key}" for name, norm in norms.items() for key in norm.state_dict()}


def saved(path, state):
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def model():
    return DeepLabV2(5, depth=50)


def test_torchvision_weights_load_into_the_backbone(tmp_path):
    model = DeepLabV2(5, depth=101, origin="torchvision", freeze_batch_norm=True)
    random = {name: t.clone() for name, t in model.state_dict().items() if name.startswith("layer5")}
    state = filled(resnet(RESNET_101) | FC)
    loaded = load_pretrained(model, saved(tmp_path / "resnet101.pth", state))
    after = model.state_dict()
    for name, tensor in state.items():
        if name not in FC:
            assert torch.equal(after[name], tensor)
    assert all(torch.equal(after[name], tensor) for name, tensor in random.items())
    assert set(loaded.loaded) == resnet(RESNET_101).keys()
    assert set(loaded.missing) == head("layer5", 2048, 5).keys()
    assert set(loaded.left_over) == FC.keys()
    first, missing, left_over = str(loaded).splitlines()
    mentions(first, tmp_path / "resnet101.pth", 624, "torchvision", "RGB", "3x3")
    assert missing == "not loaded: " + ", ".join(head("layer5", 2048, 5))
    assert left_over == "in the file, not used: fc.weight, fc.bias"


@pytest.mark.parametrize("prefix", ["Scale.", "module.Scale."])
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
    mentions(first, "caffe", "BGR", "1x1", f"prefix {prefix}")
    assert (missing, left_over) == ("not loaded: 53 x num_batches_tracked", "in the file, not used: nothing")


def test_a_classifier_can_be_left_out(model, tmp_path):
    file = saved(tmp_path / "w.pth", filled(BACKBONE_50 | head("layer5", 2048, 21)))
    shapes = [5, 2048, 3, 3], [21, 2048, 3, 3]
    with refuses(InputError, "layer5.conv2d_list.0.weight", file, *shapes, "network.init_classifier false"):
        load_pretrained(model, file)
    loaded = load_pretrained(model, file, classifier=False)
    assert set(loaded.left_over) == set(loaded.missing) == head("layer5", 2048, 5).keys()
    assert torch.equal(model.state_dict()["conv1.weight"], torch.load(file, weights_only=True)["conv1.weight"])


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (without(BACKBONE_50, "bn1.running_var", "bn1.bias"), ("depth 50", "no bn1.bias", "1 more")),
        ({}, ("depth 50", "no conv1.weight", "264 more")),
        (resnet(RESNET_101), ("depth 50", "layer3.6.conv1.weight", "305 more")),
        (
            BACKBONE_50 | {"layer2.0.conv2.weight": (256, 256, 3, 3)},
            ("layer2.0.conv2.weight", [128, 128, 3, 3], [256, 256, 3, 3]),
        ),
        (
            BACKBONE_50 | without(head("layer5", 2048, 5), "layer5.conv2d_list.3.bias"),
            ("classifier", "no layer5.conv2d_list.3.bias"),
        ),
        ({f"module.{name}": shape for name, shape in BACKBONE_50.items()} | FC, ("no conv1.weight", "264 more")),
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


def halve(file):
    saved(file, filled(BACKBONE_50))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda f: saved(f, [torch.zeros(2)]), ("state dict", "list")),
        (lambda f: saved(f, {"state_dict": {"conv1.weight": torch.zeros(1)}}), ("dict under 'state_dict'",)),
        (lambda f: saved(f, {3: torch.zeros(1)}), ("state dict", "Tensor under 3")),
        (lambda f: saved(f, {"conv1.weight": Code()}), ("no code",)),
        (lambda f: f.write_bytes(pickle.dumps(Code(), protocol=2)), ("no code",)),
        (halve, ("no code",)),
        (lambda f: f.touch(), ("no code",)),
        (lambda f: None, ("network.init",)),
    ],
)
def test_files_that_are_no_state_dict(write, words, model, tmp_path, capsys):
    write(tmp_path / "w.pth")
    with refuses(InputError, tmp_path / "w.pth", *words):
        load_pretrained(model, tmp_path / "w.pth")
    assert "code" not in capsys.readouterr().out

"""Settings: ranges, rules between them, presets and files, and options that override them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from examples.workbench.data_settings import Data, Folder
from examples.workbench.errors import InputError
from examples.workbench.options import PRESETS, read_settings
from examples.workbench.plain import as_plain, flatten
from examples.workbench.settings import GlobalSettings, NetworkSettings, OptimiserSettings, SemanticSettings, Settings
from tests.errors import refuses

FOLDER = Folder("a", "b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labelled", "0"], ("labelled", 0)),
        (["--steps", "many"], ("steps", "many")),
        (["--seed", "-1"], ("seed", -1)),
        (["--method", "magic"], ("method", "oracle", "magic")),
        (["--speed", "9"], ("--speed",)),
        (["--accelerator", "abacus"], ("accelerator", "mps", "abacus")),
        (["--data.size", "[8,40]"], ("data.size", 32, 8)),
        (["--data.scenes.test", "0"], ("data.scenes.test", 0)),
        (["--data.scenes.severity.light", "2"], ("severity.light", "[0, 1]", 2.0)),
        (["--data.augmentation.flip", "2"], ("augmentation.flip", 1, 2)),
        (["--data.augmentation.scale", "[2,1]"], ("augmentation.scale", [2.0, 1.0])),
        (["--optimiser.learning_rate", "0"], ("optimiser.learning_rate", 0)),
        (["--semantic_alignment.weight", "nan"], ("semantic_alignment.weight", "nan")),
        (["--global_alignment.weight", "inf"], ("global_alignment.weight", "inf")),
        (["--semantic_alignment.start", "1.5"], ("semantic_alignment.start", 1, 1.5)),
        (["--semantic_alignment.hidden_channels", "[24,0]"], ("semantic_alignment.hidden_channels", 0)),
        (["--self_training.momentum", "1"], ("self_training.momentum", 1)),
        (["--preset", "none"], ("--preset", "gta5-cityscapes, idd-camvid", "none")),
        (["--config", "/none.yaml"], ("--config", "/none.yaml")),
        (["--preset", "idd-camvid", "--config", "x"], ("--preset", "--config", "idd-camvid", "x")),
    ],
)
def test_bad_options_are_named(arguments, words):
    with refuses(InputError, *words):
        read_settings(arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Folder("a", "b", "gta5", label_ending="_m.png"), ("label_ending", "index", "_m.png", "gta5")),
        (lambda: Folder("a", "b", "cityscapes", colours="map.txt"), ("colours", "index", "map.txt", "cityscapes")),
        (lambda: Folder("a", "b", label_ending=""), ("label_ending",)),
        (lambda: Folder("a", "b", colours={}), ("colours",)),
        (lambda: Folder("a", "b", colours={"belt": (0, 256, 0)}), ("colours", 255, "belt", [0, 256, 0])),
        (lambda: Folder("a", "b", colours={"belt": (0, -1, 0)}), ("colours", "belt", [0, -1, 0])),
        (lambda: Folder("a", "b", colours={"x": (1, 2, 3), "y": (1, 2, 3)}), ("[1, 2, 3]", "x and y")),
        (lambda: Data(ignore_index=3), ("data.ignore_index", 8, 255, 3)),
        (lambda: Data(classes=["a", "a"]), ("data.classes", ["a", "a"])),
        (lambda: Data(subsets={"some": ["tram"]}), ("data.subsets.some", "data.classes", ["tram"])),
        (lambda: Data(source_size=(32, 64)), ("data.source_size", "data.source", [32, 64])),
        (lambda: NetworkSettings(width=10), ("network.width", 8, 10)),
        (lambda: NetworkSettings(aspp_dilations=()), ("network.aspp_dilations",)),
        (lambda: NetworkSettings(init="x.pth"), ("network.init", "x.pth", "small")),
        (
            lambda: NetworkSettings(name="efficientnet-lite0", init="x.pth"),
            ("network.init", "x.pth", "efficientnet-lite0"),
        ),
        (lambda: NetworkSettings(pretrained=False), ("network.pretrained", "efficientnet-lite0", False, "small")),
        (
            lambda: NetworkSettings(name="segformer", output_stride=8),
            ("network.output_stride", "efficientnet-lite0", 8, "segformer"),
        ),
        (
            lambda: NetworkSettings(name="efficientnet-lite0", width=24),
            ("network.width", "small", 24, "efficientnet-lite0"),
        ),
        (lambda: NetworkSettings(origin="caffe"), ("network.origin", "deeplab-v2", "caffe", "small")),
        (lambda: Data(crop_endings=["_l", ""]), ("data.crop_endings", ["_l", ""])),
        (lambda: NetworkSettings(name="segformer", auxiliary=True), ("network.auxiliary", "deeplab-v2", "segformer")),
        (lambda: NetworkSettings(config="c.json"), ("network.config", "segformer", "c.json", "small")),
        (
            lambda: NetworkSettings(name="deeplab-v2", feature_layer="decoder"),
            ("network.feature_layer", "encoder", "decoder"),
        ),
        (
            lambda: SemanticSettings(conditioning="class-and-domain", objective="hinge"),
            ("semantic_alignment.objective", "class-and-domain", "hinge"),
        ),
        (lambda: SemanticSettings(conditioning="class-and-domain", r1=1.0), ("semantic_alignment", "r1", 1.0)),
        (lambda: Settings(optimiser=OptimiserSettings(decay_steps=799)), ("optimiser.decay_steps", 800, 799)),
        (
            lambda: Settings(
                data=Data(source=FOLDER, source_size=(32, 64)), global_alignment=GlobalSettings(against="both")
            ),
            ("data.source_size", "global_alignment.against both", [32, 64], [64, 96]),
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make, words):
    with refuses(ValueError, *words):
        make()


def test_options_override_the_file_which_overrides_the_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 5\nlabelled: 2\noptimiser: {batch_size: 3}\n")
    settings, options = read_settings(
        ["--labelled", "1", "--config", str(file), "--init", "w.pth", "--network.name", "deeplab-v2"]
    )
    assert (settings.steps, settings.labelled, settings.optimiser.batch_size, settings.seed) == (5, 1, 3, 0)
    assert settings.network.init == "w.pth"
    assert not options.resume
    file.write_text("stepz: 3\n")
    with refuses(InputError, "stepz", file):
        read_settings(["--config", str(file)])
    file.write_bytes(b"steps: 5 # \xff\n")
    with refuses(InputError, "--config", "UTF-8", file):
        read_settings(["--config", str(file)])


def test_parsed_settings_equal_those_made_in_python():
    """Also in type: a checkpoint cannot hold the number types that check the ranges."""
    arguments = ["--steps", "9", "--optimiser.weight_decay", "0.5", "--semantic_alignment.hidden_channels", "[24]"]
    settings, _ = read_settings(arguments)
    assert settings == Settings(
        steps=9,
        optimiser=OptimiserSettings(weight_decay=0.5),
        semantic_alignment=SemanticSettings(hidden_channels=(24,)),
    )
    assert {type(value) for value in flatten(as_plain(settings)).values()} <= {int, float, str, bool, list, type(None)}
    assert type(settings.steps) is int
    assert type(settings.optimiser.weight_decay) is float
    assert [type(width) for width in settings.semantic_alignment.hidden_channels] == [int]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_are_settings_and_plain_ones_read_back(preset, tmp_path):
    import yaml

    settings, _ = read_settings(["--preset", preset])
    assert settings.data.source is not None
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(as_plain(settings)))
    assert read_settings(["--config", str(file)])[0] == settings


def test_the_presets_of_the_paper_have_the_published_numbers():
    """Tsai et al. 2018 (arXiv 1802.10349), section 5.1 and its code."""
    for preset, classes in (("gta5-cityscapes", 19), ("synthia-cityscapes", 16)):
        settings, _ = read_settings(["--preset", preset])
        how, g = settings.optimiser, settings.global_alignment
        assert (how.name, how.learning_rate, how.classifier_factor, how.weight_decay) == ("sgd", 2.5e-4, 10.0, 5e-4)
        assert (how.power, how.decay_steps, settings.steps) == (0.9, 250_000, 150_000)
        assert (how.batch_size, how.unlabelled_batch_size) == (1, 1)
        assert (g.weight, g.auxiliary_weight, g.learning_rate, g.power, g.base_channels) == (
            0.001,
            0.0002,
            1e-4,
            0.9,
            64,
        )
        assert (settings.network.name, settings.network.depth, len(settings.data.classes)) == (
            "deeplab-v2",
            101,
            classes,
        )


def test_alignments_that_a_method_has():
    two_levels = NetworkSettings(name="deeplab-v2", auxiliary=True)
    for method, network, names in (
        ("joint", NetworkSettings(), []),
        ("global", NetworkSettings(), ["global"]),
        ("ass", two_levels, ["global", "auxiliary", "semantic"]),
    ):
        settings = Settings(method=method, network=network)
        assert list(settings.alignments) == names
        assert settings.segments_unlabelled is ("global" in names)
    without = Settings(global_alignment=GlobalSettings(weight=0, auxiliary_weight=0), network=two_levels)
    assert list(without.alignments) == ["semantic"]
    assert dataclasses.replace(without, method="oracle").alignments == {}
    assert Settings(network=two_levels).alignments["auxiliary"].weight == GlobalSettings().auxiliary_weight


@pytest.mark.slow
def test_training_needs_no_command_line():
    """Settings made in Python need no jsonargparse, which checks the ranges of those on the command line."""
    program = (
        "import sys\n"
        "sys.modules['jsonargparse'] = None\n"
        "import examples.workbench.training.train\n"
        "from examples.workbench.settings import Settings\n"
        "print(Settings(steps=3).steps)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        read_settings(["--help-all"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [name for name in flatten(as_plain(Settings())) if f"--{name}" not in shown] == []

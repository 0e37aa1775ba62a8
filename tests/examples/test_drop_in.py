"""examples/drop_in: each adds at most six lines that keep the promise of docs/drop-in.md; without them it is broken."""

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import semshift
from docs.pages import read_blocks
from examples.ass import to_tensor
from examples.drop_in.__main__ import diff, main, updated, versions
from examples.scenes import Scenes
from tests.errors import refuses

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {path.stem: path.read_text() for path in sorted((ROOT / "examples" / "drop_in").glob("[!_]*.py"))}
PAGE = (ROOT / "docs" / "drop-in.md").read_text()
NEEDS = {"lightning_module": ("lightning",), "segformer": ("accelerate", "transformers")}
# Those with an alignment module. Two import their framework for seconds.
LOOPS = [pytest.param(name, marks=pytest.mark.slow if name in NEEDS else ()) for name in PROGRAMS if name != "pipeline"]
# The frameworks warn of things that are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default")


def program(name, *edits, source=None):
    """A program as a module, with edits to its source."""
    for needed in NEEDS.get(name, ()):
        pytest.importorskip(needed)
    source = source or PROGRAMS[name]
    for old, new in edits:
        assert re.search(old, source)
        source = re.sub(old, new, source)
    module = types.ModuleType(name)
    module.__file__ = f"{name}.py"
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def values(log):
    """All figures of a log in one tensor."""
    return torch.stack([figure for row in log for figure in row.values()])


def apart(module, model):
    """The mean distance between the domains' prototypes on images that were not trained on."""
    torch.manual_seed(5)
    model.eval()
    means = []
    with torch.no_grad():
        for domain in ("source", "target"):
            images, labels = module.load(domain, 64)
            means.append(semshift.class_sums(module.features(model, images), labels, module.CLASSES).means)
    return semshift.prototype_distance(*means).mean().item()


def outcome(module):
    """Mean accuracy of the discriminator over the last twenty of a hundred steps, and the distance."""
    model, log = module.train()
    rows = [torch.stack([row["source_accuracy"], row["target_accuracy"]]) for row in log[-20:]]
    return torch.stack(rows).nanmean().item() if rows else None, apart(module, model)


def holds(found, distance_without):
    """What docs/drop-in.md promises."""
    accuracy, distance = found
    return accuracy is not None and accuracy < 0.8 and distance < 0.75 * distance_without


@pytest.mark.parametrize("name", PROGRAMS)
def test_at_most_six_lines(name):
    added = [line for line in diff(PROGRAMS[name]).splitlines() if line.startswith("+")]
    # The hook takes two more, as the page says.
    assert 0 < len(added) <= (8 if name == "hook" else 6)
    # The discriminator's optimiser is among them.
    assert name == "pipeline" or any("align.parameters()" in line and '"lr"' in line for line in added)
    # Nothing of ours is left without them.
    assert "semshift." not in re.sub(r"`.*?`", "", versions(PROGRAMS[name])[0])


def test_the_page_shows_the_programs():
    assert re.findall(r"<!-- diff of (\w+)\.py", PAGE) != []
    assert set(re.findall(r"<!-- diff of (\w+)\.py", PAGE)) == set(PROGRAMS)
    assert set(re.findall(r"examples/drop_in/(\w+)\.py>", PAGE)) == set(PROGRAMS)
    # To fix it: python -m examples.drop_in --write docs/drop-in.md
    assert updated(PAGE) == PAGE


def test_write(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("+import semshift\n", ""))
    monkeypatch.setattr(sys, "argv", ["drop_in", "--write", str(page)])
    main()
    assert page.read_text() == PAGE
    monkeypatch.setattr(sys, "argv", ["drop_in"])
    main()
    assert capsys.readouterr().out.count("+import semshift\n") == len(PROGRAMS)


def test_lightning_optimises_automatically():
    code = PROGRAMS["lightning_module"]
    assert "automatic_optimization" not in code
    assert "manual_backward" not in code
    assert code.count("torch.optim.") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_figures_after_a_hundred_steps(name):
    without = outcome(program(name, source=versions(PROGRAMS[name])[0]))
    assert holds(outcome(program(name)), without[1])
    # The same judgement finds what is missing: all lines, or the term of one player.
    assert not holds(without, without[1])
    for term in ("confusion", "discriminator"):
        missing = program(name, (rf"losses\.{term}\b", f"losses.{term}.detach()"))
        assert not holds(outcome(missing), without[1]), term


@pytest.mark.parametrize("library", ["segmentation-models-pytorch", "mmsegmentation"])
def test_hooks_of_the_other_libraries(library):
    module = program("hook")
    model, log = module.train(2, library)
    assert len(log) == 2
    assert dict(model.named_modules())[module.LAYER[library]] is model.get_submodule(module.LAYER[library])
    assert f"`{module.LAYER[library]}`" in PAGE


def reaching(*edits, steps):
    """Train the hook's program with edits; its figures, and whether the term reached the student at each step."""
    reach = r"reached.append(torch.autograd.grad(losses.confusion, layer.parameters(), retain_graph=True))"
    module = program("hook", *edits, (r"( +)(losses = align\(.*)", rf"\1\2\n\1{reach}"))
    module.copy, module.checkpoint, module.reached = copy, checkpoint, []
    _, log = module.train(steps)
    return values(log), [all(gradient.any() for gradient in gradients) for gradients in module.reached]


TEACHERS = {
    "deepcopy": "copy.deepcopy(model)",
    "average": "torch.optim.swa_utils.AveragedModel(model)",
    "copy of DataParallel": "copy.deepcopy(torch.nn.DataParallel(model))",
}
# A line of the program, and what stands before it.
MADE = {
    "before the hook": (r"( +)(layer = .*)", r"\1teacher = TEACHER\n"),
    "before the first step": (r"( +)(for step in range\(steps\):)", r"\1teacher = TEACHER\n"),
    "in the first step": (r"( +)(losses = align\(.*)", r"\1if step == 0: teacher = TEACHER\n"),
    "after ten steps": (r"( +)(images_s, labels_s = .*)", r"\1if step in (0, 10): teacher = TEACHER\n"),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_teacher_that_runs_before_pooling(teacher, made):
    """Even with a graph of its own, and between the two domains: the term reaches the student."""
    where, line = MADE[made]
    _, reached = reaching(
        (where, line.replace("TEACHER", TEACHERS[teacher]) + r"\1\2"),
        (r"( +)(losses = align\(.*)", r"\1teacher(images_s); teacher(images_t)\n\1\2"),
        (r"( +)(images_t, labels_t = .*)", r"\1if step > 0: teacher(images_s)\n\1\2"),
        steps=12,
    )
    assert reached == [True] * 12


def test_a_hook_in_data_parallel():
    """Without several devices it runs the network itself; where it runs replicas, nothing is kept, and that raises."""
    wrapped = (r"( +)(model: Any = .*)\n", r"\1\2\n\1whole = torch.nn.DataParallel(model)\n")
    runs = (r"\(model\((\w+)\), ", r"(whole(\1), ")
    _, log = program("hook", wrapped, runs).train(2)
    assert values(log).isfinite().all()
    # In a replica the layer is another module.
    replica = (r"(layer = .*)\n", r"\1\n    model.backbone.layer4 = layer._replicate_for_data_parallel()\n")
    with pytest.raises(IndexError, match="deque index out of range"):
        program("hook", replica).train(1)
    assert "`deque index out of range`" in (ROOT / "docs" / "your-loop.md").read_text()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_hook_under_activation_checkpointing(reentrant):
    """As the page says: `use_reentrant=False`. The other kind runs the layer without a graph, which raises."""
    edit = (
        r"self\.backbone\(images\)\[-1\]\), images",
        f"checkpoint(lambda x: self.backbone(x)[-1], images, use_reentrant={reentrant})), images",
    )
    if reentrant:
        with refuses(ValueError, "target_features", "torch.no_grad"):
            reaching(edit, steps=1)
        return
    found, reached = reaching(edit, steps=3)
    torch.testing.assert_close(found, values(program("hook").train(3)[1]))
    assert reached == [True] * 3


OWN = "torch.no_grad()(torch.func.functional_call)(model, dict(model.named_parameters()), (torch.zeros(4, 3, 32, 48),))"


@pytest.mark.parametrize("first", [True, False])
def test_a_teacher_of_the_students_own_modules(first):
    """docs/your-loop.md: it must run before the network does. Last, it raises."""
    line = r"images_s, labels_s = .*" if first else r"losses = align\("
    edit = (rf"( +)({line})", rf"\1{OWN}\n\1\2")
    if first:
        found, reached = reaching(edit, steps=3)
        torch.testing.assert_close(found, values(program("hook").train(3)[1]))
        assert reached == [True] * 3
    else:
        with refuses(ValueError, "target_features", "torch.no_grad"):
            reaching(edit, steps=1)


def test_align_corners_matches_the_up_sampling():
    """Class means are those of up-sampled features; with the other setting, off by what the page says."""
    module = program("adaptsegnet")
    model, _ = module.train(10)
    images, labels = module.load("target", 8)
    with torch.no_grad():
        maps, features = model(images)[1], module.features(model, images)
        (used,) = re.findall(r"semshift\.SemanticAlignment\(.*(align_corners=\w+)\)", PROGRAMS["adaptsegnet"])
        up = torch.nn.functional.interpolate(features, labels.shape[1:], mode="bilinear", align_corners=True)
        torch.testing.assert_close(model.main(up), maps)
    expected = torch.stack([up.movedim(1, -1)[labels == k].mean(0) for k in range(4)])
    means = [semshift.class_sums(features, labels, 4, align_corners=aligned).means for aligned in (True, False)]
    assert used == "align_corners=True"
    torch.testing.assert_close(means[0], expected)
    off = ((means[1] - expected).norm() / expected.norm()).item()
    assert 100 * off == pytest.approx(float(re.search(r"means are (\d+) % off", PAGE)[1]), abs=2)


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="because a compiled hook keeps nothing there")
def test_a_hook_under_torch_compile():
    compiled = (
        r"( +)(layer\.register_forward_hook.*)\n",
        r"\1\2\n\1model = torch.compile(model, backend='aot_eager')\n",
    )
    expected, found = (program("hook", *edits).train(3)[1] for edits in ((), (compiled,)))
    torch.testing.assert_close(values(found), values(expected))


def rows_of(title):
    """The cells of a table of the page."""
    table = PAGE[PAGE.index(title) :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def models_of(library, names):
    """The models of a row, where the library is installed."""
    if library == "torchvision":
        networks = pytest.importorskip("torchvision.models.segmentation", exc_type=ImportError)
        return [getattr(networks, name)(weights=None, weights_backbone=None) for name in names]
    if library == "segmentation-models-pytorch":
        networks = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
        encoders = "resnet50", "mobilenet_v2", "tu-resnet18"
        return [getattr(networks, name)(encoder, encoder_weights=None) for name in names for encoder in encoders]
    if library == "timm":
        return [pytest.importorskip("timm").create_model("resnet18", features_only=True, pretrained=False)]
    pytest.skip(f"{library} has no clean install")


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_of("| library | model |"), ids=lambda row: row[1])
def test_layers_of_the_real_libraries(row):
    """Each model of a row has that layer, and its map has that width and stride."""
    library, names, layer, taken, width, stride = row
    for model in models_of(library, re.findall(r"`(\w+)`", names)):
        kept = []
        at = model if layer == "the model itself" else model.get_submodule(layer.strip("`"))
        at.register_forward_hook(lambda m, _, out, kept=kept: kept.append(out if taken == "`out`" else out[-1]))
        model.eval()(torch.randn(2, 3, 64, 96))
        channels = eval(width.strip("`"), {"model": model})
        assert list(kept[0].shape) == [2, channels, 64 // int(stride), 96 // int(stride)]


def same(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


@pytest.mark.slow
def test_pipeline_draws_evenly_and_resumes():
    module = program("pipeline")
    whole, seen = module.train(100)
    assert all(times.max() - times.min() <= 1 for times in seen.values())
    assert {domain: int(times.sum()) for domain, times in seen.items()} == {
        "source": 200,
        "labelled": 100,
        "unlabelled": 200,
    }
    assert same(whole, module.train(100, module.train(60)[0])[0])
    # The loaders that it replaces do not resume where they were.
    before = program("pipeline", source=versions(PROGRAMS["pipeline"])[0])
    assert not same(before.train(100)[0], before.train(100, before.train(60)[0])[0])


# What newcomers do: an edit of the source, and what the error must say.
SOURCE_LABELS = r'(align\(.*?, )(labels_s|batch_s\["labels"\])'
TARGET_FEATURES = r"(align\([^,]+, [^,]+, [^,]+)"
MISTAKES = {
    "another width": (
        (r"SemanticAlignment\((CHANNELS|32)", "SemanticAlignment(8"),
        ("source_features", "[B, 8, h, w]", "32, 8, 12]"),
    ),
    "more than 255 classes": (
        (r"(SemanticAlignment\(\w+, )CLASSES", r"\g<1>300"),
        ("ignore_index", "255", "300"),
    ),
    "half precision": (
        (r"(SemanticAlignment\(.*?\))", r"\1.bfloat16()"),
        ("discriminator", "float32", "torch.bfloat16", ".float()"),
    ),
    "transposed labels": ((SOURCE_LABELS, r"\1\2.mT"), ("source", "48, 32]", "8, 12]")),
    "labels of other ids": ((SOURCE_LABELS, r"\g<1>7 + 0 * \2"), ("source", "labels", "[0, 4)", "255", "7 (")),
    "detached target features": ((TARGET_FEATURES, r"\1.detach()"), ("target_features", "detached")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", LOOPS)
def test_mistakes_are_named(name, mistake):
    edit, words = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError)) as error:
        program(name, edit).train(2)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOOPS)
def test_half_precision_under_autocast(name, dtype):
    with torch.autocast("cpu", dtype=dtype):
        _, log = program(name).train(4)
    assert values(log).isfinite().all()


@pytest.mark.parametrize("name", LOOPS)
def test_a_model_in_eval(name):
    # The line in which the model is there.
    edit = (r"( +)(model: Any = .*|model = Se.*|module = .*)\n", r"\1\2\n\1(locals().get('model') or module).eval()\n")
    _, log = program(name, edit).train(4)
    assert values(log).isfinite().all()


# Lightning casts the whole module: test_lightning_in_bfloat16.
@pytest.mark.parametrize("name", [loop for loop in LOOPS if loop.values != ("lightning_module",)])
def test_a_model_in_bfloat16_beside_the_alignment(name):
    edits = [
        (r"( +)(model: Any = .*|model = Se.*)\n", r"\1\2\n\1model.bfloat16()\n"),
        (r"return \(images if", "images = images.bfloat16()\n    return (images if"),
    ]
    if "discriminators[" in PROGRAMS[name]:
        # Their own discriminators, over maps in bfloat16.
        edits.append((r"nn\.Sequential\(\*layers\[:-1\]\)", "nn.Sequential(*layers[:-1]).bfloat16()"))
    _, log = program(name, *edits).train(4)
    assert values(log).isfinite().all()


@pytest.mark.slow
def test_lightning_in_bfloat16():
    """As the page says: the alignment must be cast back."""
    with pytest.raises(TypeError, match=r"float32.*torch\.bfloat16.*\.float\(\)"):
        program("lightning_module").train(2, precision="bf16-true")
    hook = r"    def on_fit_start(self):\n        self.align.float()\n\n\1"
    _, log = program("lightning_module", (r"(    def configure_optimizers)", hook)).train(2, precision="bf16-true")
    assert values(log).isfinite().all()


@pytest.mark.parametrize("name", LOOPS)
def test_a_target_without_labels(name):
    """Nothing is compared: the figures are NaN, and the network still learns from the source."""
    edit = (
        r"( +)return \(images if domain",
        r"\1labels = labels if domain == 'source' else torch.full_like(labels, 255)\n\1return (images if domain",
    )
    safe = (r"F\.cross_entropy\(", "(lambda maps, y: F.cross_entropy(maps, y.where(y < 255, 0)))(")
    edits = [edit] if name == "segformer" else [edit, safe]
    model, log = program(name, *edits).train(2)
    assert values(log).isnan().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def edited(code, *edits):
    """The code with each edit made exactly once."""
    for old, new in edits:
        code, count = re.subn(old, new, code)
        assert count == 1
    return code


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_by_hand_equals_the_module(per_image, align_corners):
    """docs/by-hand.md: after all steps of its block every parameter has the same bits as with the module."""
    (block,) = (b for b in read_blocks(ROOT / "docs" / "by-hand.md") if b.language == "python")
    code = block.code
    if per_image:
        # What the page says to change.
        code = edited(
            code,
            (r"(class_sums\(features_s, labels_s, 4)", r"\1, per_image=True"),
            (r"(class_sums\(features_t, labels_t, 4)", r"\1, per_image=True"),
            (r"(seen_s \| source\.present)", r"\1.any(0)"),
            (r"(seen_t \| target\.present)", r"\1.any(0)"),
        )
    if align_corners:
        code = edited(code, *((rf"(class_sums\(features_{d}, labels_{d}, 4)", r"\1, align_corners=True") for d in "st"))
    options = f"per_image={per_image}, align_corners={align_corners}"
    module = f"align = semshift.SemanticAlignment(32, 4, {options})\ndiscriminator = align.discriminator"
    call = "    losses = align(features_s, labels_s, features_t, labels_t)\n"
    with_module = edited(
        block.code,
        (r"discriminator = semshift\.PrototypeDiscriminator\(32, 4\)", module),
        (r" +source = (?:.*\n)*? +for_discriminator = .*\n", call),
        (r"\* confusion \+ for_discriminator", "* losses.confusion + losses.discriminator"),
    )
    assert "class_sums" not in with_module
    by_hand, by_module = {}, {}
    exec(compile(code, "by-hand.md", "exec"), by_hand)
    exec(compile(with_module, "by-hand.md with the module", "exec"), by_module)
    assert torch.equal(torch.stack([by_hand["seen_s"], by_hand["seen_t"]]), by_module["align"].seen)
    for name in ("backbone", "head", "discriminator"):
        pairs = zip(by_hand[name].parameters(), by_module[name].parameters())
        assert all(torch.equal(one, other) for one, other in pairs), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_rule_for_the_weight(precision):
    """AdaptSegNet's loop on the built-in scenes, the weight and the rate by docs/schedules.md: no warning."""
    scenes = {domain: Scenes(domain, "train", 100, seed=0) for domain in ("source", "target")}

    def load(domain):
        scene = scenes[domain][int(torch.randint(100, ()))]
        return to_tensor(scene.image)[None], torch.from_numpy(scene.label).long()[None]

    def kinds(weight):
        history = []

        def weight_of(loss, losses, features):
            chosen = weight(loss, losses.confusion, features)
            norms = [semshift.gradient_norm(term, features) for term in (losses.confusion, loss)]
            history.append({**losses.figures, "gradient_ratio": chosen * norms[0] / norms[1]})
            return chosen

        module = program(
            "adaptsegnet",
            (r"CLASSES, CHANNELS = 4,", "CLASSES, CHANNELS = 8,"),
            (r"0\.03 \* losses\.confusion", "weight_of(loss, losses, maps_l[-1]) * losses.confusion"),
            (r'"lr": 3e-3', '"lr": 1e-4'),
        )
        module.load, module.weight_of = load, weight_of
        # Around a whole loop a cache of cast weights would outlive the steps.
        half = precision == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            module.train(300)
        return [warning.split(":")[0] for warning in semshift.health_warnings(history[-30:])]

    assert kinds(lambda *terms: semshift.balanced_weight(*terms, 0.1)) == []
    # A number from elsewhere is warned of.
    assert "silent" in kinds(lambda *_: 1e-6)

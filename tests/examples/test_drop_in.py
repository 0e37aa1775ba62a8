"""examples/drop_in: each program adds at most six lines (a hook eight), and keeps the promise of docs/drop-in.md."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import semshift
from docs.pages import read_blocks
from examples.ass import to_tensor
from examples.drop_in.__main__ import diff, main, updated, versions
from examples.scenes import Scenes

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {path.stem: path.read_text() for path in sorted((ROOT / "examples" / "drop_in").glob("[!_]*.py"))}
FILES = [ROOT / "docs" / "drop-in.md", ROOT / "docs" / "other-loops.md"]
PAGES = [file.read_text() for file in FILES]
NEEDS = {"lightning_module": ("lightning",), "segformer": ("accelerate", "transformers")}
# The programs with an alignment module. Two of them import their framework for seconds.
LOOPS = [pytest.param(name, marks=pytest.mark.slow if name in NEEDS else ()) for name in PROGRAMS if name != "pipeline"]
# The frameworks' own warnings are not ours to fix.
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
    """The promise of docs/drop-in.md."""
    accuracy, distance = found
    return accuracy is not None and accuracy < 0.8 and distance < 0.75 * distance_without


@pytest.mark.parametrize("name", PROGRAMS)
def test_at_most_six_lines(name):
    added = [line for line in diff(PROGRAMS[name]).splitlines() if line.startswith("+")]
    # The hook needs two more, as the page says.
    assert 0 < len(added) <= (8 if name == "hook" else 6)
    # The discriminator's optimiser is among them.
    groups = [line for line in added if "align.parameters()" in line and '"lr"' in line]
    assert name == "pipeline" or len(groups) == 1
    # Without them the program has no semshift.
    assert "semshift." not in re.sub(r"`.*?`", "", versions(PROGRAMS[name])[0])


def test_the_pages_show_the_programs():
    for pattern in (r"<!-- diff of (\w+)\.py", r"examples/drop_in/(\w+)\.py>"):
        assert sorted(name for page in PAGES for name in re.findall(pattern, page)) == sorted(PROGRAMS)
    # To fix it: python -m examples.drop_in --write docs/drop-in.md docs/other-loops.md
    assert [updated(page) for page in PAGES] == PAGES


def test_write(tmp_path, monkeypatch, capsys):
    copies = [tmp_path / file.name for file in FILES]
    for file, page in zip(copies, PAGES):
        assert "+import semshift\n" in page
        file.write_text(page.replace("+import semshift\n", ""))
    monkeypatch.setattr(sys, "argv", ["drop_in", "--write", *map(str, copies)])
    main()
    assert [file.read_text() for file in copies] == PAGES
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
    # The same check fails without the lines, and without either loss.
    assert not holds(without, without[1])
    for term in ("confusion", "discriminator"):
        missing = program(name, (rf"losses\.{term}\b", f"losses.{term}.detach()"))
        assert not holds(outcome(missing), without[1]), term


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
    # The cycled loaders do not resume where they stopped.
    before = program("pipeline", source=versions(PROGRAMS["pipeline"])[0])
    assert not same(before.train(100)[0], before.train(100, before.train(60)[0])[0])


# Common mistakes: an edit of the source, and the words that the error must contain.
SOURCE_LABELS = r"(align\(.*?, )(labels_s)"
TARGET_FEATURES = r"(align\([^,]+, [^,]+, [^,]+)"
MISTAKES = {
    "a wrong width": (
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
    "labels with wrong ids": ((SOURCE_LABELS, r"\g<1>7 + 0 * \2"), ("source", "labels", "[0, 4)", "255", "7 (")),
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
    # The line that makes the model.
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
        # The loop's own discriminators take maps in bfloat16.
        edits.append((r"nn\.Sequential\(\*layers\[:-1\]\)", "nn.Sequential(*layers[:-1]).bfloat16()"))
    _, log = program(name, *edits).train(4)
    assert values(log).isfinite().all()


@pytest.mark.slow
def test_lightning_in_bfloat16():
    """The alignment must be cast back, as the page says."""
    with pytest.raises(TypeError, match=r"float32.*torch\.bfloat16.*\.float\(\)"):
        program("lightning_module").train(2, precision="bf16-true")
    hook = r"    def on_fit_start(self):\n        self.align.float()\n\n\1"
    _, log = program("lightning_module", (r"(    def configure_optimizers)", hook)).train(2, precision="bf16-true")
    assert values(log).isfinite().all()


@pytest.mark.parametrize("name", LOOPS)
def test_a_target_without_labels(name):
    """No class is compared: the figures are NaN, and the network still learns from the source."""
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
    """The code after the edits. Each must match exactly once."""
    for old, new in edits:
        code, count = re.subn(old, new, code)
        assert count == 1
    return code


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_by_hand_equals_the_module(per_image, align_corners):
    """docs/by-hand.md: after all steps of its block every parameter equals that of the module, bit for bit."""
    (block,) = (b for b in read_blocks(ROOT / "docs" / "by-hand.md") if b.language == "python")
    code = block.code
    if per_image:
        # The changes that the page names.
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
        (r" +source = (?:.*\n)*? +for_discriminator = (?:.*\n)+? +\)\n", call),
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
    """AdaptSegNet's loop on the built-in scenes, with the weight and the rate of docs/schedules.md: no warning."""
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
        # autocast surrounds the whole loop here, so its cache of cast weights would outlive the steps.
        half = precision == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            module.train(300)
        return [warning.split(":")[0] for warning in semshift.health_warnings(history[-30:])]

    assert kinds(lambda *terms: semshift.balanced_weight(*terms, 0.1)) == []
    # A weight that is far too small gives a warning.
    assert "silent" in kinds(lambda *_: 1e-6)

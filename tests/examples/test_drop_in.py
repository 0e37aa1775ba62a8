"""examples/drop_in: each adds at most ten lines, which do what docs/drop-in.md promises; without them it is not so."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from examples.drop_in.__main__ import diff, main, updated, versions
from semshift.health import prototype_distance
from semshift.pooling import class_sums

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {path.stem: path.read_text() for path in sorted((ROOT / "examples" / "drop_in").glob("[!_]*.py"))}
PAGE = (ROOT / "docs" / "drop-in.md").read_text()
NEEDS = {"lightning_module": ("lightning",), "segformer": ("accelerate", "transformers")}
# Those that train with a critic. Two import their framework for seconds.
LOOPS = [pytest.param(name, marks=pytest.mark.slow if name in NEEDS else ()) for name in PROGRAMS if name != "pipeline"]
# Libraries under the loops warn of things that are not ours to mend.
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


def apart(module, model):
    """The mean distance between the domains' prototypes on images that were not trained on."""
    torch.manual_seed(5)
    model.eval()
    means = []
    with torch.no_grad():
        for domain in ("source", "target"):
            images, labels = module.load(domain, 64)
            pooled = class_sums(module.features(model, images), labels, module.CLASSES, resample="bilinear")
            means.append(pooled.means)
    return prototype_distance(*means).mean().item()


def figures(module):
    """Mean accuracy of the critic over the last twenty of a hundred steps, and the distance."""
    model, log = module.train()
    right = sum(source + target for source, target, _ in log[-20:]) / 40 if log else None
    return right, apart(module, model)


def holds(found, distance_without):
    """What docs/drop-in.md promises."""
    right, distance = found
    return right is not None and right < 0.8 and distance < 0.75 * distance_without


@pytest.mark.parametrize("name", PROGRAMS)
def test_at_most_ten_lines(name):
    lines = diff(PROGRAMS[name]).splitlines()
    assert 0 < sum(line.startswith("+") for line in lines) <= 10
    # Nothing of ours is left without them.
    assert "semshift." not in re.sub(r"`.*?`", "", versions(PROGRAMS[name])[0])


def test_the_page_shows_the_programs():
    assert re.findall(r"<!-- diff of (\w+)\.py", PAGE) != []
    assert set(re.findall(r"<!-- diff of (\w+)\.py", PAGE)) == set(PROGRAMS)
    assert set(re.findall(r"examples/drop_in/(\w+)\.py>", PAGE)) == set(PROGRAMS)
    # To mend it: python -m examples.drop_in --write docs/drop-in.md
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


def test_the_check_is_that_of_the_programs():
    """The page's three lines are those that the loops end with."""
    (block,) = re.findall(r"^```diff\n(\+accuracy.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    block = re.sub(r"^\+", "", block, flags=re.MULTILINE)
    for name in ("adaptsegnet", "reversal", "hook", "segformer"):
        lines = [line.strip() for line in PROGRAMS[name].splitlines() if line.endswith("  # check")]
        assert [line.removesuffix("  # check") for line in lines] == block.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_figures_after_a_hundred_steps(name):
    before, _ = versions(PROGRAMS[name])
    without = figures(program(name, source=before))
    assert holds(figures(program(name)), without[1])
    # The same judgement sees what is missing: all lines, what the network learns by, what the critic learns by.
    assert not holds(without, without[1])
    for missing in (
        r" +loss.* = .*confusion_loss.*\n| +loss \+= .*confusion_loss.*\n",
        r" +loss.*discriminator_loss.*\n",
    ):
        if "confusion" in missing and "confusion_loss" not in PROGRAMS[name]:
            missing = r"semshift\.losses\.reverse_gradient\((target\.means), scale=\S+?\)"
            without_it = program(name, (missing, r"\1.detach()"))
        else:
            without_it = program(name, (missing, "\n"))
        assert not holds(figures(without_it), without[1])


@pytest.mark.parametrize("library", ["segmentation-models-pytorch", "mmsegmentation"])
def test_hooks_of_the_other_libraries(library):
    module = program("hook")
    model, log = module.train(2, library)
    assert len(log) == 2
    assert dict(model.named_modules())[module.LAYER[library]] is model.get_submodule(module.LAYER[library])
    assert f"`{module.LAYER[library]}`" in PAGE


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
    # The loaders that it replaces do not go on where they were.
    before = program("pipeline", source=versions(PROGRAMS["pipeline"])[0])
    assert not same(before.train(100)[0], before.train(100, before.train(60)[0])[0])


# What newcomers feed them: an edit of the source, and the message.
MISTAKES = {
    "no resample": (
        (r', resample="bilinear"', ""),
        "expected labels of the features' size [8, 12] or a resample such as 'bilinear' or 'nearest', got labels [",
    ),
    "labels of other ids": (
        (r"torch\.randint\(0, CLASSES, (.*?)\)\.", r"(7 + torch.randint(0, CLASSES, \1))."),
        "expected labels in [0, 4) or ignore_index 255, got 7 (",
    ),
    "a critic of another width": (
        (r"PrototypeDiscriminator\((CHANNELS|32)", "PrototypeDiscriminator(8"),
        "expected prototypes [..., 4, 8], got [4, 32]",
    ),
    "more than 255 classes": (
        (r"check_labels\(labels, CLASSES", "check_labels(labels, 300"),
        "expected an explicit ignore_index (None, or an id that is no class) with more than 255 classes, got 255 with",
    ),
    "a critic in bfloat16": (
        (r"(PrototypeDiscriminator\(.*?\))", r"\1.bfloat16()"),
        "expected a discriminator in float32, which it is to stay in, got torch.bfloat16; call its .float()",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", LOOPS)
def test_mistakes_are_told(name, mistake):
    edit, message = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        program(name, edit).train(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOOPS)
def test_half_precision_under_autocast(name, dtype):
    with torch.autocast("cpu", dtype=dtype):
        _, log = program(name).train(4)
    assert torch.tensor(log).isfinite().all()


@pytest.mark.parametrize("name", LOOPS)
def test_a_model_in_eval(name):
    # The line in which the model is there.
    edit = (r"( +)(model: Any = .*|model = Se.*|module = .*)\n", r"\1\2\n\1(locals().get('model') or module).eval()\n")
    _, log = program(name, edit).train(4)
    assert torch.tensor(log).isfinite().all()


# Lightning casts the whole module: test_lightning_in_bfloat16.
@pytest.mark.parametrize("name", [loop for loop in LOOPS if loop.values != ("lightning_module",)])
def test_a_model_in_bfloat16_but_for_the_critic(name):
    edits = [
        (r"( +)(model: Any = .*|model = Se.*)\n", r"\1\2\n\1model.bfloat16()\n"),
        (r"return \(images if", "images = images.bfloat16()\n    return (images if"),
    ]
    if "critics[" in PROGRAMS[name]:
        # Their own discriminators, over maps in bfloat16.
        edits.append((r"nn\.Sequential\(\*layers\[:-1\]\)", "nn.Sequential(*layers[:-1]).bfloat16()"))
    _, log = program(name, *edits).train(4)
    assert torch.tensor(log).isfinite().all()


@pytest.mark.slow
def test_lightning_in_bfloat16():
    """As the page says: the critic is to be brought back."""
    message = "expected a discriminator in float32, which it is to stay in, got torch.bfloat16; call its .float()"
    with pytest.raises(TypeError, match=re.escape(message)):
        program("lightning_module").train(2, precision="bf16-true")
    hook = r"    def on_fit_start(self):\n        self.critics['semantic'].float()\n\n\1"
    _, log = program("lightning_module", (r"(    def configure_optimizers)", hook)).train(2, precision="bf16-true")
    assert torch.tensor(log).isfinite().all()


@pytest.mark.parametrize("name", LOOPS)
def test_a_target_without_labels(name):
    """Nothing takes part: the figures are nan, and the network learns on from the source."""
    edit = (
        r"( +)return \(images if domain",
        r"\1labels = labels if domain == 'source' else torch.full_like(labels, 255)\n\1return (images if domain",
    )
    safe = (r"F\.cross_entropy\(", "(lambda maps, y: F.cross_entropy(maps, y.where(y < 255, 0)))(")
    edits = [edit] if name == "segformer" else [edit, safe]
    _, log = program(name, *edits).train(2)
    assert torch.tensor(log).isnan().all()

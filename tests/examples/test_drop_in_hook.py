"""The hook of docs/drop-in.md: other libraries' layers, copies and teachers, compilation and checkpointing."""

import copy
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import semshift
from tests.errors import refuses
from tests.examples.test_drop_in import PAGE, PROGRAMS, ROOT, program, values

# The frameworks warn of things that are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default")


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
    assert library == "timm"
    return [pytest.importorskip("timm").create_model("resnet18", features_only=True, pretrained=False)]


def marked(row):
    """A row of the table, skipped where its library needs an older PyTorch than ours."""
    old = row[0] not in ("torchvision", "segmentation-models-pytorch", "timm")
    reason = f"because {row[0]} cannot be installed beside a current PyTorch"
    return pytest.param(row, marks=pytest.mark.skipif(old, reason=reason), id=row[1])


@pytest.mark.slow
@pytest.mark.parametrize("row", [marked(row) for row in rows_of("| library | model |")])
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

"""The forward hook of docs/other-loops.md: layers of real libraries, copies, teachers, compilation, checkpointing."""

import copy
import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import semshift
from tests.errors import refuses
from tests.examples.test_drop_in import PAGES, PROGRAMS, ROOT, program, values

PAGE, OTHER = PAGES

# The frameworks' own warnings are not ours to fix.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("library", ["segmentation-models-pytorch", "mmsegmentation"])
def test_hooks_of_the_other_libraries(library):
    module = program("hook")
    model, log = module.train(2, library)
    assert len(log) == 2
    assert dict(model.named_modules())[module.LAYER[library]] is model.get_submodule(module.LAYER[library])
    assert f"`{module.LAYER[library]}`" in OTHER


def reaching(*edits, steps):
    """Train the hook's program with edits. Returns its figures, and whether the loss reached the student."""
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
# A line of the program, and the edit that makes the teacher before it.
MADE = {
    "before the hook": (r"( +)(layer = .*)", r"\1teacher = TEACHER\n"),
    "before the first step": (r"( +)(for step in range\(steps\):)", r"\1teacher = TEACHER\n"),
    "in the first step": (r"( +)(losses = align\(.*)", r"\1if step == 0: teacher = TEACHER\n"),
    "after ten steps": (r"( +)(images_s, labels_s = .*)", r"\1if step in (0, 10): teacher = TEACHER\n"),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_teacher_that_runs_before_pooling(teacher, made):
    """The loss reaches the student, even if the teacher has a graph and runs between the two domains."""
    where, line = MADE[made]
    _, reached = reaching(
        (where, line.replace("TEACHER", TEACHERS[teacher]) + r"\1\2"),
        (r"( +)(losses = align\(.*)", r"\1teacher(images_s); teacher(images_t)\n\1\2"),
        (r"( +)(images_t, labels_t = .*)", r"\1if step > 0: teacher(images_s)\n\1\2"),
        steps=12,
    )
    assert reached == [True] * 12


def test_a_hook_in_data_parallel():
    """On one device it runs the network itself. Replicas keep no features, and the first step raises."""
    wrapped = (r"( +)(model: Any = .*)\n", r"\1\2\n\1whole = torch.nn.DataParallel(model)\n")
    runs = (r"\(model\((\w+)\), ", r"(whole(\1), ")
    _, log = program("hook", wrapped, runs).train(2)
    assert values(log).isfinite().all()
    # In a replica the layer is a different module.
    replica = (r"(layer = .*)\n", r"\1\n    model.backbone.layer4 = layer._replicate_for_data_parallel()\n")
    with pytest.raises(IndexError, match="deque index out of range"):
        program("hook", replica).train(1)
    assert "`deque index out of range`" in (ROOT / "docs" / "your-loop.md").read_text()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_hook_under_activation_checkpointing(reentrant):
    """`use_reentrant=False` works, as the page says. The other kind runs the layer without a graph, which raises."""
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
    """It must run before the network, as docs/your-loop.md says. If it runs last, the alignment raises."""
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
    """Class means equal those of up-sampled features. With the wrong setting they are off by the page's figure."""
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


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="a compiled hook keeps nothing in PyTorch 2.4")
def test_a_hook_under_torch_compile():
    compiled = (
        r"( +)(layer\.register_forward_hook.*)\n",
        r"\1\2\n\1model = torch.compile(model, backend='aot_eager')\n",
    )
    expected, found = (program("hook", *edits).train(3)[1] for edits in ((), (compiled,)))
    torch.testing.assert_close(values(found), values(expected))


def rows():
    """The layers that the page lists: library, output to take, models, layer, channels and stride."""
    library = taken = None
    for line in OTHER.splitlines():
        if found := re.match(r"\*\*([\w-]+):\*\* take `(x.*?)`\.", line):
            library, taken = found.groups()
        elif found := re.match(r"- (.+): layer `(.+)`, channels `(.+)`, stride (\d+)$", line):
            yield library, taken, *found.groups()


def models_of(library, names):
    """The models of a row. Skips where the library is not installed."""
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
    """A row of the table. Skipped if its library needs an older PyTorch."""
    old = row[0] not in ("torchvision", "segmentation-models-pytorch", "timm")
    reason = f"because {row[0]} cannot be installed beside a current PyTorch"
    return pytest.param(row, marks=pytest.mark.skipif(old, reason=reason), id=row[2])


@pytest.mark.slow
@pytest.mark.parametrize("row", [marked(row) for row in rows()])
def test_layers_of_the_real_libraries(row):
    """Each model of a row has that layer. Its map has the row's channels and stride."""
    library, taken, names, layer, channels, stride = row
    for model in models_of(library, re.findall(r"`(\w+)`", names)):
        kept = []
        at = model if layer == "model" else model.get_submodule(layer)
        at.register_forward_hook(lambda m, _, x, kept=kept: kept.append(eval(taken, {"x": x})))
        model.eval()(torch.randn(2, 3, 64, 96))
        width = eval(channels, {"model": model})
        assert list(kept[0].shape) == [2, width, 64 // int(stride), 96 // int(stride)]


def test_the_page_lists_layers():
    assert len(list(rows())) == OTHER.count(", stride ") == 7

"""The alignment modules: the recipe by hand bit for bit, slow float64 loops, and every bad input."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import semshift

C, K, STEPS = 4, 3, 20
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
NOTHING = float("nan")


def semantic(**options):
    return semshift.SemanticAlignment(C, K, hidden_channels=(8,), **options)


def spatial(**options):
    return semshift.GlobalAlignment(K, base_channels=2, **options)


def domain(seed, classes=range(K), images=2, size=(16, 24)):
    """Images, and labels of the given classes at twice the size of `Segmenter`'s features."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (images, *size), generator=generator)
    keep = torch.isin(labels, torch.tensor(list(classes), dtype=torch.int64))
    return torch.randn(images, 3, *size, generator=generator), torch.where(keep, labels, 255)


def features(seed, images=2):
    maps = torch.randn(images, C, 8, 12, generator=torch.Generator().manual_seed(seed))
    return maps.requires_grad_()


def state(module):
    return [tensor.clone() for tensor in module.state_dict().values()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def gradients(module):
    return [parameter.grad for parameter in module.parameters()]


def vanish(tensors):
    """Gradients of 0, not None."""
    return all(tensor is not None and bool((tensor == 0).all()) for tensor in tensors)


class Recipe(nn.Module):
    """The recipe by hand, as the documentation writes it."""

    def __init__(self, per_image=False, objective="bce", **options):
        super().__init__()
        self.discriminator = semshift.PrototypeDiscriminator(C, K, hidden_channels=(8,), **options)
        self.register_buffer("seen", torch.zeros(2, K, dtype=torch.bool))
        self.per_image, self.objective = per_image, {"objective": objective}
        self.confuse, self.tell = semshift.confusion_loss, semshift.discriminator_loss
        if options.get("conditioning") == "class-and-domain":
            self.confuse, self.tell, self.objective = (
                semshift.class_confusion_loss,
                semshift.class_discriminator_loss,
                {},
            )

    def forward(self, features_s, labels_s, features_t, labels_t):
        source = semshift.class_sums(features_s, labels_s, K, per_image=self.per_image)
        target = semshift.class_sums(features_t, labels_t, K, per_image=self.per_image)
        shown = [sums.present.any(0) if self.per_image else sums.present for sums in (source, target)]
        self.seen |= torch.stack(shown)
        mask_s, mask_t = source.present & self.seen[1], target.present & self.seen[0]
        judged = semshift.frozen(self.discriminator)(target.means)
        confusion = self.confuse(judged, weight=mask_t, **self.objective)
        logits = self.discriminator(source.means.detach()), self.discriminator(target.means.detach())
        return confusion, self.tell(*logits, source_weight=mask_s, target_weight=mask_t, **self.objective)


def train(align, steps=range(STEPS), network=None, weight=0.5):
    """A loop with two optimisers. Each class is missing now and then, and two steps have nothing in common."""
    if network is None:
        torch.manual_seed(1)
        network = nn.Conv2d(3, C, 2, stride=2)
    optimiser = torch.optim.SGD(network.parameters(), 0.05)
    own = torch.optim.Adam(align.parameters(), 1e-2, betas=(0.9, 0.99))
    for step in steps:
        classes = ([0], [1]) if step < 2 else ([c for c in range(K) if (step + c) % 3], [step % K, 2])
        source, target = domain(step, classes[0]), domain(100 + step, classes[1])
        confusion, discriminator = align(network(source[0]), source[1], network(target[0]), target[1])[:2]
        optimiser.zero_grad()
        own.zero_grad()
        (network(source[0]).square().mean() + weight * confusion + discriminator).backward()
        optimiser.step()
        own.step()
    return state(network) + state(align)


RECIPES = [
    {},
    {"spectral_norm": True},
    {"conditioning": "none"},
    {"conditioning": "class-and-domain"},
    {"objective": "least-squares"},
    {"objective": "hinge"},
    {"objective": "wasserstein", "spectral_norm": True},
]


@pytest.mark.parametrize("options", RECIPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_semantic_alignment_equals_the_recipe_by_hand(per_image, options):
    modules = []
    for kind in (semantic, Recipe):
        torch.manual_seed(2)
        modules.append(kind(per_image=per_image, **options))
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
    assert equal(train(modules[0]), train(modules[1]))
    assert modules[0].seen.tolist() == [[True, True, True], [True, True, True]]


@pytest.mark.parametrize("size", [None, (40, 64)])
@pytest.mark.parametrize(
    "options",
    [{}, {"inputs": "entropy"}, {"objective": "hinge"}, {"spectral_norm": True}, {"align_corners": True}],
    ids=str,
)
def test_global_alignment_equals_the_loop_by_hand(size, options):
    align_corners = options.pop("align_corners", False) if size else False
    options = {key: value for key, value in options.items() if key != "align_corners"}
    torch.manual_seed(3)
    align = spatial(**options)
    torch.manual_seed(3)
    discriminator = semshift.FCDiscriminator(K, base_channels=2, spectral_norm=options.get("spectral_norm", False))
    objective = options.get("objective", "bce")

    def by_hand(source, target, size):
        maps = []
        for logits in (source.detach(), target):
            if size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
            probabilities = logits.softmax(1)
            maps.append(semshift.entropy_map(probabilities) if options.get("inputs") else probabilities)
        confusion = semshift.confusion_loss(semshift.frozen(discriminator)(maps[1]), objective=objective)
        logits = discriminator(maps[0]), discriminator(maps[1].detach())
        return confusion, semshift.discriminator_loss(*logits, objective=objective)

    found = []
    for loop, module in ((by_hand, discriminator), (align, align.discriminator)):
        torch.manual_seed(4)
        # Two heads of unlike stride: without `size` the maps of the domains differ in size, and in number.
        heads = nn.ModuleList([nn.Conv2d(3, K, 1), nn.Conv2d(3, K, 1, stride=(1, 2))])
        optimiser = torch.optim.SGD(heads.parameters(), 0.1)
        own = torch.optim.Adam(module.parameters(), 1e-3)
        for step in range(5):
            images = torch.randn(3, 3, 32, 96, generator=torch.Generator().manual_seed(step))
            extra = {"align_corners": align_corners} if loop is align else {}
            confusion, loss = loop(heads[0](images[:1]), heads[1](images[1:]), size, **extra)[:2]
            optimiser.zero_grad()
            own.zero_grad()
            (confusion + loss).backward()
            optimiser.step()
            own.step()
        found.append(state(heads) + state(module))
    assert equal(*found)


# What one image shows of each domain: a set of classes.
IMAGES = st.lists(st.sets(st.integers(0, K - 1)), min_size=1, max_size=3)


@given(st.lists(st.tuples(IMAGES, IMAGES), min_size=1, max_size=3), st.booleans())
def test_classes_losses_and_figures_equal_a_slow_loop(batches, per_image):
    torch.manual_seed(5)
    align = semantic(per_image=per_image).double()
    seen = (set(), set())
    for batch in batches:
        maps = [torch.randn(len(images), C, 8, dtype=torch.float64, requires_grad=True) for images in batch]
        labels = []
        for images in batch:
            every = [sorted(classes) or [255] for classes in images]
            labels.append(torch.tensor([[row[i % len(row)] for i in range(7)] + [255] for row in every]))
        losses = align(maps[0], labels[0], maps[1], labels[1])

        means, whole, counted = [], [], []
        for side, images in enumerate(batch):
            seen[side].update(*images)
            cells = [(labels[side][b, i].item(), b, maps[side][b, :, i].detach()) for b in range(len(images)) for i in range(8)]
            rows = [(k, b) for b in range(len(images) if per_image else 1) for k in range(K)]
            mine = {(k, b): [v for label, image, v in cells if label == k and (image == b or not per_image)] for k, b in rows}
            means.append({key: sum(vectors) / len(vectors) for key, vectors in mine.items() if vectors})
            everything = {k: [v for label, _, v in cells if label == k] for k in range(K)}
            whole.append({k: sum(vectors) / len(vectors) for k, vectors in everything.items() if vectors})
        for side in (0, 1):
            # The class is the row of the output that is read.
            judged = [(k, align.discriminator.layers(v)[k].item()) for (k, _), v in means[side].items()]
            counted.append([logit for k, logit in judged if k in seen[1 - side]])

        def mean(values):
            return sum(values) / len(values) if values else 0.0

        confusion = mean([math.log1p(math.exp(-z)) for z in counted[1]])
        told = (mean([math.log1p(math.exp(-z)) for z in counted[0]]), mean([math.log1p(math.exp(z)) for z in counted[1]]))
        # No sum has a hundred terms.
        torch.testing.assert_close(losses.confusion.item(), confusion, rtol=100 * EPS64, atol=0)
        torch.testing.assert_close(losses.discriminator.item(), sum(told) / 2, rtol=100 * EPS64, atol=0)
        right = ([z > 0 for z in counted[0]], [z < 0 for z in counted[1]])
        both = sorted(whole[0].keys() & whole[1].keys())
        middle = {k: (whole[0][k] + whole[1][k]) / 2 for k in both}
        unit = mean([(middle[a] - middle[b]).norm().item() for a in both for b in both if a != b])
        distance = mean([(whole[0][k] - whole[1][k]).norm().item() / unit for k in both]) if len(both) > 1 else NOTHING
        expected = {
            "source_accuracy": mean(right[0]) if right[0] else NOTHING,
            "target_accuracy": mean(right[1]) if right[1] else NOTHING,
            "prototype_distance": distance,
        }
        found = {name: figure.item() for name, figure in losses.figures.items()}
        assert found == pytest.approx(expected, rel=EPS32, nan_ok=True)
    assert [set(row.nonzero().flatten().tolist()) for row in align.seen] == list(seen)


@pytest.mark.parametrize(
    "options",
    [
        {"resample": "nearest"},
        {"resample": "majority"},
        {"resample": "area"},
        {"align_corners": True},
        {"ignore_index": 2},
        {"ignore_index": None},
    ],
    ids=str,
)
def test_options_reach_the_pooling(options):
    align, (_, labels) = semantic(per_image=False, **options), domain(0)
    found = align(features(1), labels.clamp(max=K - 1), features(2), labels.clamp(max=K - 1))
    sums = [semshift.class_sums(features(seed), labels.clamp(max=K - 1), K, **options) for seed in (1, 2)]
    assert torch.equal(found.confusion, align.compare(*sums).confusion)
    plain = semantic(per_image=False)
    plain.load_state_dict(align.state_dict())
    same = torch.equal(found.confusion, plain(features(1), labels, features(2), labels).confusion)
    # No label is ignored here, so None is as good as 255.
    assert same == (options == {"ignore_index": None})


def test_seen_is_kept_in_training_with_gradients_alone():
    align, (_, labels) = semantic(), domain(0)
    with torch.no_grad():
        quiet = [align(features(1), labels, features(2), labels)]
    with torch.inference_mode():
        quiet.append(align(features(1), labels, features(2), labels))
    align.eval()
    quiet.append(align(features(1), labels, features(2).detach(), labels))
    assert not align.seen.any()
    align.train()
    loud = align(features(1), labels, features(2), labels)
    assert align.seen.all()
    for losses in quiet:
        assert torch.equal(losses.confusion, loud.confusion)
        assert torch.equal(losses.discriminator, loud.discriminator)
        assert losses.figures == loud.figures


@pytest.mark.parametrize("per_image", [False, True])
def test_a_batch_of_one_image_meets_classes_of_earlier_batches(per_image):
    align = semantic(per_image=per_image)

    def step(source, target):
        labels = [domain(seed, [k], images=1)[1] for seed, k in enumerate((source, target))]
        return align(features(1, 1), labels[0], features(2, 1), labels[1])

    assert step(0, 1).confusion == 0
    losses = step(1, 0)
    assert losses.confusion > 0
    assert losses.discriminator > 0
    # Class 2 is new to both, and no class is in both images.
    assert step(2, 0).confusion > 0
    assert align.seen.tolist() == [[True, True, True], [True, True, False]]
    assert align.eval()(*(features(1, 1), domain(0, [0], 1)[1]) * 2).figures["prototype_distance"].isnan()


@pytest.mark.parametrize("kind", [semantic, lambda: semantic(spectral_norm=True)])
def test_a_resumed_run_goes_on_identically(kind, tmp_path):
    torch.manual_seed(2)
    align, network = kind(), nn.Conv2d(3, C, 2, stride=2)
    train(align, range(2), network)
    torch.save({"align": align.state_dict(), "network": network.state_dict()}, tmp_path / "checkpoint.pt")
    whole = train(align, range(2, 5), network)
    align, network = kind(), nn.Conv2d(3, C, 2, stride=2)
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    align.load_state_dict(stored["align"])
    network.load_state_dict(stored["network"])
    assert align.seen.tolist() == [[True, False, False], [False, True, False]]
    assert equal(train(align, range(2, 5), network), whole)


@pytest.mark.parametrize("classes", [([0], [1, 2]), ([], [1]), ([1], []), ([], [])], ids=str)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("options", RECIPES, ids=str)
def test_nothing_in_common_is_0_and_attached(classes, per_image, options):
    align, maps = semantic(per_image=per_image, **options), (features(1), features(2))
    losses = align(maps[0], domain(1, classes[0])[1], maps[1], domain(2, classes[1])[1])
    assert losses.confusion == losses.discriminator == 0
    assert all(figure.isnan() for figure in losses.figures.values())
    (losses.confusion + losses.discriminator).backward()
    assert vanish([maps[1].grad, *gradients(align)])
    assert maps[0].grad is None


def run(kind, seed=1):
    """A module, its two inputs and its losses."""
    if kind is spatial:
        module = spatial()
        inputs = torch.randn(2, K, 32, 32, requires_grad=True), torch.randn(1, K, 32, 64, requires_grad=True)
        return module, inputs, module(*inputs)
    module, inputs = kind(), (features(seed), features(seed + 1))
    return module, inputs, module(inputs[0], domain(seed)[1], inputs[1], domain(seed + 1)[1])


@pytest.mark.parametrize("kind", [semantic, lambda: semantic(per_image=False), spatial])
def test_the_losses_share_no_gradient(kind):
    module, (source, target), losses = run(kind)
    assert losses.confusion.dtype == losses.discriminator.dtype == torch.float32
    assert losses.confusion.shape == losses.discriminator.shape == ()
    losses.confusion.backward()
    assert target.grad.abs().sum() > 0
    assert gradients(module) == [None] * len(list(module.parameters()))
    target.grad = None
    losses.discriminator.backward()
    assert target.grad is source.grad is None
    assert all(gradient.abs().sum() > 0 for gradient in gradients(module))


@pytest.mark.parametrize("kind", [semantic, spatial])
def test_figures_are_alike_at_every_step(kind):
    names = ["source_accuracy", "target_accuracy", *(["prototype_distance"] if kind is semantic else [])]
    for _ in range(2):
        figures = run(kind)[2].figures
        assert list(figures) == names
        assert all(figure.dtype == torch.float32 and figure.shape == () for figure in figures.values())
        assert not any(figure.requires_grad or figure.isnan() for figure in figures.values())


def test_accuracies_of_maps_are_shares_of_patches():
    module, inputs, losses = run(spatial)
    logits = [module.discriminator(maps.softmax(1)).flatten().tolist() for maps in inputs]
    assert losses.figures["source_accuracy"] == sum(z > 0 for z in logits[0]) / 2
    assert losses.figures["target_accuracy"] == sum(z < 0 for z in logits[1]) / 2


def test_features_of_any_precision():
    align, (_, labels) = semantic(), domain(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        maps = [features(seed).detach().to(dtype).requires_grad_() for seed in (1, 2)]
        losses = align(maps[0], labels, maps[1], labels)
        assert losses.confusion.dtype == losses.discriminator.dtype == torch.float32
        losses.confusion.backward()
        assert maps[1].grad.dtype == dtype


def test_compare_takes_sums_of_either_shape():
    _, labels = domain(0)
    for per_image in (False, True):
        align = semantic(per_image=per_image)
        sums = [semshift.class_sums(features(seed), labels, K, per_image=per_image) for seed in (1, 2)]
        assert equal(align.compare(*sums)[:2], align(features(1), labels, features(2), labels)[:2])
    # A bank's rows against one batch's images.
    pooled = semshift.class_sums(features(1), labels, K)
    mixed = align.compare(pooled, sums[1])
    expected = semshift.discriminator_loss(align.discriminator(pooled.means), align.discriminator(sums[1].means))
    torch.testing.assert_close(mixed.discriminator, expected, rtol=10 * EPS32, atol=0)


def test_compare_confuses_with_other_sums():
    align, (_, labels) = semantic(), domain(0)
    source, target = (semshift.class_sums(features(seed), labels, K) for seed in (1, 2))
    # The source never showed class 2 of these.
    few = semshift.class_sums(features(3), domain(1, [1])[1], K)
    plain, other = align.compare(source, target), align.compare(source, target, target_confusion=few)
    assert torch.equal(plain.discriminator, other.discriminator)
    assert torch.equal(other.confusion, F.softplus(-align.discriminator(few.means)[1]))


def test_compare_of_detached_sums_trains_the_discriminator():
    align, (_, labels) = semantic(), domain(0)
    sums = [semshift.class_sums(features(seed).detach(), labels, K) for seed in (1, 2)]
    own = torch.optim.Adam(align.parameters(), 1e-2)
    first = align.compare(*sums)
    assert not first.confusion.requires_grad
    for _ in range(20):
        own.zero_grad()
        align.compare(*sums).discriminator.backward()
        own.step()
    assert align.compare(*sums).discriminator < first.discriminator
    assert align.seen.all()


def test_a_penalty_can_be_computed_on_the_discriminator():
    align, _, losses = run(semantic)
    prototypes = torch.randn(K, C, requires_grad=True)
    penalty = semshift.r1_penalty(align.discriminator(prototypes), prototypes)
    (gradient,) = torch.autograd.grad(penalty, align.discriminator.layers[0].weight, retain_graph=True)
    (alone,) = torch.autograd.grad(losses.discriminator, align.discriminator.layers[0].weight, retain_graph=True)
    (losses.discriminator + penalty).backward()
    torch.testing.assert_close(align.discriminator.layers[0].weight.grad, alone + gradient, rtol=0, atol=4 * EPS32)


@pytest.mark.parametrize("kind", [semantic, lambda: semantic(spectral_norm=True), spatial])
def test_the_discriminator_may_step_before_the_confusion(kind):
    found = []
    for first in ("discriminator", "confusion"):
        torch.manual_seed(6)
        module, (_, target), losses = run(kind)
        own = torch.optim.Adam(module.parameters(), 0.1)
        if first == "confusion":
            losses.confusion.backward()
        losses.discriminator.backward()
        own.step()
        if first == "discriminator":
            losses.confusion.backward()
        found.append([target.grad, *state(module)])
    assert equal(*found)


def test_balanced_weight_equals_differences_of_the_losses():
    align, (_, labels) = semantic().double(), domain(0, size=(2, 2))
    align.eval()
    source, maps = (torch.randn(2, C, 2, 2, dtype=torch.float64) for _ in range(2))

    def task(x):
        return x.square().sum().tanh() + x[:, 0].sum()

    def confusion(x):
        return align(source, labels, x, labels).confusion

    def norm(loss, step=1e-5):
        total = 0.0
        for i in range(maps.numel()):
            ahead, behind = maps.clone(), maps.clone()
            ahead.view(-1)[i] += step
            behind.view(-1)[i] -= step
            total += ((loss(ahead) - loss(behind)).item() / (2 * step)) ** 2
        return math.sqrt(total)

    maps.requires_grad_()
    losses = task(maps), confusion(maps)
    weight = semshift.balanced_weight(*losses, maps, 0.3)
    # What differences of a step of 1e-5 leave out is far below float32, the dtype of the weight.
    assert weight.item() == pytest.approx(0.3 * norm(lambda x: task(x.detach())) / norm(lambda x: confusion(x.detach())), rel=1e-6)
    assert weight.dtype == torch.float32
    assert weight.shape == ()
    assert not weight.requires_grad
    assert maps.grad is None
    (losses[0] + weight * losses[1]).backward()
    assert maps.grad is not None
    assert semshift.balanced_weight(task(maps), confusion(maps), maps, 0) == 0


def test_balanced_weight_is_0_where_either_gradient_vanishes():
    maps = features(1)
    nothing = semantic()(features(2), domain(0, [0])[1], maps, domain(1, [1])[1]).confusion
    assert semshift.balanced_weight(maps.sum(), nothing, maps, 0.5) == 0
    assert semshift.balanced_weight(0 * maps.sum(), maps.sum(), maps, 0.5) == 0


@pytest.mark.parametrize("how", ["features", "autocast"])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e3])
def test_balanced_weight_in_float16(how, size):
    """The gradient of 1e-8 vanishes in float16, and that of 1e3 overflows where it is scaled."""
    maps, half = torch.ones(8), torch.float16
    expected = 0.5 * size
    maps = (maps.to(half) if how == "features" else maps).requires_grad_()
    with torch.autocast("cpu", half, enabled=how == "autocast"):
        logits = (maps * 1.0 if how == "features" else F.linear(maps[None], torch.eye(8))[0]).float()
        weight = semshift.balanced_weight(size * logits.sum(), maps.float().sum(), maps, 0.5)
    assert weight.item() == pytest.approx(expected, rel=torch.finfo(half).eps)


def halves(how):
    """A loss and features between which there is no gradient, each in one of the ways that users meet."""
    maps, backbone, head = features(1), nn.Conv2d(C, C, 1), nn.Conv2d(C, K, 1)
    network = lambda x: (lambda y: (y, head(y)))(backbone(x))  # noqa: E731
    if how == "slice":
        return head(maps).sum(), maps[:1]
    if how == "copy":
        return head(maps).sum(), maps.clone()
    if how == "detached":
        return head(maps).sum(), maps.detach()
    if how == "compiled":
        inner, logits = torch.compile(network, backend="aot_eager")(maps)
        return logits.sum(), inner
    if how == "checkpointed":
        inner, logits = checkpoint(network, maps, use_reentrant=True)
        return logits.sum(), inner
    return checkpoint(head, maps, use_reentrant=True).sum(), maps


@pytest.mark.parametrize(
    ("how", "error", "way_out"),
    [
        ("slice", ValueError, "slice"),
        ("copy", ValueError, "copy"),
        ("detached", ValueError, "features"),
        ("compiled", ValueError, "compile backbone and head apart"),
        ("checkpointed", ValueError, "use_reentrant=False"),
        ("checkpointed head", RuntimeError, "use_reentrant=False"),
    ],
)
def test_balanced_weight_names_the_way_out(how, error, way_out):
    loss, maps = halves(how)
    for losses in ((loss, maps.sum()), (maps.sum(), loss)):
        with pytest.raises(error, match=way_out):
            semshift.balanced_weight(*losses, maps, 0.1)


MAPS, META = torch.zeros(2, C, 8, 12), torch.zeros(2, C, 8, 12, device="meta", requires_grad=True)
GRAD = MAPS.clone().requires_grad_()
LABELS, WIDE = torch.zeros(2, 16, 24, dtype=torch.int64), torch.zeros(2, K, 32, 40, requires_grad=True)
SUMS = semshift.class_sums(MAPS, LABELS, K)
GOOD = (MAPS, LABELS, GRAD, LABELS)


def sums(rows=K, width=C, mass=K, device="cpu"):
    return semshift.ClassSums(torch.zeros(rows, width, device=device), torch.ones(mass, dtype=torch.int64, device=device))


def swapped(**changes):
    """Arguments of `forward`, of which some are bad."""
    names = ("source_features", "source_labels", "target_features", "target_labels")
    return [changes.get(name, good) for name, good in zip(names, GOOD)]


BAD = {
    # Arguments of the modules.
    "in_channels": (lambda: semshift.SemanticAlignment(True, K), TypeError, "in_channels .*True"),
    "num_classes": (lambda: semshift.SemanticAlignment(C, torch.tensor(3)), TypeError, r"num_classes .*tensor\(3\)"),
    "no class": (lambda: semshift.SemanticAlignment(C, 0), ValueError, "num_classes .*1.* 0"),
    "256 classes": (lambda: semshift.SemanticAlignment(C, 256), ValueError, "ignore_index .*255.*256"),
    "hidden_channels": (lambda: semshift.SemanticAlignment(C, K, hidden_channels=8), TypeError, "hidden_channels .*8"),
    "conditioning": (lambda: semantic(conditioning="x"), ValueError, "conditioning .*per-class.*'x'"),
    "objective": (lambda: semantic(objective="x"), ValueError, "objective .*hinge.*'x'"),
    "resample": (lambda: semantic(resample=None), ValueError, "resample .*nearest.*None"),
    "ignore_index": (lambda: semantic(ignore_index=1.5), TypeError, "ignore_index .*1.5"),
    **{
        flag: (lambda flag=flag: semantic(**{flag: 1}), TypeError, f"{flag} .*bool.* 1")
        for flag in ("align_corners", "per_image", "spectral_norm")
    },
    "corners": (lambda: semantic(align_corners=True, resample="area"), ValueError, "align_corners .*bilinear.*'area'"),
    "class-and-domain": (
        lambda: semantic(conditioning="class-and-domain", objective="hinge"),
        ValueError,
        "objective 'bce' .*class-and-domain.*'hinge'",
    ),
    "global one class": (lambda: semshift.GlobalAlignment(1), ValueError, "num_classes .*2.* 1"),
    "global bool": (lambda: semshift.GlobalAlignment(True), TypeError, "num_classes .*True"),
    "base_channels": (lambda: semshift.GlobalAlignment(K, base_channels=2.0), TypeError, "base_channels .*2.0"),
    "inputs": (lambda: spatial(inputs="logits"), ValueError, "inputs .*entropy.*'logits'"),
    "global objective": (lambda: spatial(objective="x"), ValueError, "objective .*hinge.*'x'"),
    "global norm": (lambda: spatial(spectral_norm=1), TypeError, "spectral_norm .*bool.* 1"),
    # Features and labels.
    "width": (lambda: semantic()(*swapped(source_features=WIDE)), ValueError, r"source_features .*4.*\[2, 3, 32, 40\]"),
    "integers": (lambda: semantic()(*swapped(target_features=LABELS)), TypeError, "target_features .*int64"),
    "list": (lambda: semantic()(*swapped(source_features=[1])), TypeError, "source_features .*list"),
    "float labels": (lambda: semantic()(*swapped(source_labels=MAPS[:, 0])), TypeError, "source: .*labels .*float32"),
    "shapes": (lambda: semantic()(*swapped(target_labels=LABELS[:1])), ValueError, r"target: .*labels .*\[1, 16, 24\]"),
    "range": (lambda: semantic()(*swapped(target_labels=LABELS + 3)), ValueError, "target: .*labels .*255.* 3 .*768"),
    "transposed": (
        lambda: semantic()(MAPS.expand(-1, -1, -1, -1).repeat(1, 1, 1, 2), LABELS.mT, GRAD, LABELS),
        ValueError,
        r"source: .*labels .*\[2, 24, 16\].*transposed",
    ),
    "no graph": (lambda: semantic()(*swapped(target_features=MAPS)), ValueError, r"target_features .*compare\(\)"),
    "half": (lambda: semantic().half()(*GOOD), TypeError, r"discriminator .*float16.*\.float\(\)"),
    "meta labels": (lambda: semantic()(*swapped(source_labels=LABELS.to("meta"))), ValueError, "source: .*labels .*meta"),
    "meta source": (
        lambda: semantic()(META.detach(), LABELS.to("meta"), GRAD, LABELS),
        ValueError,
        "source .*module .*meta and cpu",
    ),
    "meta target": (lambda: semantic()(MAPS, LABELS, META, LABELS.to("meta")), ValueError, "target .*meta and cpu"),
    "meta module": (lambda: semantic().to("meta")(*GOOD), ValueError, "source .*cpu and meta"),
    # Sums.
    "tensors": (lambda: semantic().compare(SUMS, MAPS), TypeError, "target .*ClassSums.*Tensor"),
    "confusion": (lambda: semantic().compare(SUMS, SUMS, target_confusion=3), TypeError, "target_confusion .*int"),
    "sums width": (lambda: semantic().compare(SUMS, sums(width=5)), ValueError, r"target .*\[3, 4\].*\[3, 5\]"),
    "sums classes": (lambda: semantic().compare(sums(2, mass=2), SUMS), ValueError, r"source .*\[3, 4\].*\[2, 4\]"),
    "sums mass": (lambda: semantic().compare(sums(mass=2), SUMS), ValueError, r"source .*mass \[3\].*\[2\]"),
    "sums device": (
        lambda: semantic().compare(SUMS, SUMS, target_confusion=sums(device="meta")),
        ValueError,
        "target_confusion .*meta and cpu",
    ),
    # Output maps.
    "maps": (lambda: spatial()(WIDE, WIDE[:, :2]), ValueError, r"target_logits .*3.*\[2, 2, 32, 40\]"),
    "maps 3d": (lambda: spatial()(WIDE[0], WIDE), ValueError, r"source_logits .*\[3, 32, 40\]"),
    "maps integers": (lambda: spatial()(LABELS, WIDE), TypeError, "source_logits .*int64"),
    "small": (lambda: spatial()(WIDE, WIDE[..., :31]), ValueError, "32.*32 x 31 of target_logits: .*size="),
    "small size": (lambda: spatial()(WIDE, WIDE, (16, 40)), ValueError, "32.*16 x 40"),
    "size": (lambda: spatial()(WIDE, WIDE, 64), ValueError, "size .*64"),
    "size bool": (lambda: spatial()(WIDE, WIDE, (True, 64)), TypeError, "size .*True"),
    "global corners": (lambda: spatial()(WIDE, WIDE, align_corners=1), TypeError, "align_corners .*bool.* 1"),
    "global no graph": (lambda: spatial()(WIDE, WIDE.detach()), ValueError, "target_logits .*graph"),
    "global half": (lambda: spatial().bfloat16()(WIDE, WIDE), TypeError, r"discriminator .*bfloat16.*\.float\(\)"),
    "global meta": (lambda: spatial()(WIDE, META[:, :K]), ValueError, "target_logits .*meta and cpu"),
    # The balanced weight.
    "ratio": (lambda: semshift.balanced_weight(GRAD.sum(), GRAD.sum(), GRAD, -1), ValueError, "ratio .*-1"),
    "ratio nan": (lambda: semshift.balanced_weight(GRAD.sum(), GRAD.sum(), GRAD, NOTHING), ValueError, "ratio .*nan"),
    "ratio bool": (lambda: semshift.balanced_weight(GRAD.sum(), GRAD.sum(), GRAD, True), TypeError, "ratio .*True"),
    "loss": (lambda: semshift.balanced_weight(GRAD, GRAD.sum(), GRAD, 1), ValueError, r"loss .*scalar.*\[2, 4, 8, 12\]"),
    "confusion loss": (lambda: semshift.balanced_weight(GRAD.sum(), 1.0, GRAD, 1), TypeError, "confusion .*float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as raised:
        call()
    assert re.search(words, str(raised.value))
    assert "\n" not in str(raised.value)

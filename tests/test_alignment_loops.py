"""`SemanticAlignment` in other people's training loops, in one process: each loop equals the plain one.

Every loop runs twice: with the call of the module it must equal the plain loop with the call, without it the plain loop
without it; and the loop without the call must be far from the plain loop with it. So a test turns red when the call is
taken out or does something else.
"""

import copy
import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import semshift

C, K, STEPS, WEIGHT = 8, 3, 3, 10.0
RATES = {"network": 0.05, "align": 0.5}
# Frameworks warn of things that are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, C, 4, stride=4), nn.ReLU(), nn.Conv2d(C, C, 1), nn.ReLU())
        self.head = nn.Conv2d(C, K, 1)

    def forward(self, images):
        features = self.backbone(images)
        return features, F.interpolate(self.head(features), images.shape[-2:], mode="bilinear")


def modules():
    torch.manual_seed(1)
    return Segmenter(), semshift.SemanticAlignment(C, K, hidden_channels=(16,))


def batch(step):
    """Images and labels of both domains. The source shows the last class at step 0 alone, the target afterwards."""
    generator = torch.Generator().manual_seed(step)
    domains = []
    for shift, last in ((0.0, step == 0), (0.5, step > 0)):
        labels = torch.randint(0, K if last else K - 1, (2, 4, 6), generator=generator)
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        # A channel for each class: gradients that cancel out would be rounding alone.
        colours = F.one_hot(labels, K).movedim(-1, 1) + shift
        domains += [colours + 0.3 * torch.randn(2, K, 16, 24, generator=generator), labels]
    return domains


def losses_of(network, align, data, weight=WEIGHT):
    """The segmenter's loss and the discriminator's; where `align` is None the call is left out."""
    images_s, labels_s, images_t, labels_t = data
    (features_s, logits_s), (features_t, logits_t) = network(images_s), network(images_t)
    task = F.cross_entropy(logits_s, labels_s) + F.cross_entropy(logits_t, labels_t)
    if align is None:
        return task, torch.zeros(())
    losses = align(features_s, labels_s, features_t, labels_t)
    return task + weight * losses.confusion, losses.discriminator


def optimisers(network, align, kind=torch.optim.SGD):
    made = [torch.optim.SGD(network.parameters(), RATES["network"])]
    return made if align is None else [*made, kind(align.parameters(), RATES["align"])]


def plain(network, align, steps=STEPS, kind=torch.optim.SGD):
    """The reference: each module's gradient comes only from its own loss."""
    pair = optimisers(network, align, kind)
    for step in range(steps):
        losses = losses_of(network, align, batch(step))
        for module, loss in zip((network, align), losses):
            if module is not None:
                parameters = list(module.parameters())
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
                    parameter.grad = gradient
        for optimiser in pair:
            optimiser.step()


def trained(loop, on=True, **options):
    network, align = modules()
    loop(network, align if on else None, **options)
    return network, align


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def apart(found, expected):
    """How far each module is from the expected one, as a share of how far training moved that."""
    for a, b, start in zip(found, expected, modules()):
        distance, moved = (flat(a) - flat(b)).norm().item(), (flat(b) - flat(start)).norm().item()
        yield distance / moved if distance > 0 else 0.0


def holds(loop, tolerance=0.0, **options):
    """The loop equals the plain one. A tolerance of 0 says: the same operations on the same numbers."""
    for on in (True, False):
        found, expected = trained(loop, on), trained(plain, on, **options)
        assert max(apart(found, expected)) <= tolerance
        assert torch.equal(found[1].seen, expected[1].seen)
    # Without the call both modules are elsewhere, farther than any tolerance.
    assert min(apart(found, trained(plain, **options))) > 0.5


def roundings(dtype):
    """On its way there and back a gradient is rounded in about thirty places, in each by at most half an eps."""
    return 15 * torch.finfo(dtype).eps


def steps(network, align, pair, loss_of=None, begin=0, end=STEPS):
    for step in range(begin, end):
        loss = sum((loss_of or losses_of)(network, align, batch(step)))
        for optimiser in pair:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in pair:
            optimiser.step()


def test_two_optimisers():
    def loop(network, align):
        steps(network, align, optimisers(network, align, torch.optim.Adam))

    holds(loop, kind=torch.optim.Adam)


def test_one_optimiser_with_parameter_groups():
    def loop(network, align):
        optimiser = torch.optim.SGD(network.parameters(), RATES["network"])
        if align is not None:
            optimiser.add_param_group({"params": align.parameters(), "lr": RATES["align"]})
        steps(network, align, [optimiser])

    holds(loop)


@pytest.mark.parametrize("again", [False, True])
def test_alternating_steps(again):
    """The discriminator's step uses the same losses, or pools detached features once more."""

    def loop(network, align):
        pair = optimisers(network, align)
        for step in range(STEPS):
            data = batch(step)
            with torch.no_grad():
                detached = network(data[0])[0], network(data[2])[0]
            segmenter, discriminator = losses_of(network, align, data)
            pair[0].zero_grad()
            segmenter.backward()
            pair[0].step()
            if align is not None:
                if again:
                    sums = [semshift.class_sums(x, y, K, per_image=True) for x, y in zip(detached, (data[1], data[3]))]
                    discriminator = align.compare(*sums).discriminator
                pair[1].zero_grad()
                discriminator.backward()
                pair[1].step()

    holds(loop)


def test_grad_scaler():
    dtype = torch.float16

    def loop(network, align):
        scaler, pair = torch.amp.GradScaler("cpu", init_scale=2.0**10), optimisers(network, align)
        for step in range(STEPS):
            with torch.autocast("cpu", dtype):
                loss = sum(losses_of(network, align, batch(step)))
            for optimiser in pair:
                optimiser.zero_grad()
            scaler.scale(loss).backward()
            for optimiser in pair:
                scaler.step(optimiser)
            scaler.update()
        assert scaler.get_scale() == 2.0**10

    holds(loop, roundings(dtype))


def test_bfloat16_autocast():
    def loop(network, align):
        autocast = torch.autocast("cpu", torch.bfloat16)
        steps(network, align, optimisers(network, align), autocast(losses_of))

    holds(loop, roundings(torch.bfloat16))


def test_gradient_accumulation():
    """Every image of a batch shows the same classes, so means over parts are the mean over all."""

    def loop(network, align):
        pair = optimisers(network, align)
        for step in range(STEPS):
            for part in zip(*(tensor.split(1) for tensor in batch(step))):
                (sum(losses_of(network, align, part)) / 2).backward()
            for optimiser in pair:
                optimiser.step()
                optimiser.zero_grad()

    holds(loop, roundings(torch.float32))


@pytest.mark.slow
def test_lightning():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, network, align):
            super().__init__()
            self.network, self.align = network, align

        def training_step(self, data, index):
            return sum(losses_of(self.network, self.align, data))

        def configure_optimizers(self):
            groups = [{"params": self.network.parameters(), "lr": RATES["network"]}]
            if self.align is not None:
                groups.append({"params": self.align.parameters(), "lr": RATES["align"]})
            return torch.optim.SGD(groups)

    def loop(network, align):
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True)
        trainer.fit(Module(network, align), torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], None))

    holds(loop)


@pytest.mark.slow
def test_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)

    def loop(network, align):
        pair = optimisers(network, align)
        network, pair[0] = fabric.setup(network, pair[0])
        if align is not None:
            align, pair[1] = fabric.setup(align, pair[1])
        for step in range(STEPS):
            fabric.backward(sum(losses_of(network, align, batch(step))))
            for optimiser in pair:
                optimiser.step()
                optimiser.zero_grad()

    holds(loop)


@pytest.mark.slow
def test_accelerate():
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)

    def loop(network, align):
        network, align, *pair = accelerator.prepare(network, align, *optimisers(network, align))
        for step in range(STEPS):
            accelerator.backward(sum(losses_of(network, align, batch(step))))
            for optimiser in pair:
                optimiser.step()
                optimiser.zero_grad()

    holds(loop)


def needs_functional_call(what):
    old = torch.__version__.startswith("2.4.")
    return pytest.param(what, marks=pytest.mark.skipif(old, reason="torch 2.4 compiles no functional_call"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["segmenter", needs_functional_call("module"), needs_functional_call("step")])
def test_compile(what):
    def compiled(called):
        return torch.compile(called, backend="aot_eager", fullgraph=True)

    def loop(network, align):
        pair, loss_of = optimisers(network, align), losses_of
        if what == "segmenter":
            network = compiled(network)
        elif what == "module":
            align = align and compiled(align)
        else:
            loss_of = compiled(losses_of)
        steps(network, align, pair, loss_of)

    holds(loop, roundings(torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("what", [needs_functional_call("step")])
def test_compile_with_the_weight_inside(what):
    """A schedule in the compiled step: each step has its own weight, and the graph is not compiled anew for each."""
    weight = semshift.Then(semshift.Constant(0.0), 2, semshift.Polynomial(WEIGHT, 0.0, 9))

    def loss_of(network, align, data, step):
        return sum(losses_of(network, align, data, weight(step)))

    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    found = []
    for run in (loss_of, torch.compile(loss_of, backend=count, fullgraph=True)):
        network, align = modules()
        for step in range(13):
            loss = run(network, align, batch(step), step)
            loss.backward()
            gradients = [parameter.grad.clone() for parameter in (*network.parameters(), *align.parameters())]
            found.append((loss.detach(), *gradients))
    # The first step, any step, and from the schedule's second part and its end on.
    assert count.frame_count <= 5
    for eager, compiled in zip(found[:13], found[13:]):
        for one, other in zip(eager, compiled):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    def loop(network, align):
        def run(images):
            # Reentrant checkpoints need an input with a gradient.
            return checkpoint(network, images.requires_grad_(), use_reentrant=use_reentrant)

        steps(run, align, optimisers(network, align))

    holds(loop)


@pytest.mark.parametrize("kind", ["deepcopy", "AveragedModel"])
def test_an_average_of_the_segmenter(kind):
    averages = []

    def average_of(network):
        if kind == "deepcopy":
            return copy.deepcopy(network)
        average = swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75))
        average.update_parameters(network)  # the first one copies
        return average

    @torch.no_grad()
    def update(average, network):
        if kind == "AveragedModel":
            return average.update_parameters(network)
        for mean, parameter in zip(average.parameters(), network.parameters()):
            mean.lerp_(parameter, 0.25)

    def loop(network, align):
        pair = optimisers(network, align)
        steps(network, align, pair, end=1)
        average = average_of(network)
        for step in range(1, STEPS):
            steps(network, align, pair, begin=step, end=step + 1)
            update(average, network)
        averages.append(flat(average))

    holds(loop)
    for average, on in zip(averages, (True, False)):
        after = [flat(trained(plain, on, steps=count)[0]) for count in range(1, STEPS + 1)]
        expected = 0.75 * (0.75 * after[0] + 0.25 * after[1]) + 0.25 * after[2]
        # Two updates of three roundings each.
        bound = 6 * torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in after)
        torch.testing.assert_close(average, expected, rtol=0, atol=bound)


def test_a_round_trip_of_the_state():
    def save(*parts):
        file = io.BytesIO()
        torch.save([None if part is None else part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(stored, *parts):
        for part, state in zip(parts, torch.load(io.BytesIO(stored), weights_only=True)):
            if part is not None:
                part.load_state_dict(state)

    def loop(network, align):
        pair = optimisers(network, align, torch.optim.Adam)
        steps(network, align, pair, end=1)
        stored = save(network, align, *pair)
        new = modules()
        new = new[0], None if align is None else new[1]
        pair = optimisers(*new, torch.optim.Adam)
        load(stored, *new, *pair)
        steps(*new, pair, begin=1)
        load(save(*new), network, align)

    holds(loop, kind=torch.optim.Adam)

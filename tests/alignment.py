"""Shared parts of the tests of the alignment modules: small modules, their inputs, and a loop that trains them."""

import math

import torch
from torch import nn

import semshift

C, K, STEPS = 4, 3, 20
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
NAN = math.nan


def semantic(**options):
    return semshift.SemanticAlignment(C, K, hidden_channels=(8,), **options)


def spatial(**options):
    return semshift.GlobalAlignment(K, base_channels=2, **options)


def domain(seed, classes=range(K), images=2, size=(16, 24)):
    """Images, and labels of the given classes alone."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (images, *size), generator=generator)
    keep = torch.isin(labels, torch.tensor(list(classes), dtype=torch.int64))
    return torch.randn(images, 3, *size, generator=generator), torch.where(keep, labels, 255)


def features(seed, images=2):
    return torch.randn(images, C, 8, 12, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def state(module):
    return [tensor.clone() for tensor in module.state_dict().values()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def gradients(module):
    return [parameter.grad for parameter in module.parameters()]


def vanish(tensors):
    """Gradients of 0, not None."""
    return all(tensor is not None and bool((tensor == 0).all()) for tensor in tensors)


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


def mean(values, of_nothing=NAN):
    values = list(values)
    return sum(values) / len(values) if values else of_nothing


# Options of the semantic module, beside per_image.
RECIPES = [
    {},
    {"spectral_norm": True},
    {"conditioning": "none"},
    {"conditioning": "class-and-domain"},
    {"objective": "least-squares"},
    {"objective": "hinge"},
    {"objective": "wasserstein", "spectral_norm": True},
]

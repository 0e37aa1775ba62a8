"""README.md: its two commands have the form that a fresh machine needs, and its drop-in works in a plain loop."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from semshift.schedules import Sigmoid

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
DROP_IN = next(code for language, code in BLOCKS if language == "python")


def test_commands():
    lines = [line for _, code in BLOCKS for line in code.splitlines() if "pip install" in line and "&&" in line]
    assert len(lines) == 2
    assert all("-c constraints.txt" in line for line in lines)
    assert lines[0].endswith("python -m examples.workbench demo")
    assert lines[1].endswith("pytest -q")


def test_every_block_is_covered():
    # The shell blocks are run by .ci/run, the trainer's by tests/examples; a new kind of block needs a test of its own.
    assert [language for language, _ in BLOCKS] == ["bash", "bash", "python", "text", "text"]


def test_drop_in_has_at_most_ten_lines():
    assert len([line for line in DROP_IN.splitlines() if line.strip()]) <= 10


@pytest.fixture(scope="module")
def drop_in():
    """The README's lines: what comes once, and what comes at every step."""
    once = [line for line in DROP_IN.splitlines() if line.startswith(("from ", "critic = "))]
    every = [line for line in DROP_IN.splitlines() if line.strip() and line not in once]
    assert len(once) == 4
    return "\n".join(once), "\n".join(every)


def plain_loop(drop_in, steps=8):
    """Somebody's training loop, with the drop-in's lines pasted in, or without them."""
    once, every = drop_in or ("", "")
    torch.manual_seed(0)
    backbone, head = nn.Conv2d(3, 2048, 8, stride=8), nn.Conv2d(2048, 19, 1)
    names = {"weight": Sigmoid(0.1, steps)}
    exec(once, names)
    optimiser = torch.optim.SGD([*backbone.parameters(), *head.parameters()], 0.01)
    critic_optimiser = torch.optim.Adam(names["critic"].parameters(), 1e-3) if drop_in else None
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        names["step"] = step
        names["loss"] = torch.zeros(())
        for domain, shift in (("s", 0.0), ("t", 1.0)):
            images = torch.randn(2, 3, 32, 48, generator=generator) + shift
            labels = torch.randint(0, 19, (2, 32, 48), generator=generator)
            names[f"labels_{domain}"] = labels
            names[f"features_{domain}"] = features = backbone(images)
            logits = F.interpolate(head(features), size=labels.shape[-2:], mode="bilinear")
            names["loss"] = names["loss"] + F.cross_entropy(logits, labels)
        exec(every, names)
        optimiser.zero_grad()
        names["loss"].backward()
        optimiser.step()
        if critic_optimiser is not None:
            critic_optimiser.zero_grad()
            names["critic_loss"].backward()
            critic_optimiser.step()
    return backbone.weight.detach(), names


def test_drop_in_runs_and_matters(drop_in):
    weights, names = plain_loop(drop_in)
    assert torch.isfinite(names["loss"])
    assert torch.isfinite(names["critic_loss"])
    assert all(parameter.grad is not None for parameter in names["critic"].parameters())
    without, _ = plain_loop(None)
    assert not torch.equal(weights, without)
    again, _ = plain_loop(drop_in)
    assert torch.equal(weights, again)

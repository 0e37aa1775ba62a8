"""README.md: its two commands have the form that a fresh machine needs, and its drop-in works in a plain loop."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SECTION = re.search(r"^## Add to your loop\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)[1]


def test_commands():
    lines = [line for _, code in BLOCKS for line in code.splitlines() if "pip install" in line and "&&" in line]
    assert len(lines) == 2
    assert all("-c constraints.txt" in line for line in lines)
    assert "'.[examples]'" in lines[0]
    assert lines[0].endswith("python -m examples.ass")
    assert "'.[test]'" in lines[1]
    assert lines[1].endswith("pytest -q")


@pytest.fixture(scope="module")
def drop_in():
    """The README's lines: what comes once, and what comes at every step."""
    (code,) = re.findall(r"^```python\n(.*?)^```", SECTION, flags=re.MULTILINE | re.DOTALL)
    # Another Python block would need its own test.
    assert [block for language, block in BLOCKS if language == "python"] == [code]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 6
    first = next(number for number, line in enumerate(lines) if line.startswith("losses = "))
    return "\n".join(lines[:first]), "\n".join(lines[first:])


def plain_loop(drop_in, steps=8):
    """Somebody's training loop, with the drop-in's lines pasted in, or without them."""
    once, every = drop_in or ("", "")
    torch.manual_seed(0)
    backbone, head = nn.Conv2d(3, 2048, 8, stride=8), nn.Conv2d(2048, 19, 1)
    optimiser = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], 1e-3)
    names = {"optimiser": optimiser, "device": "cpu"}
    exec(once, names)
    if drop_in:
        names["untrained"] = [parameter.detach().clone() for parameter in names["align"].parameters()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
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
    return backbone.weight.detach(), names


def test_drop_in_runs_and_matters(drop_in):
    weights, names = plain_loop(drop_in)
    assert torch.isfinite(names["loss"])
    assert torch.isfinite(names["losses"].discriminator)
    # The discriminator was trained.
    assert all(not torch.equal(one, other) for one, other in zip(names["align"].parameters(), names["untrained"]))
    # Without the lines, or only without the confusion loss, the segmenter ends differently; a repetition is identical.
    once, every = drop_in
    for fewer in (None, (once, every.replace("* losses.confusion", "* losses.confusion.detach()"))):
        assert not torch.equal(weights, plain_loop(fewer)[0])
    assert torch.equal(weights, plain_loop(drop_in)[0])


def test_names_of_the_drop_in_are_explained(drop_in):
    names = set(re.findall(r"\b(?:features|labels)_[st]\b|\bweight\b|\boptimiser\b|\bloss\b", "\n".join(drop_in)))
    rows = "\n".join(line for line in SECTION.splitlines() if line.startswith("|"))
    assert {name for name in names if f"`{name}`" not in rows} == set()

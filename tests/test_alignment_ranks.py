"""Alignment over two ranks: parameters, losses and figures are those of one process on the whole batch.

One pair of processes runs all quick cases. Each case has a process group of its own, so a case that fails leaves the
others alone, and a collective that one rank misses is an error after a while, not a wait for ever.
"""

import pytest
import torch
from torch import distributed as dist
from torch.distributed import fsdp

from tests.alignment_cases import CASES, MODULES, SLOW, STEPS, Case
from tests.alignment_ranks import alone, assert_same_training, bound_of, run_ranks, start_group, train, work


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """The results of both ranks for the cases that this pytest run selects."""
    tests = [item for item in request.session.items if "ranks" in getattr(item, "fixturenames", ())]
    names = list(dict.fromkeys(item.callspec.params["name"] for item in tests if item.path == request.path))
    return run_ranks(work, tmp_path_factory.mktemp("ranks"), names, 240)


def marked(name):
    marks = [pytest.mark.slow] if name in SLOW else []
    if "fsdp" in (CASES[name].segmenter, CASES[name].align):
        marks.append(pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="needs torch 2.6"))
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
class TestTwoRanks:
    def test_three_steps_are_those_of_one_process(self, name, ranks):
        case = CASES[name]
        for every in ranks:
            assert_same_training(case, every[name])
            for key in ("losses", "weight"):
                assert torch.equal(torch.stack(every[name][key]), torch.stack(ranks[0][name][key]))

    def test_every_rank_holds_the_whole_gradient_of_the_discriminator(self, name, ranks):
        case = CASES[name]
        expected = alone(case)["gradients"]
        for found in (every[name] for every in ranks):
            assert not isinstance(found, str), found
            assert all(found["same again"])
            for step in range(STEPS):
                mine, theirs = found["gradients"][step], ranks[0][name]["gradients"][step]
                assert all(map(torch.equal, mine, theirs))
                for gradient, whole_gradient in zip(mine, expected[step]):
                    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=bound_of(case))
        if case.labels == "nothing in common":
            assert not any(gradient.any() for step in expected for gradient in step)


@pytest.mark.parametrize("name", [marked(f"{module}, come and go") for module in ("per image", "per batch")])
def test_seen_is_the_union_over_ranks(name, ranks):
    """Class 3 is in the second rank's target at first, and in the first rank's source after that."""
    for found in (every[name] for every in ranks):
        assert found["seen"][0].tolist() == [[True, True, True, False], [True] * 4]
        assert found["seen"][1].all()


@pytest.mark.parametrize("module", MODULES)
def test_a_group_of_one_rank_changes_nothing(module, tmp_path):
    cases = [Case(module), Case(module, weight="balanced")]
    for case in cases:
        alone(case)
    start_group(tmp_path / "store", rank=0, world=1)
    try:
        for case in cases:
            assert_same_training(case, train(case))
    finally:
        dist.destroy_process_group()

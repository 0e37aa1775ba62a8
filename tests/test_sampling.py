"""The mixed sampler: every stream a permutation pass by pass, ranks disjoint, batches a function of seed and step."""

import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader

import semshift
from semshift import _orders, sampling
from tests.errors import refuses

GOLDEN = [[3, 0, 8], [6, 1, 7], [5, 2, 9]]
GOLDEN_BILLION = [171435977, 989655119, 299451152]
GOLDEN_FAR = [[3, 4, 7], [0, 5, 8]]
GOLDEN_WEIGHTED = [1, 1, 1, 2, 2, 1, 2, 1, 3, 1, 3, 1]
SIZES, PER_BATCH = {"source": 7, "target": 3}, {"source": 2, "target": 1}


def make(**changes):
    arguments = {"sizes": SIZES, "per_batch": PER_BATCH, "seed": 0, "steps": 6} | changes
    return semshift.MixedBatchSampler(arguments.pop("sizes"), arguments.pop("per_batch"), **arguments)


def stream(size, seed=0, draws=None, name="only"):
    sampler = semshift.MixedBatchSampler({name: size}, {name: 1}, seed=seed, steps=draws or size)
    return [batch[0] for batch in sampler]


@given(size=st.integers(1, 70), seed=st.integers(0, 2**70))
def test_every_pass_is_a_permutation(size, seed):
    draws = stream(size, seed, 3 * size)
    for turn in range(3):
        assert sorted(draws[turn * size : (turn + 1) * size]) == list(range(size))


def test_passes_seeds_and_names_differ():
    draws = stream(50, draws=100)
    assert draws[:50] != draws[50:]
    assert stream(50) != stream(50, seed=1)
    assert stream(50) != stream(50, seed=2**64)
    assert stream(50) != stream(50, name="other")


@pytest.mark.parametrize(("size", "passes"), [(5, 30_000), (8, 20_000), (16, 400)])
def test_orders_look_random(size, passes):
    table = np.array(stream(size, draws=size * passes)).reshape(passes, size)
    # Each image at each place: chi-squared with (size - 1) ** 2 degrees of freedom, 6 deviations wide.
    counts = np.stack([np.bincount(column, minlength=size) for column in table.T])
    free = (size - 1) ** 2
    chi = ((counts - passes / size) ** 2 / (passes / size)).sum()
    assert abs(chi - free) < 6 * (2 * free) ** 0.5
    # Neighbours in an order are no closer than chance: correlation within 5 deviations of -1 / (n - 1).
    pairs = np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]
    assert abs(pairs + 1 / (size - 1)) < 5 / (passes * (size - 1)) ** 0.5


def test_golden_values():
    # A changed order would change every run that is resumed under a new version.
    assert list(make(steps=3)) == GOLDEN
    assert stream(10**9, draws=3) == GOLDEN_BILLION
    assert list(make(first_step=10**15, seed=2**70, rank=1, world_size=3, steps=2)) == GOLDEN_FAR
    assert drawn_by_weight([0.0, 1.0, 3.0, 0.5], 12) == GOLDEN_WEIGHTED


@pytest.mark.parametrize("step", [0, 10**15])
def test_a_far_step_of_a_huge_domain_is_as_cheap(step):
    # Hashes, not seconds: twelve rounds a walk, and a walk returns at once with a chance above one in four.
    hashes, mix = 0, _orders.mix

    def counted(key, value):
        nonlocal hashes
        hashes += max(np.size(key), np.size(value))
        return mix(key, value)

    with pytest.MonkeyPatch.context() as patch:
        for module in (_orders, sampling):
            patch.setattr(module, "mix", counted)
        batches = semshift.MixedBatchSampler({"a": 10**9}, {"a": 32}, seed=1, first_step=step, steps=500)
        assert len(list(batches)) == 500
    # Four walks of twelve rounds a draw on average at the very worst, and the keys of a draw.
    assert 500 * 32 * 12 < hashes < 500 * 32 * (12 * 4 + 13)


def test_blocks_of_steps_leave_no_seam():
    # Steps are drawn many at a time; where a block begins must not show.
    whole = list(make(steps=1100))
    assert [next(iter(make(first_step=step, steps=None))) for step in range(0, 1100, 7)] == whole[::7]
    assert list(make(first_step=3, steps=600)) == whole[3:603]


@given(step=st.integers(0, 10**15), world=st.sampled_from([1, 2, 3, 6]))
def test_a_batch_is_a_function_of_its_step_and_ranks_share_the_draws(step, world):
    # Six draws of a step, held by 1, 2, 3 or 6 ranks in order.
    def batch_of(rank, world):
        ranks = {"rank": rank, "world_size": world}
        return next(iter(semshift.MixedBatchSampler({"a": 101}, {"a": 6 // world}, seed=3, first_step=step, **ranks)))

    parts = [batch_of(rank, world) for rank in range(world)]
    assert list(itertools.chain.from_iterable(parts)) == batch_of(0, 1)


def test_ranks_are_disjoint_within_a_pass():
    world = 4
    seen = [
        index
        for rank in range(world)
        for batch in semshift.MixedBatchSampler({"a": 24}, {"a": 2}, seed=0, rank=rank, world_size=world, steps=3)
        for index in batch
    ]
    assert sorted(seen) == list(range(24))


def test_resuming_is_first_step():
    assert list(make(first_step=2, steps=4)) == list(make())[2:]
    assert list(make(steps=6).resume(2, rank=0, world_size=1, per_batch=PER_BATCH)) == list(make())[2:]


def test_resume_on_other_ranks():
    before = make(per_batch={"source": 2, "target": 2}, steps=None)
    after = [before.resume(5, rank=rank, world_size=2, per_batch={"source": 1, "target": 1}) for rank in range(2)]
    whole = next(iter(before.resume(5, rank=0, world_size=1, per_batch={"source": 2, "target": 2})))
    halves = [next(iter(sampler)) for sampler in after]
    assert [halves[0][0], halves[1][0], halves[0][1], halves[1][1]] == whole
    with refuses(ValueError, "world_size", "per_batch['source']", 2, 4):
        before.resume(5, rank=0, world_size=2, per_batch={"source": 2, "target": 1})


@pytest.mark.parametrize(
    ("steps", "first_step", "changes", "error", "says"),
    [
        (4, 7, {}, ValueError, ("first_step", 6, 7)),
        (4, 1, {}, ValueError, ("first_step", 2, 1)),
        (None, 1, {}, ValueError, ("first_step", 2, 1)),
        (4, 3.0, {}, TypeError, ("first_step", 3.0)),
        (4, 3, {"rank": 1}, ValueError, ("rank", "world_size", 1)),
        (4, 3, {"world_size": 0}, ValueError, ("world_size", 1, 0)),
        (4, 3, {"per_batch": {"source": 2}}, ValueError, ("per_batch", ["source", "target"], ["source"])),
        (4, 3, {"per_batch": {"source": "2", "target": 1}}, TypeError, ("per_batch['source']", "'2'")),
    ],
)
def test_resume_errors(steps, first_step, changes, error, says):
    arguments = {"rank": 0, "world_size": 1, "per_batch": PER_BATCH} | changes
    with refuses(error, *says):
        make(first_step=2, steps=steps).resume(first_step, **arguments)


def test_resume_keeps_the_end_and_the_weights():
    sampler = make(first_step=2, weights={"target": [1.0, 2.0, 3.0]})
    resumed = sampler.resume(8, rank=0, world_size=1, per_batch=PER_BATCH)
    assert list(resumed) == []
    resumed = sampler.resume(5, rank=0, world_size=1, per_batch=PER_BATCH)
    assert repr(resumed).startswith(repr(make(first_step=5, steps=3))[:-1])
    assert list(resumed) == list(sampler)[3:]


def test_a_stream_does_not_hang_on_the_other_domains():
    mixed = [batch[2] - 7 for batch in make()]
    alone = [batch[0] for batch in semshift.MixedBatchSampler({"target": 3}, {"target": 1}, seed=0, steps=6)]
    assert mixed == alone


def drawn_by_weight(weights, draws):
    sampler = semshift.MixedBatchSampler({"a": len(weights)}, {"a": 1}, seed=0, steps=draws, weights={"a": weights})
    return [batch[0] for batch in sampler]


@pytest.mark.parametrize("scale", [1e308, 1e-300, 5e-324])
def test_extreme_weights_stay_within_their_domain(scale):
    # Their sum overflows, or has no bits left to be shared out: a draw past the end is an image of the next domain.
    draws = drawn_by_weight([scale, scale, 0.0], 200)
    assert draws == drawn_by_weight([1.0, 1.0, 0.0], 200)
    assert set(draws) == {0, 1}


@pytest.mark.parametrize(("hashed", "image"), [(0, 1), (2**64 - 1, 2)])
def test_ends_of_the_interval_never_draw_an_image_of_weight_0(monkeypatch, hashed, image):
    sampler = semshift.MixedBatchSampler({"a": 4}, {"a": 1}, seed=0, steps=1, weights={"a": [0.0, 1.0, 3.0, 0.0]})
    list(sampler)
    # After a first batch, so that the stream's key, which is cached, is the true one.
    monkeypatch.setattr(sampling, "mix", lambda key, value: np.full(value.shape, hashed, np.uint64))
    assert list(sampler) == [[image]]


def test_weighted_draws():
    weights = np.array([0.0, 1.0, 3.0])
    sampler = semshift.MixedBatchSampler({"a": 3}, {"a": 1}, seed=0, steps=4000, weights={"a": weights})
    draws = np.array([batch[0] for batch in sampler])
    counts = np.bincount(draws, minlength=3)
    assert counts[0] == 0
    # A binomial share, within 5 deviations.
    assert abs(counts[2] / 4000 - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5
    later = semshift.MixedBatchSampler(
        {"a": 3}, {"a": 1}, seed=0, first_step=3990, steps=10, weights={"a": torch.from_numpy(weights)}
    )
    assert [batch[0] for batch in later] == draws[3990:].tolist()


def test_is_a_value():
    sampler = make(weights={"target": [1.0, 2.0, 3.0]})
    again = pickle.loads(pickle.dumps(sampler))
    assert again == sampler
    assert hash(again) == hash(sampler)
    assert list(again) == list(sampler) == list(sampler)
    assert sampler != make()
    assert make(steps=5) != make()
    swapped = make(sizes={"target": 3, "source": 7}, per_batch={"target": 1, "source": 2})
    assert swapped != make()
    assert repr(make()) == (
        "MixedBatchSampler({'source': 7, 'target': 3}, {'source': 2, 'target': 1}, seed=0, rank=0, world_size=1, "
        "first_step=0, steps=6)"
    )
    assert repr(sampler).endswith("steps=6, weights=<target>)")


def test_length():
    assert len(make()) == 6
    with refuses(TypeError, "steps", "endless"):
        len(make(steps=None))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_as_a_batch_sampler(workers):
    images = ConcatDataset([list(range(7)), list(range(100, 103))])
    collate = functools.partial(semshift.collate_by_domain, per_batch=PER_BATCH)
    persistent = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(images, batch_sampler=make(), collate_fn=collate, **persistent)
    for _ in range(2):
        batches = list(loader)
        flat = [[*batch["source"].tolist(), *(batch["target"] - 93).tolist()] for batch in batches]
        assert flat == list(make())


def test_rare_class_weights_against_a_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (9, 4)) * (rng.random((9, 4)) < 0.6)
    counts[:, 3] = 0
    counts[8] = 0
    frequency = counts.sum(0) / counts.sum()
    chosen = [np.exp((1 - f) / 0.1) if counts[:, k].any() else 0.0 for k, f in enumerate(frequency)]
    expected = [
        sum(chosen[k] / sum(chosen) / (counts[:, k] > 0).sum() for k in range(4) if counts[n, k] > 0) for n in range(9)
    ]
    weights = semshift.rare_class_weights(counts, temperature=0.1)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights.sum() == pytest.approx(1)
    assert weights[8] == 0
    for temperature in (1e-4, 1e-310):
        # Only images of the rarest class are left, each as often.
        rarest = int(np.where(counts.any(0), frequency, np.inf).argmin())
        held = counts[:, rarest] > 0
        weights = semshift.rare_class_weights(torch.from_numpy(counts), temperature=temperature)
        np.testing.assert_allclose(weights, held / held.sum(), atol=1e-12)


def test_rare_class_weights_of_images_that_show_enough():
    # Class 1 is shown by the last image alone and class 2 by none, so the probabilities are of 0 and 1 only.
    counts = np.array([[80, 0, 2], [60, 4, 0], [40, 14, 0]])
    first, second = np.exp((1 - np.array([180, 18]) / 200) / 0.5)
    expected = np.array([first / 3, first / 3, first / 3 + second]) / (first + second)
    weights = semshift.rare_class_weights(counts, temperature=0.5, min_pixels=5)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    # At the border it counts.
    assert semshift.rare_class_weights(counts, temperature=1e-4, min_pixels=2)[0] == pytest.approx(1)
    assert semshift.rare_class_weights(counts, temperature=1e-4, min_pixels=3)[0] < 1e-12
    sampler = semshift.MixedBatchSampler({"a": 3}, {"a": 1}, seed=0, steps=4, weights={"a": weights})
    assert len(list(sampler)) == 4


def test_numbers_of_numpy_are_kept_as_pythons():
    """Its values compare, print and pickle alike, and no count overflows."""
    plain = make(seed=3, rank=1, world_size=2, first_step=5, steps=6)
    of_numpy = semshift.MixedBatchSampler(
        {name: np.int64(size) for name, size in SIZES.items()},
        {name: np.uint8(count) for name, count in PER_BATCH.items()},
        seed=np.uint64(3),
        rank=np.int8(1),
        world_size=np.uint8(2),
        first_step=np.uint64(5),
        steps=np.int32(6),
    )
    assert of_numpy == plain
    assert (repr(of_numpy), pickle.dumps(of_numpy)) == (repr(plain), pickle.dumps(plain))
    assert hash(of_numpy) == hash(plain)
    assert list(of_numpy) == list(plain)
    largest = 2**64 - 1
    assert list(make(seed=np.uint64(largest))) == list(make(seed=largest))
    whole = semshift.MixedBatchSampler({"a": 1000}, {"a": 400}, seed=0, steps=300)
    half = whole.resume(np.uint8(3), rank=np.uint8(1), world_size=np.uint8(2), per_batch={"a": np.uint8(200)})
    assert half == whole.resume(3, rank=1, world_size=2, per_batch={"a": 200})
    assert "uint" not in repr(half)
    parts = semshift.collate_by_domain([1] * 300, {"a": np.uint8(200), "b": np.uint8(100)})
    assert {name: len(part) for name, part in parts.items()} == {"a": 200, "b": 100}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sizes": [7, 3]}, TypeError, ("sizes", [7, 3])),
        ({"per_batch": 3}, TypeError, ("per_batch", 3)),
        ({"weights": [1.0]}, TypeError, ("weights", [1.0])),
        ({"sizes": {1: 7}, "per_batch": {1: 2}}, TypeError, ("sizes", "strings", 1)),
        ({"sizes": {"source": 2**62, "target": 1}}, ValueError, ("sizes", 2**62 + 1)),
        ({"sizes": {}, "per_batch": {}}, ValueError, ("sizes", "none")),
        (
            {"per_batch": {"target": 1, "source": 2}},
            ValueError,
            ("per_batch", ["source", "target"], ["target", "source"]),
        ),
        ({"sizes": {"source": 0, "target": 3}}, ValueError, ("sizes['source']", 1, 0)),
        ({"sizes": {"source": 7, "target": torch.tensor(3)}}, TypeError, ("sizes['target']", "tensor(3)")),
        ({"per_batch": {"source": 2, "target": 0}}, ValueError, ("per_batch['target']", 1, 0)),
        ({"per_batch": {"source": 2, "target": 1.0}}, TypeError, ("per_batch['target']", 1.0)),
        ({"seed": -1}, ValueError, ("seed", 0, -1)),
        ({"world_size": 0}, ValueError, ("world_size", 1, 0)),
        ({"rank": 2, "world_size": 2}, ValueError, ("rank", "world_size", 2)),
        ({"rank": -1}, ValueError, ("rank", 0, -1)),
        ({"first_step": -1}, ValueError, ("first_step", 0, -1)),
        ({"steps": -1}, ValueError, ("steps", 0, -1)),
        ({"steps": 1.5}, TypeError, ("steps", 1.5)),
        ({"weights": {"other": [1.0]}}, ValueError, ("weights", ["source", "target"], "'other'")),
        ({"weights": {"target": [1.0]}}, ValueError, ("weights['target']", [3], [1])),
        ({"weights": {"target": [0.0, 0.0, 0.0]}}, ValueError, ("weights['target']", 0)),
        ({"weights": {"target": [1.0, -1.0, 1.0]}}, ValueError, ("weights['target']", -1.0)),
        ({"weights": {"target": [1.0, 2.0, np.nan]}}, ValueError, ("weights['target']", "nan")),
        ({"weights": {"target": [1.0, np.inf, 1.0]}}, ValueError, ("weights['target']", "inf")),
        ({"weights": {"target": [1.0, "x", 1.0]}}, TypeError, ("weights['target']", "'x'")),
    ],
)
def test_errors(changes, error, says):
    with refuses(error, *says):
        make(**changes)


@pytest.mark.parametrize(
    ("samples", "per_batch", "error", "says"),
    [
        ([1], {"source": 2, "target": -1}, ValueError, ("per_batch['target']", 1, -1)),
        ([1], {"source": 1.0}, TypeError, ("per_batch['source']", 1.0)),
        ([1], [1], TypeError, ("per_batch", [1])),
        ([1, 2], PER_BATCH, ValueError, ("samples", "per_batch", PER_BATCH, 3, 2)),
    ],
)
def test_errors_of_collating(samples, per_batch, error, says):
    with refuses(error, *says):
        semshift.collate_by_domain(samples, per_batch)


@pytest.mark.parametrize(
    ("counts", "options", "error", "says"),
    [
        (np.ones(3), {}, ValueError, ("class_counts", "[N, K]", [3])),
        (np.zeros((2, 2)), {}, ValueError, ("class_counts", 0)),
        (np.ones((0, 2)), {}, ValueError, ("class_counts", "none")),
        ([[1, -2]], {}, ValueError, ("class_counts", -2.0)),
        ("many", {}, TypeError, ("class_counts", "'many'")),
        (np.ones((2, 2)), {"temperature": True}, TypeError, ("temperature", True)),
        (np.ones((2, 2)), {"temperature": 0.0}, ValueError, ("temperature", 0.0)),
        (np.ones((2, 2)), {"temperature": np.float32("inf")}, ValueError, ("temperature", "inf")),
        (np.ones((2, 2)), {"min_pixels": 2.0}, TypeError, ("min_pixels", 2.0)),
        (np.ones((2, 2)), {"min_pixels": 0}, ValueError, ("min_pixels", 1, 0)),
        ([[1, 4]], {"min_pixels": 5}, ValueError, ("class_counts", "min_pixels", 5, 4.0)),
    ],
)
def test_errors_of_rare_class_weights(counts, options, error, says):
    with refuses(error, *says):
        semshift.rare_class_weights(counts, **options)

"""The built-in scenes: their contents, the arguments they depend on, and the effect of each severity."""

import itertools

import numpy as np
import pytest

from examples.scenes import CLASSES, Scenes, Severity, draw
from tests.errors import refuses

NONE = Severity(0, 0, 0, 0, 0, 0)
PARTS = ("light", "fog", "noise", "camera", "texture", "colour")


def test_shapes_and_dtypes():
    for size in ((64, 96), (32, 32), (50, 77)):
        image, label = draw("target", "train", 3, seed=1, size=size)
        assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
        assert (label.shape, label.dtype) == (size, np.uint8)
        assert label.max() < len(CLASSES)


@pytest.mark.parametrize("domain", ["source", "target"])
def test_every_class_appears_and_persons_are_rare(domain):
    held = np.zeros(len(CLASSES))
    pixels = np.zeros(len(CLASSES))
    for index in range(120):
        counts = np.bincount(draw(domain, "train", index, seed=0)[1].ravel(), minlength=len(CLASSES))
        held += counts > 0
        pixels += counts
    share = dict(zip(CLASSES, held / 120))
    assert all(share[name] > 0.95 for name in ("sky", "building", "road", "pavement"))
    assert 0.3 < share["person"] < 0.7
    assert min(share.values()) > 0.3
    area = dict(zip(CLASSES, pixels / pixels.sum()))
    assert area["person"] < 0.02
    assert area["pole"] < 0.04


def test_a_function_of_its_arguments():
    image, label = draw("target", "val", 5, seed=2)
    again, same = draw("target", "val", 5, seed=2)
    assert np.array_equal(image, again)
    assert np.array_equal(label, same)


def test_no_image_is_in_two_places():
    keys = itertools.product(("source", "target"), ("train", "val", "test"), range(12), (0, 1))
    drawn = {draw(domain, split, index, seed=seed, severity=NONE)[0].tobytes() for domain, split, index, seed in keys}
    assert len(drawn) == 2 * 3 * 12 * 2


def test_without_severity_the_domains_look_alike(monkeypatch):
    # Where both draw from the same numbers, which are keyed by (seed, domain, split, index, part).
    seeded = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: seeded((key[0], *key[2:])))
    for index in range(3):
        source, target, shifted = (
            draw(domain, "train", index, seed=0, severity=severity)
            for domain, severity in (("source", NONE), ("target", NONE), ("target", None))
        )
        assert np.array_equal(source[0], target[0])
        assert np.array_equal(source[1], target[1])
        assert not np.array_equal(source[0], shifted[0])


def test_the_source_has_no_severity():
    strong = draw("source", "train", 0, seed=0, severity=Severity(1, 1, 1, 1, 1, 1))
    plain = draw("source", "train", 0, seed=0, severity=NONE)
    assert np.array_equal(strong[0], plain[0])
    assert np.array_equal(strong[1], plain[1])


@pytest.mark.parametrize("part", PARTS)
def test_each_severity_moves_the_look_further_and_further(part):
    plain, label = draw("target", "train", 7, seed=0, severity=NONE)
    distances = []
    for amount in (0.3, 0.6, 1.0):
        image, moved = draw(
            "target", "train", 7, seed=0, severity=Severity(**dict.fromkeys(PARTS, 0.0) | {part: amount})
        )
        distances.append(np.abs(image.astype(float) - plain).mean())
        # The camera alone changes where things are.
        assert np.array_equal(moved, label) == (part != "camera")
    assert 0 < distances[0] < distances[1] < distances[2]


def test_a_split_is_drawn_once():
    split = Scenes("target", "test", 3, seed=0, size=(32, 48))
    assert len(split) == 3
    assert split[1] is split[1]
    assert split[1].name == "target-test-00001"
    assert np.array_equal(split[1].image, draw("target", "test", 1, seed=0, size=(32, 48))[0])
    for index in (3, -1, 1.0, True):
        with refuses(IndexError, "index", "[0, 3)", index):
            split[index]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw("moon", "train", 0, seed=0), ("domain", "source", "target", "moon")),
        (lambda: draw("source", "all", 0, seed=0), ("split", "train", "val", "test", "all")),
        (lambda: draw("source", "val", -1, seed=0), ("index", 0, -1)),
        (lambda: draw("source", "val", 0, seed=-1), ("seed", 0, -1)),
        (lambda: draw("source", "val", 0, seed=0, size=(16, 64)), ("size", 32, (16, 64))),
        (lambda: Scenes("source", "val", 0, seed=0), ("count", 1, 0)),
        (lambda: draw("source", "val", True, seed=0), ("index", "int", True)),
        (lambda: draw("source", "val", 0, seed=0.5), ("seed", "int", 0.5)),
        (lambda: Scenes("source", "val", 2.0, seed=0), ("count", "int", 2.0)),
        (lambda: Scenes("source", "val", 1, seed=None), ("seed", "int", None)),
        (lambda: draw("source", "val", 0, seed=0, size=64), ("size", 64)),
        (lambda: draw("source", "val", 0, seed=0, size=(64,)), ("size", (64,))),
        (lambda: draw("source", "val", 0, seed=0, size=(64, 64, 3)), ("size", (64, 64, 3))),
        (lambda: draw("source", "val", 0, seed=0, size=(64, 96.0)), ("size", "ints", (64, 96.0))),
        (lambda: Scenes("target", "val", 1, seed=0, size="64"), ("size", "'64'")),
        (lambda: draw("source", "val", 0, seed=0, severity=0), ("severity", "Severity", 0)),
        (lambda: Scenes("target", "val", 1, seed=0, severity={"fog": 1}), ("severity", "Severity", {"fog": 1})),
        (lambda: Severity(fog="0.5"), ("severity.fog", "number", "'0.5'")),
        (lambda: Severity(noise=True), ("severity.noise", "number", True)),
        (lambda: Severity(fog=1.5), ("severity.fog", "[0, 1]", 1.5)),
        (lambda: Severity(light=float("nan")), ("severity.light", "[0, 1]", "nan")),
    ],
)
def test_errors(call, words):
    with refuses(ValueError, *words):
        call()

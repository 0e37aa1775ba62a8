"""Built-in scenes: two domains of street-like images, drawn on the fly from a seed.

Both domains show the same kind of street but differ in look. The difference has parts, and each part has a severity.
Light, fog, noise and camera change the whole image. Colour and texture make one class look more like another class. So
experiments can show which alignment helps against which shift.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

__all__ = ["CLASSES", "CLASS_COLOURS", "Sample", "Scenes", "Severity", "draw"]

CLASSES = ("sky", "building", "road", "pavement", "vegetation", "pole", "car", "person")
SKY, BUILDING, ROAD, PAVEMENT, VEGETATION, POLE, CAR, PERSON = range(len(CLASSES))
# Colours of the classes in drawings of labels and predictions. Colour-blind people can tell them apart too (tested).
CLASS_COLOURS = ("#8fcdf7", "#7c3328", "#6b6b6b", "#d990bb", "#3fa34d", "#1a1b1b", "#1f3a9e", "#e12228")
DOMAINS = ("source", "target")
SPLITS = ("train", "val", "test")

# Mean colours of the classes in the source, and the colours that the target moves towards. Road and pavement swap their
# colours, and so do poles and persons. Buildings turn as grey as the sky, and vegetation as brown as buildings.
SOURCE_COLOURS = np.array(
    [
        [0.62, 0.76, 0.92],
        [0.58, 0.42, 0.34],
        [0.30, 0.30, 0.33],
        [0.58, 0.55, 0.52],
        [0.22, 0.46, 0.20],
        [0.18, 0.17, 0.16],
        [0.72, 0.16, 0.18],
        [0.80, 0.58, 0.25],
    ]
)
TARGET_COLOURS = np.array(
    [
        [0.80, 0.80, 0.78],
        [0.66, 0.68, 0.72],
        [0.56, 0.53, 0.50],
        [0.36, 0.35, 0.36],
        [0.52, 0.44, 0.26],
        [0.52, 0.50, 0.46],
        [0.30, 0.36, 0.50],
        [0.28, 0.22, 0.24],
    ]
)
# Amplitudes of fine grain, blotches, coarse clouds and brick rows, for each class.
SOURCE_TEXTURES = np.array(
    [
        [0.00, 0.00, 0.10, 0.00],
        [0.03, 0.02, 0.00, 0.16],
        [0.05, 0.02, 0.02, 0.00],
        [0.02, 0.02, 0.00, 0.10],
        [0.04, 0.18, 0.04, 0.00],
        [0.02, 0.00, 0.00, 0.00],
        [0.00, 0.02, 0.08, 0.00],
        [0.04, 0.04, 0.00, 0.00],
    ]
)
TARGET_TEXTURES = np.array(
    [
        [0.00, 0.06, 0.12, 0.00],
        [0.04, 0.14, 0.02, 0.02],
        [0.02, 0.02, 0.02, 0.12],
        [0.08, 0.06, 0.02, 0.00],
        [0.03, 0.04, 0.02, 0.14],
        [0.06, 0.02, 0.00, 0.00],
        [0.04, 0.08, 0.00, 0.04],
        [0.02, 0.10, 0.00, 0.00],
    ]
)
# Variation of a class's colour between images, and between single buildings, trees or cars.
JITTER = np.array([0.06, 0.10, 0.05, 0.05, 0.07, 0.05, 0.20, 0.16])


@dataclass(frozen=True)
class Severity:
    """Severity of each part of the target's shift, from 0 (no difference from the source) to 1 (strong).

    Args:
        light: darker images with more contrast and a warm colour cast, from 0 to 1.
        fog: grey fog that thickens with distance, from 0 to 1.
        noise: noise of the camera's sensor, from 0 to 1.
        camera: blur, dark corners and a lower horizon, from 0 to 1.
        texture: change of each class's texture towards another class's, from 0 to 1.
        colour: change of each class's colour towards another class's, from 0 to 1.
    """

    light: float = 0.5
    fog: float = 0.5
    noise: float = 0.5
    camera: float = 0.5
    texture: float = 0.5
    colour: float = 0.5

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"expected severity.{part.name} to be a number, got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"expected severity.{part.name} in [0, 1], got {value}")


class Sample(NamedTuple):
    """An image and its labels."""

    image: np.ndarray
    """`uint8 [H, W, 3]`."""
    label: np.ndarray
    """`uint8 [H, W]`."""
    name: str


class Scenes:
    """A split of a domain. Indexing draws an image and keeps it.

    Args:
        domain: `"source"` or `"target"`.
        split: `"train"`, `"val"` or `"test"`; no image is in two splits.
        count: number of images, at least 1.
        seed: random seed of all images, at least 0.
        size: height and width, at least 32 each.
        severity: severity of the target's shift.

    Raises:
        ValueError: an unknown domain or split, a number out of range, or an argument of a wrong type.
    """

    def __init__(
        self,
        domain: Literal["source", "target"],
        split: Literal["train", "val", "test"],
        count: int,
        *,
        seed: int,
        size: tuple[int, int] = (64, 96),
        severity: Severity | None = None,
    ) -> None:
        _check_int("count", count, 1)
        _check(domain, split, 0, seed, size, severity)
        self.domain: Literal["source", "target"] = domain
        self.split: Literal["train", "val", "test"] = split
        self.count = count
        self.seed = seed
        self.size = size
        self.severity = severity or Severity()
        self._drawn: dict[int, Sample] = {}

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    @property
    def names(self) -> list[str]:
        """The names of the images."""
        return [f"{self.domain}-{self.split}-{index:05d}" for index in range(self.count)]

    def __getitem__(self, index: int) -> Sample:
        """Draw an image and its labels, or return them if they were drawn before."""
        # The check refuses 1.0, which would otherwise find the scene that was drawn for 1.
        if not _is_int(index) or not 0 <= index < self.count:
            raise IndexError(f"expected an index in [0, {self.count}), got {index}")
        if index not in self._drawn:
            image, label = draw(self.domain, self.split, index, seed=self.seed, size=self.size, severity=self.severity)
            self._drawn[index] = Sample(image, label, self.names[index])
        return self._drawn[index]


def draw(
    domain: Literal["source", "target"],
    split: Literal["train", "val", "test"],
    index: int,
    *,
    seed: int,
    size: tuple[int, int] = (64, 96),
    severity: Severity | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene. The result depends only on the arguments.

    Args:
        domain: `"source"` or `"target"`. With all severities 0 both look alike, but the images are different.
        split: `"train"`, `"val"` or `"test"`.
        index: index of the image, at least 0.
        seed: random seed of all images, at least 0.
        size: height and width, at least 32 each.
        severity: severity of the target's shift; it has no effect on the source.

    Returns:
        The image, `uint8 [H, W, 3]`, and its labels, `uint8 [H, W]`, which are indices of `CLASSES`.

    Raises:
        ValueError: an unknown domain or split, a number out of range, or an argument of a wrong type.
    """
    _check(domain, split, index, seed, size, severity)
    severity = Severity(0, 0, 0, 0, 0, 0) if domain == "source" else severity or Severity()
    key = (seed, DOMAINS.index(domain), SPLITS.index(split), index)
    # Two generators, so that the layout does not depend on how many random numbers the look uses.
    layout, look = (np.random.default_rng((*key, part)) for part in range(2))
    label, instance, depth = _lay_out(layout, size, severity)
    return _paint(look, label, instance, depth, severity), label


def _lay_out(rng: np.random.Generator, size: tuple[int, int], severity: Severity) -> tuple[np.ndarray, ...]:
    """The layout of a street: labels, an instance number for each object, and depth in [0, 1]."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = (x + 0.5) / width, (y + 0.5) / height
    horizon = _between(rng, 0.36, 0.48) + 0.08 * severity.camera
    centre = _between(rng, 0.35, 0.65)
    below = np.clip((y - horizon) / (1 - horizon), 0, 1)
    label = np.full(size, SKY)
    instance = np.zeros(size, np.int64)
    depth = np.ones(size)

    # Both sides of the street: houses and trees, as blocks that grow towards the viewer.
    edge = 0.0
    number = 1
    while edge < 1:
        end = edge + _between(rng, 0.08, 0.22)
        nearness = abs((edge + min(end, 1.0)) / 2 - centre)
        top = horizon - (0.05 + nearness * _between(rng, 0.35, 1.0))
        is_tree = rng.random() < 0.38
        block = (x >= edge) & (x < end) & (y >= top)
        if is_tree:
            middle, half = (edge + end) / 2, (end - edge) / 2
            block = (np.abs(x - middle) / half) ** 2 + ((y - top - 0.14) / 0.16) ** 2 < 1
            block |= (x >= edge) & (x < end) & (y >= top + 0.14)
        label[block], instance[block] = (VEGETATION if is_tree else BUILDING), number
        depth[block] = 1 - min(1.5 * nearness, 0.9)
        edge, number = end, number + 1

    # The ground: a road towards the vanishing point, with pavements along it; verges and walls are outside.
    half_road = _between(rng, 0.24, 0.40)
    half_street = half_road + _between(rng, 0.16, 0.26)
    lean = _between(rng, -0.15, 0.15)
    axis = centre + lean * below
    ground = y > horizon
    street = ground & (np.abs(x - axis) < 0.03 + half_street * 1.6 * below)
    road = ground & (np.abs(x - axis) < 0.02 + half_road * 1.6 * below)
    label[street], label[road] = PAVEMENT, ROAD
    instance[street], instance[road] = number, number + 1
    depth[street] = (1 - below[street]) ** 2
    number += 2

    # Objects on the ground, the distant ones first.
    things = [(CAR, rng.random()) for _ in range(int(rng.integers(0, 3)))]
    things += [(POLE, rng.random()) for _ in range(int(rng.integers(1, 4)))]
    things += [(PERSON, rng.random()) for _ in range(int(rng.integers(1, 3)))] if rng.random() < 0.6 else []
    for kind, nearness in sorted(things, key=lambda thing: thing[1]):
        near = 0.12 + 0.68 * nearness
        foot = horizon + near * (1 - horizon)
        side = 1 if rng.random() < 0.5 else -1
        axis_here = centre + lean * near
        kerb = 1.6 * half_road * near
        if kind == CAR:
            at = axis_here + side * kerb * _between(rng, 0.35, 0.8)
            half, tall = 0.03 + 0.13 * near, 0.05 + 0.20 * near
            body = (np.abs(x - at) < half) & (y < foot) & (y > foot - 0.6 * tall)
            roof = (np.abs(x - at) < 0.6 * half) & (y < foot) & (y > foot - tall)
            thing = body | roof
        elif kind == POLE:
            at = axis_here + side * (kerb + _between(rng, 0.03, 0.10))
            half = max(0.004 + 0.010 * near, 0.9 / width)
            thing = (np.abs(x - at) < half) & (y < foot) & (y > foot - (0.16 + 0.55 * near))
        else:
            at = axis_here + side * (kerb + 1.6 * near * _between(rng, -0.06, 0.16))
            half, tall = 0.018 + 0.032 * near, 0.10 + 0.28 * near
            body = (np.abs(x - at) < half) & (y < foot) & (y > foot - 0.8 * tall)
            head = ((x - at) / (0.7 * half)) ** 2 + ((y - foot + 0.88 * tall) / (0.13 * tall)) ** 2 < 1
            thing = body | head
        label[thing], instance[thing] = kind, number
        depth[thing] = (1 - near) ** 2
        number += 1
    return label.astype(np.uint8), instance, depth


def _paint(
    rng: np.random.Generator, label: np.ndarray, instance: np.ndarray, depth: np.ndarray, severity: Severity
) -> np.ndarray:
    """Paint the image of a layout."""
    size = label.shape
    colours = SOURCE_COLOURS + severity.colour * (TARGET_COLOURS - SOURCE_COLOURS)
    textures = SOURCE_TEXTURES + severity.texture * (TARGET_TEXTURES - SOURCE_TEXTURES)
    colours = colours + (2 * rng.random((len(CLASSES), 1)) - 1) * JITTER[:, None] * 0.6
    own = 2 * rng.random((int(instance.max()) + 1, 3)) - 1
    image = colours[label] + own[instance] * JITTER[label][..., None]

    rows = np.arange(size[0])[:, None]
    bricks = np.where((rows % 4 == 0) | ((np.arange(size[1]) + 3 * (rows // 4)) % 7 == 0), -1.0, 0.35)
    grains = np.stack([_grain(rng, size, cell) for cell in (1, 3, 12)] + [bricks], axis=-1)
    image += (grains * textures[label]).sum(-1, keepdims=True)

    image *= _between(rng, 0.88, 1.12)
    haze = np.array([0.78, 0.79, 0.80])
    thickness = (0.15 * rng.random() + severity.fog * _between(rng, 0.55, 0.85)) * depth[..., None] ** 1.2
    image = image * (1 - thickness) + haze * thickness
    gain = 1 - severity.light * _between(rng, 0.10, 0.50)
    cast = 1 + severity.light * np.array([0.16, -0.02, -0.24])
    image = np.clip(image * gain * cast, 0, 1) ** (1 + 0.2 * severity.light)
    if severity.camera > 0:
        soft = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        soft = (soft[:-2] + soft[1:-1] + soft[2:]) / 3
        soft = (soft[:, :-2] + soft[:, 1:-1] + soft[:, 2:]) / 3
        image = (1 - 0.8 * severity.camera) * image + 0.8 * severity.camera * soft
        away = np.hypot(*np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]), indexing="ij"))
        image *= (1 - 0.25 * severity.camera * away**2)[..., None]
    # The sum of three uniform numbers is nearly Gaussian, and Generator.random is stable across NumPy versions.
    noise = rng.random((3, *image.shape)).sum(0) - 1.5
    image += (0.02 + 0.06 * severity.noise) * 2 * noise
    painted: np.ndarray = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return painted


def _grain(rng: np.random.Generator, size: tuple[int, ...], cell: int) -> np.ndarray:
    """Noise in [-1, 1], constant in cells that are `cell` pixels wide."""
    coarse = 2 * rng.random((math.ceil(size[0] / cell), math.ceil(size[1] / cell))) - 1
    return coarse.repeat(cell, 0).repeat(cell, 1)[: size[0], : size[1]]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _check(domain: str, split: str, index: int, seed: int, size: tuple[int, int], severity: Severity | None) -> None:
    if domain not in DOMAINS:
        raise ValueError(f"expected domain to be one of {', '.join(DOMAINS)}, got {domain}")
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {', '.join(SPLITS)}, got {split}")
    _check_int("index", index, 0)
    _check_int("seed", seed, 0)
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(_is_int(extent) for extent in size):
        raise ValueError(f"expected size to be two ints, height and width, got {size!r}")
    if min(size) < 32:
        raise ValueError(f"expected height and width in size to be at least 32, got {tuple(size)}")
    if not isinstance(severity, Severity | None):
        raise ValueError(f"expected severity to be a Severity or None, got {severity!r}")


def _check_int(name: str, value: int, least: int) -> None:
    if not _is_int(value):
        raise ValueError(f"expected {name} to be an int, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
